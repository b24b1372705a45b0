"""Conversion of image-caption pairs to MDS."""

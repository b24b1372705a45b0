"""From any usual form of image-caption pairs to MDS."""

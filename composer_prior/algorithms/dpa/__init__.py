"""Weights from the probability that the image adds to a token (arXiv 2509.14735)."""

"""Weights from what the image adds to a token's probability, by a model that sees it."""

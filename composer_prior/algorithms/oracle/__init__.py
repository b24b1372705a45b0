"""Weights where the data say that the image decides: an upper bound."""

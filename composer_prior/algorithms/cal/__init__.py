"""CAL: weights from what the image adds to the logit of each label (arXiv 2405.17871)."""

"""VIG: train on the samples and tokens that the image explains (arXiv 2602.17186)."""

"""ReGATE: train on tokens that are hard for the model and for a text-only reference (arXiv 2507.21420)."""

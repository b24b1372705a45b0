"""The focal loss on caption tokens (arXiv 1708.02002)."""

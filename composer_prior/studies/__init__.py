"""Studies: runs of recipes that differ by method, seed and other keys, and the comparison of their results."""

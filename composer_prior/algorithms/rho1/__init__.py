"""Rho-1: train on the tokens with the highest excess loss over the reference (arXiv 2404.07965)."""

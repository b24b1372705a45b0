"""Checkpoints: when they are saved, what they hold, which are whole, and what may be read from them."""

"""Compute and store reference log-probabilities of captions, also with another tokenizer than the model's."""

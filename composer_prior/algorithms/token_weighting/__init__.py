"""What methods that weight the tokens of captions share; see :class:`.TokenWeighting`."""

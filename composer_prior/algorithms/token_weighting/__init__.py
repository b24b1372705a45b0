"""Base classes and functions of methods that weight the tokens of captions; see :class:`.TokenWeighting`."""

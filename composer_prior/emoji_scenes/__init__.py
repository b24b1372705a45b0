"""The embedded data set: real drawings with captions in the style of alt text."""

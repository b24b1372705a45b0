"""The embedded data set: real drawings with captions in the manner of alt text."""

"""PRIOR's weights on the wrong tokens of a caption, as a control."""

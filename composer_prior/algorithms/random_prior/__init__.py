"""Random weights with the distribution of PRIOR's, as a control."""

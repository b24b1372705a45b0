"""Studies: many runs of recipes that differ by method, seed and whatever else, and what they say together."""

"""Studies: many runs that differ in a few named ways, compared with one another."""

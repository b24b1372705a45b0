"""Training from a recipe: its schema, the builders of its parts, and the run."""

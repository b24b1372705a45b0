"""Training methods as Composer algorithms: one folder each, with its method card beside it."""

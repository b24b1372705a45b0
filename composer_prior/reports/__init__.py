"""What people look at: a data set, samples with shaded tokens, the end of a run."""

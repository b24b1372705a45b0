"""Pages and tables: a data set, samples with shaded tokens, the end of a run, plots."""

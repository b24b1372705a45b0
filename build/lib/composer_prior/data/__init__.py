"""Image-caption data: streaming data sets, tokenization, the embedded data set, conversion."""

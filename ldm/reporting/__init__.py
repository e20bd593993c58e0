"""Reports of runs. Importing this package imports no torch."""

SAMPLES = 12  # of the training set in a report, unless another number is asked for

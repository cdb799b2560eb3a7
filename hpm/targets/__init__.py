"""What the reconstructor predicts for each patch: a file per target, found by name."""

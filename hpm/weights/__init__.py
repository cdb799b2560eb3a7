"""Files of weights: run folders, checkpoints, backbones, and other libraries' formats."""

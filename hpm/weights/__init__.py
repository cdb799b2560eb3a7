"""Weights: run folders, checkpoints, backbone files, and formats of other libraries."""

"""Reconstruction targets, one file each."""

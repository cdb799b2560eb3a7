"""Foundations: options, errors, files, processes."""

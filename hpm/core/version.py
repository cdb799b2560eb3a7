"""The version, apart from everything else so that it can be read without importing PyTorch."""

__version__ = "0.1.0"

"""hpm: self-supervised pre-training of vision backbones by Hard Patches Mining."""

__version__ = "0.1.0"

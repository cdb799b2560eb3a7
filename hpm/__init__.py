"""hpm: self-supervised pre-training of vision backbones by Hard Patches Mining."""

from hpm.errors import UserError
from hpm.evals import evaluate
from hpm.export import export
from hpm.pretrain import Interrupted, pretrain
from hpm.run import Run, load_encoder
from hpm.version import __version__

__all__ = [
    "Interrupted", "Run", "UserError", "__version__", "evaluate", "export", "load_encoder",
    "pretrain",
]  # fmt: skip

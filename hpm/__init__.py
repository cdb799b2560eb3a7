"""Self-supervised pre-training of Vision Transformers by Hard Patches Mining.

run = hpm.pretrain("photos/", out="runs/first", model="vit_small", epochs=100)
encoder = hpm.load_encoder("runs/first")
result = hpm.evaluate("linear", "runs/first", "flowers/")
"""

from __future__ import annotations

import importlib
import random
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("hpm runs on Linux and macOS: on Windows, install it in WSL 2")

from hpm.core.errors import UserError
from hpm.core.signals import Interrupted
from hpm.core.version import __version__

if TYPE_CHECKING:
    from hpm import mining
    from hpm.commands.embed import embed
    from hpm.commands.export import export
    from hpm.commands.predict import predict
    from hpm.evals import evaluate
    from hpm.evals.embeddings import Embeddings
    from hpm.mining import losses, masking
    from hpm.pretraining import pretrain
    from hpm.show.drawing import Drawing
    from hpm.show.image_clusters import ImageClusters, cluster
    from hpm.show.run import Run
    from hpm.weights.finetuned import load_model
    from hpm.weights.resolve import load_encoder

# What needs PyTorch is imported when it is asked for, so that `hpm --help` answers at once.
_LAZY = {
    "Drawing": "hpm.show.drawing",
    "Embeddings": "hpm.evals.embeddings",
    "ImageClusters": "hpm.show.image_clusters",
    "Run": "hpm.show.run",
    "cluster": "hpm.show.image_clusters",
    "embed": "hpm.commands.embed",
    "evaluate": "hpm.evals",
    "export": "hpm.commands.export",
    "load_encoder": "hpm.weights.resolve",
    "load_model": "hpm.weights.finetuned",
    "predict": "hpm.commands.predict",
    "pretrain": "hpm.pretraining",
}
# Parts to build on (docs/library.md), which are modules.
_MODULES = {
    "losses": "hpm.mining.losses",
    "masking": "hpm.mining.masking",
    "mining": "hpm.mining",
}

__all__ = [
    "Drawing",
    "Embeddings",
    "ImageClusters",
    "Interrupted",
    "Run",
    "UserError",
    "__version__",
    "cluster",
    "embed",
    "evaluate",
    "export",
    "load_encoder",
    "load_model",
    "losses",
    "masking",
    "mining",
    "predict",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY and name not in _MODULES:
        raise AttributeError(f"module 'hpm' has no attribute '{name}'")
    state = random.getstate()  # libraries draw from it while they are imported
    value: Any
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    random.setstate(state)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

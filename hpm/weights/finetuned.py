"""Find and load fine-tuned models.

A model is one safetensors file. The `kind` in its JSON names the class that reads it; `KINDS` lists
them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from hpm.core.errors import UserError, counted
from hpm.core.files import read_tensors
from hpm.core.random_state import random_state_kept

# kind -> `module:class`, whose `from_file(path, tensors, about)` builds the model.
KINDS = {
    "hpm segmenter": "hpm.weights.segmentation:SegmentationModel",
    "hpm detector": "hpm.weights.detection:DetectionModel",
}
MODEL_FILES = ("segmenter.safetensors", "detector.safetensors")


def load_model(path: str | Path) -> Any:
    """A fine-tuned model in evaluation mode, with its preprocessing.

        model = hpm.load_model("runs/first/evals/segment_camvid/trained")
        mask = model.predict("street.jpg")                 # uint8 [H W], numbers into model.classes
        logits = model(model.preprocess("street.jpg"))     # [1 K h w]

        model = hpm.load_model("runs/first/evals/detect_coco/trained")
        found = model.predict("street.jpg")                # boxes, scores, classes, masks

    path: the file, or a folder that holds one such file, however deep (so a run folder as well).
    Raises UserError where there is none or more than one, or where the file is damaged.
    """
    with random_state_kept():
        return read_model(find_model(path))


def is_finetuned(path: str | Path) -> bool:
    """Whether the path is the file of a fine-tuned model or its folder (but not the run folder
    above it, whose backbone is meant)."""
    path = Path(path).expanduser()
    if path.is_dir():
        return any((path / name).is_file() for name in MODEL_FILES)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return read_tensors(path)[1].get("kind") in KINDS


def find_model(path: str | Path) -> Path:
    """The file of a fine-tuned model. Raises UserError unless the path names exactly one."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    found = sorted(file for name in MODEL_FILES for file in path.rglob(name))
    trained = [file for file in found if file.parent.name == "trained"]
    found = trained if len(trained) == 1 else found  # rather than a baseline beside it
    if not found:
        raise UserError(
            f"{path} holds no fine-tuned model ({' or '.join(MODEL_FILES)}): train one by hpm eval "
            "segment or detect"
        )
    if len(found) > 1:
        names = ", ".join(str(file.parent.relative_to(path)) for file in found)
        raise UserError(f"{path} holds {counted(len(found), 'model')}, name one of them: {names}")
    return found[0]


def read_model(path: Path) -> nn.Module:
    """Read a model of any kind."""
    tensors, about = read_tensors(path)
    kind = about.get("kind")
    if kind not in KINDS:
        raise UserError(
            f"{path}: kind is {kind!r}, not a fine-tuned model ({', '.join(KINDS)}); "
            "hpm.load_encoder reads backbones"
        )
    module, _, name = KINDS[kind].partition(":")
    try:
        return getattr(importlib.import_module(module), name).from_file(path, tensors, about)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None

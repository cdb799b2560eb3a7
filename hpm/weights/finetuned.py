"""Find and load fine-tuned models.

A model is one safetensors file. The `kind` in its JSON names the class that reads it; `KINDS` lists
them.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from hpm.core.errors import UserError, counted
from hpm.core.files import read_tensors
from hpm.core.hub import read_json
from hpm.core.options import AnyPath
from hpm.core.random_state import random_state_kept
from hpm.weights.resolve import other_library, read_states, require_recognised
from hpm.weights.shapes import complete
from hpm.weights.video_mae_classifier import read_classifier

# kind -> `module:class`, whose `from_file(path, tensors, about)` builds the model.
KINDS = {
    "hpm classifier": "hpm.weights.classification:ClassificationModel",
    "hpm segmenter": "hpm.weights.segmentation:SegmentationModel",
    "hpm detector": "hpm.weights.detection:DetectionModel",
}
MODEL_FILES = ("classifier.safetensors", "segmenter.safetensors", "detector.safetensors")


def load_model(path: AnyPath) -> Any:
    """A fine-tuned model in evaluation mode, with its preprocessing.

        model = hpm.load_model("runs/first/evals/segment_camvid/trained")
        mask = model.predict("street.jpg")                 # uint8 [H W], numbers into model.classes
        logits = model(model.preprocess("street.jpg"))     # [1 K h w]

        model = hpm.load_model("runs/first/evals/detect_coco/trained")
        found = model.predict("street.jpg")                # boxes, scores, classes, masks

        model = hpm.load_model("videomae-base-finetuned-kinetics")
        logits = model(model.normalize(clips))             # [B C T H W] -> [B K]

    path: the file, or a folder that holds one such file, however deep (so a run folder as well); or
    a folder with a VideoMAEForVideoClassification of Hugging Face.
    Raises UserError where there is none or more than one, or where the file is damaged.
    """
    with random_state_kept():
        return read_model(find_model(os.fspath(path)))


def is_finetuned(path: str | Path) -> bool:
    """Whether the path is the file of a fine-tuned model or its folder (but not the run folder
    above it, whose backbone is meant)."""
    path = Path(path).expanduser()
    if path.is_dir():
        return any((path / name).is_file() for name in MODEL_FILES)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return read_tensors(path, only=())[1].get("kind") in KINDS


def find_model(path: str | Path) -> Path:
    """The file of a fine-tuned model, or a folder of Hugging Face's. Raises UserError unless the
    path names exactly one."""
    path = Path(path).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    found = sorted(file for name in MODEL_FILES for file in path.rglob(name))
    # Rather than the baselines beside them.
    found = [file for file in found if file.parent.name == "trained"] or found
    if not found:
        raise UserError(
            f"{path} holds no fine-tuned model ({' or '.join(MODEL_FILES)}): train one by hpm eval "
            "finetune, segment or detect"
        )
    if len(found) > 1:
        names = ", ".join(str(file.parent) for file in found)
        raise UserError(f"{path} holds {counted(len(found), 'model')}, name one of them: {names}")
    return found[0]


def read_model(path: Path) -> nn.Module:
    """Read a model of any kind."""
    try:
        return _hugging_face_classifier(path) if path.is_dir() else _own_model(path)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _own_model(path: Path) -> nn.Module:
    """A model that `hpm eval` trained. Raises UserError if the file holds something else."""
    tensors, about = read_tensors(path)
    kind = about.get("kind")
    if kind not in KINDS:
        raise UserError(
            f"{path}: kind is {kind!r}, not a fine-tuned model ({', '.join(KINDS)}); "
            "hpm.load_encoder reads backbones"
        )
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name).from_file(path, tensors, about)


def _hugging_face_classifier(path: Path) -> nn.Module:
    """A VideoMAEForVideoClassification. Raises UserError if the folder holds something else."""
    config = read_json(path / "config.json")
    names = {int(number): str(name) for number, name in config.get("id2label", {}).items()}
    if "VideoMAEForVideoClassification" not in config.get("architectures", ()) or not names:
        raise UserError(
            f"{path}: no VideoMAEForVideoClassification, the classifier of Hugging Face that is "
            "known; hpm.load_encoder reads backbones"
        )
    if not config.get("use_mean_pooling", True):
        raise UserError(f"{path}: its head reads one token, not their mean, which is not supported")
    states = read_states(path)
    contents = other_library(path, states)
    require_recognised(contents)
    complete(contents)
    tensors = states[""]
    head = {part: tensors[f"classifier.{part}"] for part in ("weight", "bias")}
    return read_classifier(contents, head, [names[number] for number in sorted(names)])

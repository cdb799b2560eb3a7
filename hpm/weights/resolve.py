"""The run folder, and what can be read back from it (or from one of its files)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpm.core.config import TIMM, PretrainConfig, pair
from hpm.core.errors import UserError
from hpm.core.files import (
    TORCH_SUFFIXES,
    read_tensors,
    write_tensors,
    write_text,
)
from hpm.core.options import make_config
from hpm.core.random_state import random_state_kept
from hpm.core.version import __version__
from hpm.mining.miner import Miner, make_miner
from hpm.models.build import build_encoder, build_model, resized_encoder
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.targets.base import Target
from hpm.targets.registry import make_target
from hpm.weights.backbone import Backbone
from hpm.weights.checkpoint import load_checkpoint, load_exactly
from hpm.weights.run_folder import Run
from hpm.weights.third_party import Imported, import_model, import_timm

# What describes an encoder; the first and last only of timm's.
ENCODER_KEYS = (
    "model", "image_size", "patch_size", "channels", "embed_dim", "depth", "num_heads",
    "class_token",
)  # fmt: skip


@dataclass
class Trained:
    """A trained encoder, how its input is normalised, and, where they were kept (in a checkpoint,
    not in a backbone file), the whole model and its teacher."""

    name: str
    architecture: dict[str, Any]
    mean: list[float]
    std: list[float]
    encoder: Encoder
    model: MaskedImageModel | None = None
    teacher: MaskedImageModel | None = None
    config: PretrainConfig | None = None
    folder: Path | None = None
    step: int | None = None  # of the training, where it is known
    target: Target | None = None  # of a run that is in training; see `find_target`
    miner: Miner | None = None  # likewise; see `find_miner`
    notes: list[str] = field(default_factory=list)  # what was assumed of weights that are not ours

    def find_target(self, device: torch.device) -> Target:
        """What the model was trained to reconstruct. UserError where a part of it is not here."""
        assert self.config is not None
        if self.target is None:
            # The config comes from a file, so that nothing it names is fetched.
            self.target = make_target(
                self.config, self.architecture, self.mean, self.std, device, fetch=False
            )
        return self.target

    def find_miner(self) -> Miner:
        """What mined in training, or would go on to; without a memory, which a file of weights has
        of the training images alone."""
        assert self.config is not None and self.teacher is not None
        if self.miner is None:
            self.miner = make_miner(self.config, self.architecture, self.teacher)
        return self.miner

    def backbone(
        self,
        pool: str = "mean",
        teacher: bool = False,
        image_size: int | tuple[int, int] | None = None,
    ) -> Backbone:
        encoder = self.encoder
        if teacher:
            if self.teacher is None:
                raise UserError(f"{self.name} holds a backbone only, no teacher")
            encoder = self.teacher.encoder
        if image_size is not None:
            encoder = resized_encoder(self.architecture, encoder.state_dict(), pair(image_size))
        return Backbone(encoder, self.mean, self.std, pool)


def save_backbone(
    path: Path, encoder: Encoder, architecture: dict[str, Any], mean: list[float],
    std: list[float],
) -> None:  # fmt: skip
    """Write `backbone.safetensors` (timm's names) and the JSON that describes it."""
    about = {name: architecture[name] for name in ENCODER_KEYS if name in architecture}
    about |= {"mean": mean, "std": std, "kind": "hpm encoder", "hpm": __version__}
    if "model" not in architecture:
        about |= {"layer_norm_eps": 1e-6}
    write_tensors(path, encoder.state_dict(), about)
    write_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")


def load_encoder(
    path: str | Path,
    pool: str = "mean",
    teacher: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> Backbone:
    """The encoder of a run folder, a checkpoint or a backbone file, in evaluation mode.

    image_size (height, width) in pixels: other than that of the training, with its positions
    interpolated. Raises UserError where the path holds no encoder, or the size does not fit.
    """
    with random_state_kept():
        return load(path).backbone(pool, teacher, image_size).eval()


def load(path: str | Path) -> Trained:
    """Read a run folder (its latest checkpoint, else its backbone), a checkpoint, a backbone, or
    weights of others (see `hpm.weights.third_party`); `timm/NAME`: timm's own weights."""
    name, path = str(path), Path(path).expanduser()
    if not path.exists() and name.startswith(TIMM):
        return _of_others(name, import_timm(name))
    if not path.exists():
        raise UserError(f"{path}: no such run folder or file")
    run = Run(path)
    if path.is_dir() and not (path / "config.json").exists():
        file = run.latest_checkpoint() or (run.backbone if run.backbone.exists() else None)
        if file is None:
            raise UserError(f"{path}: holds no checkpoint and no backbone.safetensors")
        trained = load(file)
        trained.name, trained.folder = str(path), path
        return trained
    if path.is_dir() or path.suffix in TORCH_SUFFIXES:
        return _of_others(str(path), import_model(path))
    tensors, meta = read_tensors(path)
    if meta.get("kind") == "hpm encoder":
        encoder = build_encoder(meta)
        load_exactly(encoder, tensors, path)
        return Trained(str(path), meta, meta["mean"], meta["std"], encoder)
    if "step" not in meta:
        return _of_others(str(path), import_model(path))
    checkpoint = load_checkpoint(path)
    if "architecture" not in checkpoint.meta:
        raise UserError(f"{path} is of a fine-tuning: name the run that it started from")
    meta, architecture = checkpoint.meta, checkpoint.meta["architecture"]
    model, teacher = build_model(architecture), build_model(architecture)
    load_exactly(model, checkpoint.model, path)
    load_exactly(teacher, checkpoint.teacher, path)
    return Trained(
        str(path), architecture, meta["mean"], meta["std"], model.encoder, model, teacher,
        make_config(PretrainConfig, meta["config"]), step=meta["step"],
    )  # fmt: skip


def _of_others(name: str, found: Imported) -> Trained:
    return Trained(
        name, found.architecture, found.mean, found.std, found.encoder, found.model,
        found.teacher, found.config, notes=found.notes,
    )  # fmt: skip

"""Build the encoder, and the whole model if there is one, from a weights file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from hpm.core.choices import HARD_SHARES
from hpm.core.config import PretrainConfig, pair
from hpm.core.errors import UserError
from hpm.core.files import StateDict
from hpm.data.video.sampling import ClipSampling
from hpm.mining.miner import Miner, make_miner
from hpm.mining.strategies import find_mask
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder, build_model, resized_encoder
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.targets.base import Target
from hpm.targets.registry import make_target
from hpm.weights.backbone import Backbone
from hpm.weights.checkpoint import compare, differ, load_exactly
from hpm.weights.contents import Contents

Built = TypeVar("Built", bound=nn.Module)


@dataclass
class Trained:
    """A trained encoder and the normalisation of its input; from a checkpoint, also the whole model
    and its teacher."""

    name: str
    architecture: Architecture
    mean: list[float]
    std: list[float]
    encoder: Encoder
    model: MaskedImageModel | None = None
    teacher: MaskedImageModel | None = None
    config: PretrainConfig | None = None
    folder: Path | None = None
    step: int | None = None  # of the training, if known
    frame_stride: int | None = None  # of the clips that it was trained on, if known
    target: Target | None = None  # of a run in training; see `find_target`
    miner: Miner | None = None  # of a run in training; see `find_miner`
    notes: list[str] = field(
        default_factory=list
    )  # what was assumed about other libraries' weights

    def need_images(self, what: str) -> None:
        """Raise UserError for a model of clips."""
        if len(self.architecture.image_size) == 3:
            raise UserError(f"{what} is for images, but {self.name} is of clips")

    def sampling(
        self, frames: int | None = None, frame_stride: int | None = None
    ) -> ClipSampling | None:
        """The frames of a clip that the encoder sees; None for images.

        Args:
            frames: for an image encoder, whose features are pooled over them. Default: as trained.
            frame_stride: default: as trained, else that of `ClipSampling`.

        Raises UserError if an encoder of clips is trained on another number of frames.
        """
        size = self.architecture.image_size
        trained_on = size[0] if len(size) == 3 else None
        frames = frames or trained_on or 1
        if trained_on not in (None, frames):
            raise UserError(
                f"frames is {frames}, but {self.name} is of clips of {trained_on} frames: leave "
                "it out"
            )
        if frames == 1:
            return None
        strides = (frame_stride, self.frame_stride, ClipSampling().stride)
        return ClipSampling(frames, next(s for s in strides if s is not None))

    def find_target(self, device: torch.device) -> Target:
        """The target that the model was trained to reconstruct. Raises UserError if a part of it is
        not available."""
        assert self.config is not None
        if self.target is None:
            # The config comes from a file: do not download anything that it names.
            self.target = make_target(
                self.config, self.architecture, self.mean, self.std, device, fetch=False
            )
        return self.target

    def find_miner(self) -> Miner:
        """The miner of the training, without its memory, which covers the training images only.

        Raises UserError if its mask is of a module that is not imported yet.
        """
        assert self.config is not None and self.teacher is not None
        if self.miner is None:
            if self.config.mask not in HARD_SHARES:  # the config comes from a file
                find_mask(self.config.mask, trusted=False)
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
            size = (*self.architecture.image_size[:-2], *pair(image_size))
            encoder = resized_encoder(self.architecture, encoder.state_dict(), size)
        return Backbone(encoder, self.mean, self.std, pool)


def build(contents: Contents) -> Trained:
    """Build the models of a file whose architecture is known. Raises UserError if its tensors do
    not match."""
    architecture, path = contents.architecture, contents.path
    assert architecture and contents.mean and contents.std
    model = teacher = None
    if architecture.decoders is None:
        state = encoder_state(contents.student)
        encoder = _filled(lambda: build_encoder(architecture, seed=0), state, path, architecture)
    else:
        model = _filled(lambda: build_model(architecture), contents.student, path, architecture)
        encoder = model.encoder
        if contents.teacher is None:
            teacher = copy.deepcopy(model)
            contents.notes.append("the file has no teacher: the student is used in its place")
        else:
            teacher = _filled(
                lambda: build_model(architecture), contents.teacher, path, architecture
            )
    if len(architecture.image_size) == 3 and contents.frame_stride is None:
        contents.notes.append(f"its clips have a frame stride of {ClipSampling().stride} (assumed)")
    return Trained(
        contents.name,
        architecture,
        contents.mean,
        contents.std,
        encoder,
        model,
        teacher,
        contents.config,
        contents.folder,
        contents.step,
        contents.frame_stride,
        notes=contents.notes,
    )


def encoder_state(state: StateDict) -> StateDict:
    """The encoder's tensors, without the prefix `encoder.`."""
    prefix = "encoder."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _filled(
    make: Callable[[], Built], state: StateDict, path: Path, architecture: Architecture
) -> Built:
    """Load weights into a module. Raises UserError, naming the first missing or mismatched tensor.

    Our own models are compared before anything is allocated: names alone may claim any number of
    blocks. timm's are not, as they may compute buffers that no file holds.
    """
    if architecture.model is not None:
        module = make()
        load_exactly(module, state, path)
        return module
    try:
        with torch.device("meta"):
            module = make()
    except ValueError as error:
        raise UserError(f"{path}: of another architecture ({error})") from None
    problems = compare(module, state)
    if problems:
        raise UserError(f"{path}: of another architecture ({problems[0]}; {differ(problems)})")
    whole = {name: tensor.float().contiguous() for name, tensor in state.items()}
    module.load_state_dict(whole, assign=True)
    return module

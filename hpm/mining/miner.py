"""The miner: determines how hard each patch is, and which patches are hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpm.core.choices import Tubes
from hpm.core.config import PretrainConfig, secondary_mask_ratio
from hpm.core.errors import UserError
from hpm.core.phases import phase
from hpm.mining.draw import TEACHER_VIEW, TIES, WITHIN_UNITS, Draw
from hpm.mining.masking import choose_covered, choose_decoded, make_mask, num_hidden_patches
from hpm.mining.memory import HardnessMemory
from hpm.mining.strategies import AT_ALL_TIMES
from hpm.mining.teacher import (
    Images,
    PredictLoss,
    Signal,
    SmallTeacher,
    attention,
    predicted_losses,
    predicted_losses_masked,
    small_image_size,
)
from hpm.mining.units import unit_by_unit, unit_grid
from hpm.models.architecture import Architecture
from hpm.models.build import build_model
from hpm.models.mim import MaskedImageModel


class Seen(NamedTuple):
    """The training images of a batch, the crop of each (see `data.transforms.Crop`), and the times
    of clips."""

    image_ids: Int[Tensor, " batch"]
    crops: Float[Tensor, "batch 4"]
    times: Float[Tensor, "batch 2"] | None = None


class Mined(NamedTuple):
    """The mask for the student, and what the teacher computed."""

    visible_ids: Int[Tensor, "batch visible"]
    hidden_ids: Int[Tensor, "batch hidden"]
    decoded_ids: Int[Tensor, "batch decoded"]  # the hidden patches to reconstruct
    covered_ids: Int[Tensor, "batch covered"] | None
    features: Float[Tensor, "batch tokens dim"] | None
    signal: Signal | None  # None if the teacher did not run


@dataclass
class Miner:
    """Decides which patches are hidden (HPM, sections 3.3 and 3.4).

    Training, figures, hardness measures and the benchmark use the same miner.

    Args:
        teacher: the EMA model.
        mask: name of a mask, see `strategies.find_mask`.
        num_hidden: number of hidden patches, M.
        secondary_mask_ratio: share of the visible patches whose content is covered.
        temperature: of sampling the mined patches, see `masking.perturb`; 0 takes the hardest.
        unit: size of the units that are mined and hidden, in patches along each axis.
        tubes: whether the same places of a clip are hidden at all times, see `masking.make_mask`.
        decoder_keep: share of the hidden patches that are reconstructed.
        mine_by: the teacher's prediction, a memory of the student's losses, or their decrease.
        mine_every: steps between two teacher passes. In between, a memory of the predictions is
            used.
        teacher_view: whether the teacher sees full or masked images.
        small_teacher: predicts on smaller images instead.
        memory: memory of losses or predictions.
        needs_features: whether the target needs the teacher's features of full images.
        predict_loss: compiled `predict_loss` of the teacher.
    """

    teacher: MaskedImageModel
    mask: str
    num_hidden: int
    secondary_mask_ratio: float = 0.0
    temperature: float = 0.0
    unit: int = 1
    tubes: Tubes = "none"
    decoder_keep: float = 1.0
    mine_by: Literal["teacher", "memory", "progress"] = "teacher"
    mine_every: int = 1
    teacher_view: Literal["full", "masked"] = "full"
    small_teacher: SmallTeacher | None = None
    memory: HardnessMemory | None = None
    needs_features: bool = False
    predict_loss: PredictLoss | None = None

    @property
    def model(self) -> MaskedImageModel:
        """The model that predicts the losses."""
        return self.small_teacher.model if self.small_teacher else self.teacher

    def mine(
        self, images: Images, draw: Draw, num_hard: int, step: int = 0, seen: Seen | None = None
    ) -> Mined:
        """Hide the `num_hard` hardest patches of normalised images, and others at random.

        The teacher runs only if its result is used. A memory requires `seen`.
        """
        features = predicted = None
        mines = num_hard > 0
        with phase("teacher"):
            if mines and self.mine_by == "teacher" and step % self.mine_every == 0:
                features, predicted = self.signal(images, draw)
            if features is None and self.needs_features:
                features = self._features(images)
        device_type = "cpu" if images.is_meta else images.device.type  # meta: no autocast
        # In float32, so that a sample's mask is the same in each precision.
        with phase("mining"), torch.autocast(device_type, enabled=False):
            signal = predicted
            if mines and signal is None and self.memory is not None:
                assert seen is not None, "a memory needs to know which images these are"
                signal = self.memory.read(*seen)
                # Break ties at random: unknown regions have equal values. Progress is in units of
                # the loss, which may be small.
                scale = 1e-6 if self.mine_by == "progress" else 1e-3
                signal = signal + scale * draw.noise(signal.shape[1], TIES)
            visible_ids, hidden_ids = self.hide(draw, signal, num_hard)
            covered_ids = None
            if self.secondary_mask_ratio:
                num_patches = self.teacher.encoder.num_patches
                ratio = self.secondary_mask_ratio
                covered_ids = choose_covered(draw, visible_ids, ratio, num_patches)
            decoded_ids = self.decode(draw, hidden_ids)
        return Mined(visible_ids, hidden_ids, decoded_ids, covered_ids, features, predicted)

    def hide(
        self, draw: Draw, signal: Signal | None, num_hard: int, num_hidden: int | None = None
    ) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
        """(visible_ids, hidden_ids): the patches of the highest signal, and others at random."""
        num_hidden = self.num_hidden if num_hidden is None else num_hidden
        grid = self.teacher.encoder.grid
        return make_mask(
            self.mask,
            draw,
            grid,
            num_hidden,
            signal,
            num_hard,
            self.temperature,
            self.unit,
            self.tubes,
        )

    def decode(
        self, draw: Draw, hidden_ids: Int[Tensor, "batch hidden"]
    ) -> Int[Tensor, "batch decoded"]:
        """The hidden patches that are reconstructed."""
        if self.decoder_keep == 1:
            return hidden_ids
        return choose_decoded(draw, hidden_ids, self.decoder_keep, self.teacher.encoder.grid)

    def count_hidden(self, mask_ratio: float) -> int:
        """Number of hidden patches at a mask ratio."""
        return count_hidden(self.teacher, mask_ratio, self.tubes)

    def signal(
        self, images: Images, draw: Draw
    ) -> tuple[Float[Tensor, "batch tokens dim"] | None, Signal]:
        """(the teacher's features or None, hardness of each patch)."""
        if self.mask == "attention":
            return attention(self.teacher, images)
        return self.predicted_loss(images, draw)

    def predicted_loss(
        self, images: Images, draw: Draw
    ) -> tuple[Float[Tensor, "batch tokens dim"] | None, Signal]:
        """(the teacher's features of full images or None, its predicted loss of each patch)."""
        if self.small_teacher is not None:
            return None, self.small_teacher.predicted_losses(images, self.predict_loss)
        predict_loss = self.predict_loss or self.teacher.predict_loss
        if self.teacher_view == "masked":
            priority = self._teacher_view(draw)
            return None, predicted_losses_masked(predict_loss, images, priority, self.num_hidden)
        return predicted_losses(predict_loss, images)

    @torch.no_grad()
    def remember(self, seen: Seen, mined: Sequence[Mined], patch_loss: Sequence[Tensor]) -> None:
        """Write the teacher's predictions, or the student's losses of the reconstructed patches, of
        a batch given in parts, into the memory."""
        if self.memory is None:
            return
        ids, crops, times = seen
        predicted = [part.signal for part in mined if part.signal is not None]
        if predicted:
            hardness = torch.cat(predicted)
            patch_ids = torch.arange(hardness.shape[1], device=hardness.device)
            # The predictor learns only the order within images.
            patch_ids = patch_ids.expand_as(hardness)
            self.memory.write(ids, crops, patch_ids, hardness, times, per_image=True)
        elif self.mine_by != "teacher":
            decoded_ids = torch.cat([part.decoded_ids for part in mined])
            self.memory.write(ids, crops, decoded_ids, torch.cat(list(patch_loss)), times)

    def _teacher_view(self, draw: Draw) -> Float[Tensor, "batch patches"]:
        """Random priorities of the masks in the teacher's view."""
        grid = self.teacher.encoder.grid
        places = grid if self.tubes == "none" else grid[1:]
        priority = draw.noise(math.prod(unit_grid(places, self.unit)), TEACHER_VIEW)
        if self.unit > 1:
            noise = draw.noise(math.prod(places), WITHIN_UNITS)
            priority = unit_by_unit(priority, noise, places, self.unit)
        if self.tubes == "none":
            return priority
        rank = priority.argsort(dim=1).argsort(dim=1)  # no ties between places
        return rank.float().repeat(1, grid[0])

    @torch.no_grad()
    def _features(self, images: Images) -> Tensor:
        return self.teacher.encoder(images)


def count_hidden(model: MaskedImageModel, mask_ratio: float, tubes: Tubes) -> int:
    """Number of hidden patches at a mask ratio; the same at each time of a clip if `tubes`."""
    times = 1 if tubes == "none" else model.encoder.grid[0]
    return num_hidden_patches(model.encoder.num_patches, mask_ratio, times)


def tubes_of(config: PretrainConfig) -> Tubes:
    """Whether the same places of a clip are hidden at all times, and by what they are mined."""
    if config.frames > 1 and config.mine_tubes == "none" and config.mask in AT_ALL_TIMES:
        return "mean"  # nothing is mined
    return config.mine_tubes


def make_miner(
    config: PretrainConfig,
    architecture: Architecture,
    teacher: MaskedImageModel,
    memory: HardnessMemory | None = None,
    needs_features: bool = False,
) -> Miner:
    """The miner of a resolved config. Raises UserError if the encoder has no small teacher."""
    tubes = tubes_of(config)
    return Miner(
        teacher,
        config.mask,
        count_hidden(teacher, config.mask_ratio, tubes),
        secondary_mask_ratio=secondary_mask_ratio(config),
        temperature=config.mining_temperature,
        unit=config.mask_unit,
        tubes=tubes,
        decoder_keep=config.decoder_keep,
        mine_by=config.mine_by,
        mine_every=config.mine_every,
        teacher_view=config.teacher_view,
        small_teacher=_small_teacher(config, architecture, teacher),
        memory=memory,
        needs_features=needs_features,
    )


def _small_teacher(
    config: PretrainConfig, architecture: Architecture, teacher: MaskedImageModel
) -> SmallTeacher | None:
    if config.teacher_scale == 1:
        return None
    if teacher.encoder.pos_embed is None:
        raise UserError(
            f"teacher_scale is {config.teacher_scale}, but {config.model} has no positions "
            "that could be interpolated: leave it out"
        )
    size = small_image_size(architecture.image_size, architecture.patch_size, config.teacher_scale)
    small = build_model(replace(architecture, image_size=size))
    return SmallTeacher(teacher, small.to(next(teacher.parameters()).device))

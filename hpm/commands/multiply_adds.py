"""Count multiply-adds, such as those of a training step, with PyTorch's FLOP counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpm.core.choices import HARD_SHARES
from hpm.core.config import PretrainConfig
from hpm.mining.draw import Draw
from hpm.mining.miner import Mined, make_miner
from hpm.mining.teacher import Teacher
from hpm.models.architecture import Architecture
from hpm.models.build import build_model
from hpm.models.linear import ONEDNN
from hpm.targets.registry import make_target

META = torch.device("meta")
Result = TypeVar("Result")


def step_multiply_adds(architecture: Architecture, config: PretrainConfig) -> float:
    """Multiply-adds per image and step: the sum of `multiply_adds_of_parts`."""
    return sum(multiply_adds_of_parts(architecture, config))


def multiply_adds_of_parts(
    architecture: Architecture, config: PretrainConfig
) -> tuple[float, float]:
    """Multiply-adds per image and step of (the miner's teacher pass, averaged over `mine_every`
    steps; the target and the student's forward and backward passes).

    The model runs on PyTorch's meta device, without computing or allocating anything.
    """
    channels, size = architecture.channels, architecture.image_size
    target = make_target(config, architecture, [0.0] * channels, [1.0] * channels, META)
    with META:
        model = build_model(architecture).to(META)
        teacher = Teacher(model).model
        miner = make_miner(config, architecture, teacher, needs_features=target.needs_teacher)
        images, draw = torch.empty(1, channels, *size), Draw(0, 0, torch.zeros(1).long())
    num_hard = 1 if config.mask in HARD_SHARES else 0  # the cost does not depend on the number

    def learn(mined: Mined) -> None:
        with torch.no_grad():
            target(images, mined.features)
        outputs = model(images, mined.visible_ids, mined.decoded_ids, mined.covered_ids)
        sum(output.sum() for output in outputs if output is not None).backward()

    mining, mined = count_multiply_adds(lambda: miner.mine(images, draw, num_hard))
    if config.mine_every > 1:
        between, _ = count_multiply_adds(lambda: miner.mine(images, draw, num_hard=0))
        mining = (mining + (config.mine_every - 1) * between) / config.mine_every
    learning, _ = count_multiply_adds(lambda: learn(mined))
    return mining, learning


def count_multiply_adds(run: Callable[[], Result]) -> tuple[float, Result]:
    """(multiply-adds of its matrix products and convolutions, result of `run`)."""
    # PyTorch counts matrix products; the math backend computes attention with them. It does not
    # know oneDNN's, which our linear layers use on a CPU.
    known = {} if ONEDNN is None else {ONEDNN: _onednn_flops}
    with (
        FlopCounterMode(display=False, custom_mapping=known) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        result = run()
    return counter.get_total_flops() / 2, result


def _onednn_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of shapes [... in] and [out in]."""
    return 2 * prod(x) * weight[0]

"""Count the multiply-adds of a training step with PyTorch's FLOP counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpm.core.config import HARD_SHARES, PretrainConfig
from hpm.mining.draw import Draw
from hpm.mining.miner import Mined, make_miner
from hpm.mining.teacher import Teacher
from hpm.models.architecture import Architecture
from hpm.models.build import build_model
from hpm.targets.registry import make_target

META = torch.device("meta")
Result = TypeVar("Result")


def step_multiply_adds(architecture: Architecture, config: PretrainConfig) -> float:
    """Multiply-adds per image and step: the miner's teacher pass, the target, and the student's
    forward and backward passes, averaged over `mine_every` steps.

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

    mining, mined = _count(lambda: miner.mine(images, draw, num_hard))
    if config.mine_every > 1:
        between, _ = _count(lambda: miner.mine(images, draw, num_hard=0))
        mining = (mining + (config.mine_every - 1) * between) / config.mine_every
    learning, _ = _count(lambda: learn(mined))
    return mining + learning


def _count(run: Callable[[], Result]) -> tuple[float, Result]:
    """(multiply-adds, result of `run`)."""
    # PyTorch counts matrix products; the math backend computes attention with them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return counter.get_total_flops() / 2, result

"""Multiply-adds of a training step, counted by PyTorch on tensors without values."""

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
    """Per image and step: what the miner asks of the teacher, the target, and the student's forward
    and backward pass. The mean over the steps from one prediction of the teacher to the next.

    The model runs on PyTorch's meta device: nothing is computed, and no memory is taken.
    """
    channels, size = architecture.channels, architecture.image_size
    target = make_target(config, architecture, [0.0] * channels, [1.0] * channels, META)
    with META:
        model = build_model(architecture).to(META)
        teacher = Teacher(model).model
        miner = make_miner(config, architecture, teacher, needs_features=target.needs_teacher)
        images, draw = torch.empty(1, channels, *size), Draw(0, 0, torch.zeros(1).long())
    num_hard = 1 if config.mask in HARD_SHARES else 0  # how many does not change the cost

    def learn(mined: Mined) -> None:
        with torch.no_grad():
            target(images, mined.features)
        outputs = model(images, mined.visible_ids, mined.hidden_ids, mined.covered_ids)
        sum(output.sum() for output in outputs if output is not None).backward()

    mining, mined = _count(lambda: miner.mine(images, draw, num_hard))
    if config.mine_every > 1:
        between, _ = _count(lambda: miner.mine(images, draw, num_hard=0))
        mining = (mining + (config.mine_every - 1) * between) / config.mine_every
    learning, _ = _count(lambda: learn(mined))
    return mining + learning


def _count(run: Callable[[], Result]) -> tuple[float, Result]:
    """(multiply-adds, what `run` returns)."""
    # PyTorch counts matrix products, and attention in this backend is made of them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return counter.get_total_flops() / 2, result

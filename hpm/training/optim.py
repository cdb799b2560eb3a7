"""Optimiser, parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from hpm.models.encoder import Encoder

# Parameter names in our encoders and timm's.
TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed", "rope")
FREQUENCIES = "rope.freqs"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: with weight decay (matrices, tokens), and without (1-D parameters such as biases
    and norms, and RoPE frequencies)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(FREQUENCIES)]
    other = [p for name, p in trained if p.ndim <= 1 or name.endswith(FREQUENCIES)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    layer_decay: float = 1.0,
    freezes: bool = False,
) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`, or over `layer_decay_groups` if the encoder has learning
    rates of its own.

    freezes: the encoder is frozen for a while, see `scale_encoder`.
    """
    if layer_decay == 1 and not freezes:
        groups = parameter_groups(model, weight_decay)
    else:
        groups = layer_decay_groups(model, lr, layer_decay, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def scale_encoder(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Multiply the encoder's learning rates in `layer_decay_groups` by `share`; at 0, freeze it:
    without gradients, its weights and their moments stay as they are.

    The gradients are dropped rather than not computed, because DDP and FSDP2 expect the same ones
    in every step.
    """
    for group in optimizer.param_groups:
        if "encoder_scale" not in group:
            continue
        group["lr_scale"] = group["encoder_scale"] * share
        if share == 0:
            for parameter in group["params"]:
                parameter.grad = None


def layer_decay_groups(
    model: nn.Module, lr: float, layer_decay: float, weight_decay: float
) -> list[dict]:
    """Parameter groups with layer-wise learning rate decay (BEiT; MAE, appendix A.1; ViTDet).

    The top layer, at `lr`, is everything outside of the encoder (heads, pyramids) and the encoder's
    final norm. Each block below is scaled by a further factor `layer_decay`; tokens, positions and
    patch projection are the lowest layer. No weight decay on 1-D parameters, prefix tokens and
    positions. Each group has an `lr_scale`, those of the encoder also as `encoder_scale`.

    Raises ValueError unless the model has one encoder.
    """
    encoders = [(n, m) for n, m in model.named_modules() if isinstance(m, Encoder)]
    if len(encoders) != 1:
        raise ValueError(f"layer decay needs a model with one encoder, not {len(encoders)}")
    [(prefix, encoder)] = encoders
    inside = f"{prefix}." if prefix else ""
    top = len(encoder.blocks) + 1
    groups: dict[tuple[int, float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays, in_encoder = top, parameter.ndim > 1, name.startswith(inside)
        if in_encoder:
            name = name.removeprefix(inside)
            if name.startswith("blocks."):
                layer = int(name.split(".")[1]) + 1
            elif name.startswith((*TOKENS, "patch_embed", "norm_pre")):
                layer = 0
            decays = decays and not name.startswith(TOKENS)
        scale, decay = layer_decay ** (top - layer), weight_decay if decays else 0.0
        group = groups.setdefault(
            (layer, decay, in_encoder),
            {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
            | ({"encoder_scale": scale} if in_encoder else {}),
        )
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(
    step: float, total_steps: float, warmup_steps: float, peak: float, minimum: float = 0.0
) -> float:
    """Linear warm-up from 0 to `peak`, then cosine decay to `minimum`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1e-12, total_steps - warmup_steps))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def constant_learning_rate(
    step: float, total_steps: float, warmup_steps: float, cooldown_steps: float, peak: float
) -> float:
    """Linear warm-up from 0 to `peak`, `peak`, then a linear cooldown to 0 (Hu et al. 2024, arXiv
    2404.06395, section 4)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * min(1.0, (total_steps - step) / max(1.0, cooldown_steps))


def step_learning_rate(
    step: float, warmup_steps: float, peak: float, milestones: Sequence[float], factor: float
) -> float:
    """Linear warm-up from 0.001 of `peak`, then `peak` multiplied by `factor` at each milestone,
    which are numbers of steps (the schedule of ViTDet)."""
    if step < warmup_steps:
        return peak * (0.001 + 0.999 * step / warmup_steps)
    return peak * factor ** sum(step >= milestone for milestone in milestones)


def polynomial_rate(
    step: float,
    total_steps: float,
    warmup_steps: float,
    peak: float,
    power: float = 1.0,
    start: float = 0.0,
    minimum: float = 0.0,
) -> float:
    """Linear warm-up from `start` to `peak`, then (1 - progress)^power down to `minimum`."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1e-12, total_steps - warmup_steps))
    return minimum + (peak - minimum) * (1 - progress) ** power


def ema_decay(step: float, horizon_start: float, horizon_end: float, ramp_steps: float) -> float:
    """The teacher's EMA decay, increasing linearly over the first `ramp_steps`.

    A horizon is the time constant of the average in steps: decay = 1 - 1 / horizon. The paper's
    0.999 -> 0.9999 correspond to horizons of 1,000 and 10,000 steps.
    """
    start, end = 1 - 1 / max(1.0, horizon_start), 1 - 1 / max(1.0, horizon_end)
    return start + min(1.0, step / max(1.0, ramp_steps)) * (end - start)

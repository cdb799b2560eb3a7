"""Shard student and teacher over the processes (FSDP2, `--shard`).

Applied once, between building the models and the optimiser. Without `--shard`, several processes
each hold whole models (`hpm.core.distributed.data_parallel`).
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from hpm.core.config import PretrainConfig
from hpm.core.shards import copy_whole, device_mesh, local
from hpm.models.initial import draw_weights
from hpm.models.mim import MaskedImageModel


def shard(
    student: MaskedImageModel,
    teacher: MaskedImageModel,
    config: PretrainConfig,
    device: torch.device,
    draw: bool,
) -> None:
    """Shard two equal models in place, and allocate the shards of parameters that are on the meta
    device.

    draw: also draw the initial weights of these, which are those that `build_model` draws. Without
        it, the weights must be loaded.
    """
    # Nothing changes the outputs of a model in place, which this warns against.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    empty = copy.deepcopy(student)
    mesh = device_mesh(device, config.shard_within == "node")
    for model in (student, teacher):
        _shard_modules(model, mesh)
        for module in model.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
    if draw:
        parameters = dict(student.named_parameters())
        draw_weights(empty, config.seed, lambda name, value: copy_whole(parameters[name], value))
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            local(mine).copy_(local(theirs))
    for model in (student, teacher):
        _make_root(model)


def _shard_modules(model: MaskedImageModel, mesh: DeviceMesh) -> None:
    """Shard each block, the rest of the encoder, and the rest of the model, each of which is
    gathered when it runs and dropped afterwards."""
    blocks = list(model.encoder.blocks)
    for decoder in (model.reconstructor, model.predictor):
        blocks += [] if decoder is None else list(decoder.blocks)
    for module in (*blocks, model.encoder, model):
        # By default, the outermost module would keep what a pass without a backward pass gathers.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for block in blocks:
        _also_runs(block, "attention_of_first_tokens")
    _also_runs(model.encoder, "with_attention")
    _also_runs(model, "predict_loss")


def _also_runs(module: nn.Module, method: str) -> None:
    """Gather the parameters of a module for this method as for `forward`."""
    if hasattr(module, method):
        register_fsdp_forward_method(module, method)


def _make_root(model: MaskedImageModel) -> None:
    """Let PyTorch know the outermost module: it takes the first that runs, which would be the
    encoder if features are computed first."""

    def nothing() -> None:
        pass

    model.become_root = nothing  # type: ignore[assignment]
    register_fsdp_forward_method(model, "become_root")
    model.become_root()  # type: ignore[operator]
    del model.become_root

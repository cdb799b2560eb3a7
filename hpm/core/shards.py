"""Tensors of which each process holds a shard: parameters under FSDP2 (`--shard`).

Each function takes ordinary tensors as well. `whole` and `whole_state` communicate: all processes
must call them, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpm.core import distributed
from hpm.core.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def device_mesh(device: torch.device, within_node: bool) -> DeviceMesh:
    """The processes along which tensors are sharded: all of them, or those of each node, between
    which the shards are replicated.

    Raises UserError if the nodes have different numbers of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    count, here = distributed.world_size(), distributed.processes_here()
    if not within_node:
        return init_device_mesh(device.type, (count,))
    if any(number != here for number in distributed.gather(here)):
        raise UserError("shard_within node needs equally many processes on each node: leave it out")
    return init_device_mesh(
        device.type, (count // here, here), mesh_dim_names=("replicated", "sharded")
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a shard of the tensor."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, which shares its memory with the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process. Communicates."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_state(module: nn.Module, only_main: bool = False) -> dict[str, Tensor]:
    """The state dict of a module, of whole tensors on the CPU. Communicates.

    only_main: return it in the main process, and nothing in the others.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        found = whole(tensor).detach()
        if distributed.is_main() or not only_main:
            state[name] = found.cpu()
    return state


@torch.no_grad()
def copy_whole(destination: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, of which all processes have an equal one, into a tensor that may be
    sharded."""
    if is_sharded(destination):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = destination.device_mesh, destination.placements  # type: ignore[attr-defined]
        source = source.to(destination.device, destination.dtype)
        # src_data_rank None: every process takes its part of its own copy.
        source = distribute_tensor(source, mesh, placements, src_data_rank=None)
    destination.copy_(source)

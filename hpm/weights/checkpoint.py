"""Write, read and prune checkpoints.

A checkpoint is one safetensors file: tensors under `model.`, `teacher.`, `optimizer.`, `memory.`
and `rng.`, everything else as JSON in the file's header. That of a sharded run is a folder with the
same contents, see `hpm.weights.sharded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.files import StateDict, check_meta, read_meta, read_tensors, remove, write_tensors
from hpm.weights.sharded import read_into, read_sharded, tensor_shapes

FILE, FOLDER = ".safetensors", ".sharded"  # suffixes of checkpoints


@dataclass
class Checkpoint:
    """Everything that is needed to resume a run."""

    path: Path
    model: StateDict
    teacher: StateDict
    optimizer: StateDict
    memory: StateDict
    rng: StateDict
    meta: dict[str, Any]  # step, config, architecture, statistics, unreadable images, ...


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    keep: int,
    memory: nn.Module | None = None,
) -> Path:
    """Write `step_00001234.safetensors` and remove all but the latest `keep`."""
    path = folder / f"step_{meta['step']:08d}.safetensors"
    write_checkpoint(path, model, teacher, optimizer, meta, memory)
    prune(folder, keep)
    return path


def prune(folder: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints."""
    for old in list_checkpoints(folder)[:-keep]:
        remove(old)


def write_checkpoint(
    path: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    memory: nn.Module | None = None,
) -> None:
    """Write everything that is needed to resume, including the state of the global generator.

    Only the training may draw from that generator (data loaders have their own), so that its state
    does not depend on interruptions.
    """
    write_tensors(path, checkpoint_tensors(model, teacher, optimizer, memory), meta)


def checkpoint_tensors(
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    memory: nn.Module | None = None,
) -> StateDict:
    """The tensors of a checkpoint. Of sharded models, they are sharded."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if teacher is not None:
        tensors |= {f"teacher.{name}": t for name, t in teacher.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}|{kind}"] = value
    if memory is not None:
        tensors |= {f"memory.{name}": t for name, t in memory.state_dict().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # else no GPU was used; to ask it would start its driver
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        tensors["rng.mps"] = torch.mps.get_rng_state()
    return tensors


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, files and folders, oldest first."""
    return sorted([*folder.glob(f"step_*{FILE}"), *folder.glob(f"step_*{FOLDER}")])


def step_of(path: Path) -> int:
    """The step in the name of one of `list_checkpoints`."""
    return int(path.stem.removeprefix("step_"))


def read_checkpoint(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """Whole tensors and metadata of a checkpoint, a file or a folder. Raises UserError if it is
    damaged."""
    return read_sharded(path) if path.is_dir() else read_tensors(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises UserError if it is damaged or is not a checkpoint."""
    return parse_checkpoint(path, *read_checkpoint(path))


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint without its tensors, which `restore_sharded` reads."""
    return Checkpoint(path, {}, {}, {}, {}, {}, meta=read_meta(path))


def restore_sharded(
    checkpoint: Checkpoint,
    model: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    memory: nn.Module | None = None,
) -> None:
    """Restore what `restore` does in models that are sharded, whatever wrote the checkpoint. All
    processes call it."""
    path = checkpoint.path
    # A thousand processes would open a thousand shards each.
    found = distributed.main_first(lambda: tensor_shapes(path))
    modules = {"model": model, "teacher": teacher} | ({"memory": memory} if memory else {})
    into: StateDict = {}
    for part, module in modules.items():
        require_same(module, _under(part, found), path)
        into |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    parameters = dict(model.named_parameters())
    for name, like in _under("optimizer", found).items():
        parameter_name, _, kind = name.partition("|")
        parameter = parameters[parameter_name]
        # Moments are sharded as the parameter is; step counters are whole.
        value = (
            torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            if like.shape == parameter.shape
            else torch.zeros(like.shape, dtype=torch.float32, device=parameter.device)
        )
        optimizer.state[parameter][kind] = into[f"optimizer.{name}"] = value
    rng = {name: torch.empty_like(t, device="cpu") for name, t in _under("rng", found).items()}
    read_into(path, into | {f"rng.{name}": t for name, t in rng.items()})
    _restore_generators(rng)


def _under(part: str, tensors: StateDict) -> StateDict:
    """The tensors of a part, without its name."""
    prefix = f"{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def parse_checkpoint(path: Path, tensors: StateDict, meta: dict[str, Any]) -> Checkpoint:
    """Split the tensors of a checkpoint into its parts. Raises UserError if it is not one."""
    check_meta(path, meta)
    parts: dict[str, StateDict] = {
        "model": {},
        "teacher": {},
        "optimizer": {},
        "memory": {},
        "rng": {},
    }
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return Checkpoint(path, **parts, meta=meta)


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    memory: nn.Module | None = None,
) -> None:
    """Restore model, teacher, optimiser, memory and random generators."""
    load_exactly(model, checkpoint.model, checkpoint.path)
    if teacher is not None:
        load_exactly(teacher, checkpoint.teacher, checkpoint.path)
    if memory is not None:
        load_exactly(memory, checkpoint.memory, checkpoint.path)
    parameters = dict(model.named_parameters())
    for name, value in checkpoint.optimizer.items():
        parameter_name, _, kind = name.partition("|")
        parameter = parameters[parameter_name]
        # Fused AdamW needs its step counters in float32 on the parameter's device.
        optimizer.state[parameter][kind] = value.to(parameter.device, torch.float32)
    _restore_generators(checkpoint.rng)


def _restore_generators(states: StateDict) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def load_exactly(module: nn.Module, state: StateDict, path: Path) -> None:
    """Load a state dict. Raises UserError, naming the first difference in names or shapes."""
    require_same(module, state, path)
    module.load_state_dict(state)


def require_same(module: nn.Module, state: StateDict, path: Path) -> None:
    """Raise UserError, naming the first difference, unless a state dict has the module's names and
    shapes."""
    problems = compare(module, state)
    if problems:
        raise UserError(f"{path}: of another architecture ({problems[0]}; {differ(problems)})")


def differ(problems: list[str]) -> str:
    """`1 tensor differs`, `2 tensors differ`."""
    return "1 tensor differs" if len(problems) == 1 else f"{len(problems)} tensors differ"


def compare(module: nn.Module, state: StateDict) -> list[str]:
    """The differences between a module's tensors and a state dict, one line each."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not known" for name in state if name not in own]
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            problems.append(f"{name} is {shapes}")
    return problems

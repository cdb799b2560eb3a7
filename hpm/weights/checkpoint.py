"""Files of tensors: written atomically, loaded without executing anything, and pruned.

A checkpoint is one safetensors file: the tensors under `model.`, `teacher.`, `optimizer.` and
`rng.`, everything else as JSON in the file's header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpm.core.errors import UserError, counted
from hpm.core.files import State, check_meta, read_tensors, write_tensors


@dataclass
class Checkpoint:
    """Everything that a run needs to go on."""

    path: Path
    model: State
    teacher: State
    optimizer: State
    memory: State
    rng: State
    meta: dict[str, Any]  # step, config, architecture, statistics, what could not be read ...


def save_checkpoint(
    folder: Path, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer,
    meta: dict[str, Any], keep: int, memory: nn.Module | None = None,
) -> Path:  # fmt: skip
    """Write `step_00001234.safetensors` and remove all but the latest `keep`."""
    path = folder / f"step_{meta['step']:08d}.safetensors"
    write_checkpoint(path, model, teacher, optimizer, meta, memory)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def write_checkpoint(
    path: Path, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer,
    meta: dict[str, Any], memory: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write everything that training goes on from.

    That includes the state of the global random generator. It is the same however often the run was
    interrupted: only the training itself may draw from that generator, loaders have their own.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if teacher is not None:
        tensors |= {f"teacher.{name}": t for name, t in teacher.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}|{kind}"] = value
    if memory is not None:
        tensors |= {f"memory.{name}": t for name, t in memory.state_dict().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, meta)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.safetensors"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whole. Raises UserError where the file is not one, or is damaged."""
    tensors, meta = read_tensors(path)
    check_meta(path, meta)
    parts: dict[str, State] = {
        "model": {}, "teacher": {}, "optimizer": {}, "memory": {}, "rng": {},
    }  # fmt: skip
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return Checkpoint(path, **parts, meta=meta)


def restore(
    checkpoint: Checkpoint, model: nn.Module, teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer, memory: nn.Module | None = None,
) -> None:  # fmt: skip
    """Put everything back where it was."""
    load_exactly(model, checkpoint.model, checkpoint.path)
    if teacher is not None:
        load_exactly(teacher, checkpoint.teacher, checkpoint.path)
    if memory is not None:
        load_exactly(memory, checkpoint.memory, checkpoint.path)
    parameters = dict(model.named_parameters())
    for name, value in checkpoint.optimizer.items():
        parameter_name, _, kind = name.partition("|")
        parameter = parameters[parameter_name]
        # The fused kernel wants its step counters in float32 beside the parameter.
        optimizer.state[parameter][kind] = value.to(parameter.device, torch.float32)
    torch.set_rng_state(checkpoint.rng["cpu"])
    if "cuda" in checkpoint.rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint.rng["cuda"])


def load_exactly(module: nn.Module, state: State, path: Path) -> None:
    """Load a state of the same names and shapes; UserError names the first that differs."""
    problems = compare(module, state)
    if problems:
        raise UserError(f"{path}: of another architecture ({problems[0]}; {differ(problems)})")
    module.load_state_dict(state)


def differ(problems: list[str]) -> str:
    """How many tensors do."""
    return "1 tensor differs" if len(problems) == 1 else f"{len(problems)} tensors differ"


def load_initial(
    model: nn.Module, state: State, path: Path, partial: bool, unused: Sequence[str] = ()
) -> str:
    """Start from other weights: says how many tensors matched; refuses a partial load unless asked.

    unused: further tensors of the file, to be named as left over.

    A backbone file, whose names lack the `encoder.` in front, is an encoder without decoders.
    """
    own = model.state_dict()
    if "encoder.patch_embed.proj.weight" in own and "patch_embed.proj.weight" in state:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    matching = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    summary = f"{len(matching)} of {counted(len(own), 'tensor')} matched {path} "
    summary += f"({_by_part(own, matching)})"
    left = [*unused, *[name for name in state if name not in matching]]
    summary += f", {len(left)} left over: {_some(left)}" if left else ""
    if not matching:
        raise UserError(f"init: {summary}; it holds no weights of such a model")
    if len(matching) < len(own):
        missing = [n for n in own if n not in matching]
        summary += f", {len(missing)} not, the first {missing[0]}"
        if not partial:
            raise UserError(f"init: {summary}; pass --init-partial to start from those alone")
    model.load_state_dict(matching, strict=False)
    return summary


def _by_part(own: State, matching: State) -> str:
    """How many tensors of each part matched: `encoder 52 of 52, predictor none of 16`."""
    counts: dict[str, list[int]] = {}
    for name in own:
        count = counts.setdefault(name.partition(".")[0], [0, 0])
        count[0] += name in matching
        count[1] += 1
    return ", ".join(f"{part} {n or 'none'} of {total}" for part, (n, total) in counts.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def compare(module: nn.Module, state: State) -> list[str]:
    """What differs between a module's tensors and a state, a line each."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not known" for name in state if name not in own]
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            problems.append(f"{name} is {shapes}")
    return problems

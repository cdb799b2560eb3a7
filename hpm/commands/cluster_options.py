"""Options of `hpm ray VERB` and `hpm slurm VERB`: those of the verb and of the cluster."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hpm.commands.embedding_options import EmbedConfig
from hpm.commands.options import PrepareConfig
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.options import option

Config = TypeVar("Config")


@dataclass
class RayOptions:
    """Ray."""

    processes: int | None = option(None, at_least=1, main=True)
    """Number of processes (default: one per GPU of the cluster, or per --cpus-per-process)."""
    cpus_per_process: int = option(1, at_least=1, main=True)
    """CPUs of a process: one computes, and the others load images unless --workers is given."""


@dataclass
class SlurmOptions:
    """Slurm."""

    nodes: int = option(1, at_least=1, main=True)
    """Number of nodes."""
    gpus_per_node: int = option(0, at_least=0, main=True)
    """GPUs of each node, with one process each; 0 for a single process on each node's CPUs."""
    cpus_per_process: int = option(8, at_least=1, main=True)
    """CPUs of each process."""
    time: str = option("24h", main=True)
    """Time limit, such as 4h or 1d12h."""
    partition: str | None = option(None, main=True)
    """Partition of the cluster."""
    max_timeouts: int = option(20, at_least=0)
    """How often the job may come back after its time limit."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, as name=value,name=value."""
    cluster: Literal["auto", "slurm", "local"] = "auto"
    """Where to run: on Slurm, or on this machine (local), to try it; auto is Slurm where there is
    one."""


@dataclass
class RayPretrainConfig(RayOptions, PretrainConfig):
    """Pre-train on a Ray cluster, whose nodes see data and run folder under the same paths. Run the
    same command again to resume."""

    max_failures: int = option(3, at_least=0, main=True)
    """How often the processes are started again after a failure."""


@dataclass
class RayPrepareConfig(RayOptions, PrepareConfig):
    """Shrink images (see `hpm prepare`) on a Ray cluster, whose nodes see both folders under the
    same paths."""


@dataclass
class RayEmbedConfig(RayOptions, EmbedConfig):
    """Write the features of images (see `hpm embed`) on a Ray cluster, whose nodes see weights,
    images and result under the same paths."""


@dataclass
class SlurmPretrainConfig(SlurmOptions, PretrainConfig):
    """Submit a pre-training to Slurm. It saves and goes back into the queue before its time limit,
    and when it is preempted."""


@dataclass
class SlurmEmbedConfig(SlurmOptions, EmbedConfig):
    """Submit `hpm embed` to Slurm. It goes back into the queue at its time limit, and when it is
    preempted."""


def of_verb(config: Any, cls: type[Config]) -> Config:
    """The options of the verb itself."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def pairs(texts: tuple[str, ...]) -> dict[str, str]:
    """`name=value` texts. Raises UserError for another one."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"sbatch is '{text}': write it as name=value")
        found[name.strip()] = value.strip()
    return found

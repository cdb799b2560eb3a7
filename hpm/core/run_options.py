"""The options of `hpm pretrain` about the machine, and about what is logged, measured and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.core.choices import DeviceName, TrackerName
from hpm.core.options import option


@dataclass
class MachineOptions:
    """Hardware and data loading."""

    device: DeviceName = option("auto", may_change=True)
    """Device to train on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the passes; auto is bfloat16 on a GPU that has it (NVIDIA's since Ampere), else
    float32."""
    compile: Literal["auto", "true", "false"] = option("auto", may_change=True)
    """Compile student and teacher with torch.compile; auto compiles on a GPU only."""
    checkpoint_activations: bool = option(False, may_change=True)
    """Recompute the blocks' activations in the backward pass: less memory, about a third more
    time."""
    shard: bool = option(False, may_change=True)
    """Share weights, gradients and optimiser states among the processes of torchrun (FSDP2), for
    models that do not fit into one GPU. Checkpoints become folders, written in the background."""
    shard_within: Literal["all", "node"] = option("all", may_change=True)
    """Processes among which --shard shares a model: all, or those of each node, so that nodes only
    exchange gradients."""
    workers: int | None = option(None, at_least=0, may_change=True)
    """Number of processes that load images (default: one per spare core, at most 16)."""
    cache: Literal["auto", "true", "false"] = option("auto", may_change=True)
    """Keep decoded images in memory shared by the workers; auto does so if they fit into a quarter
    of the available memory. Does not change the training images."""


@dataclass
class RecordOptions:
    """Logging, evaluation and checkpoints."""

    log_every: int = option(10, at_least=1, may_change=True)
    """Number of steps between log entries."""
    tracker: TrackerName = option("none", may_change=True)
    """Also log to Weights & Biases or MLflow (`pip install 'hpm-vision[wandb]'` or
    `'hpm-vision[mlflow]'`), configured by their environment variables."""
    eval_every: str = option("10%", duration=True, above=0, may_change=True)
    """Interval between measurements and figures on the held-out images."""
    probe: str | None = option(None, may_change=True)
    """Labelled images (see eval) to probe the features on during training, by kNN and a linear
    probe. A fifth of the training split is used for scoring; the best checkpoint is kept."""
    probe_every: str = option("20%", duration=True, above=0, may_change=True)
    """Interval between probes."""
    checkpoint_every: str = option("5%", duration=True, above=0, may_change=True)
    """Interval between checkpoints."""
    keep_checkpoints: int = option(2, at_least=1, may_change=True)
    """Number of latest checkpoints to keep."""

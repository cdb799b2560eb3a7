"""Whether a run may go on: with the options and the data that it began with, however and wherever
they are written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpm.config import FREE_OPTIONS, TIMM, PretrainConfig, pair
from hpm.data.fingerprint import Fingerprint, differing
from hpm.errors import UserError, counted
from hpm.schedule import duration_steps, num_steps

SIZES = ("image_size", "patch_size")
PATHS = ("data", "init", "codebook", "target_model")
NAMES = (TIMM, "hf/")  # of models, that are no paths
DURATIONS = ("warmup", "ema_horizon_start", "ema_horizon_end", "ema_ramp")


def check_options(folder: Path, before: dict[str, Any], config: PretrainConfig, count: int) -> None:
    """UserError for the first option that means something else than it did.

    before: the options of config.yaml; one that it lacks is of a later version, and not compared.
    count: training images. Where the data lie is no matter here: see `check_data`.
    """
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    batch_size = config.global_batch_size
    total = num_steps(config, batch_size, count)

    def steps(duration: str) -> float:
        return duration_steps(duration, total, count // batch_size)

    free = FREE_OPTIONS | {"data"}
    length = (before.get("steps") or before.get("epochs", 0) * (count // batch_size)) or total
    if length == total:  # whether it was given in epochs or in steps
        free |= {"steps", "epochs"}
    for name, value in now.items():
        if name in free or name not in before:
            continue
        if meaning(name, before[name], steps) != meaning(name, value, steps):
            raise UserError(
                f"{folder} holds another run: there {name} is {before[name]}, here {value}; "
                f"choose another --out (with --init {folder} to start from its weights)"
            )


def check_data(
    folder: Path, meta: dict[str, Any], data: str, count: int, found: Fingerprint
) -> None:
    """UserError where the training images are not those of a checkpoint's meta data. A run of
    before fingerprints were kept is told by the path of its data and by their number."""
    began = meta["num_images"]
    if count != began:
        raise UserError(
            f"{data} has {counted(count, 'training image')}, but the run began with {began}: put "
            "the data back, or choose another --out"
        )
    if (known := meta.get("fingerprint")) and found:
        if changed := differing(known, found):
            raise UserError(
                f"{data} holds other images than the run in {folder} began with: their "
                f"{' and '.join(changed)} differ; put the data back, or choose another --out "
                f"(with --init {folder} to start from its weights)"
            )
        return
    before = meta["config"]["data"]
    if _resolved(before) != _resolved(data):
        raise UserError(
            f"{folder} holds another run: there data is {before}, here {data}; choose another "
            f"--out (with --init {folder} to start from its weights)"
        )


def meaning(name: str, value: Any, steps: Callable[[str], float]) -> Any:
    """An option's value, the same for all ways to write it. steps: of a duration."""
    if value is None:
        return None
    if name in SIZES:
        return pair(value)
    if name in PATHS:
        return value if value.startswith(NAMES) else _resolved(value)
    if name in DURATIONS:
        return steps(value)
    if name == "flip":
        return {True: "horizontal", False: "none"}.get(value, value)
    return value


def _resolved(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))

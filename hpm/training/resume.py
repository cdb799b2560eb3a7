"""Check that a run is resumed with the same options and data, however they are spelled."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from hpm.core import lock
from hpm.core.choices import TIMM
from hpm.core.config import PretrainConfig, pair
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.files import read_meta, remove_stale, write_text
from hpm.core.options import LENGTHS, describe
from hpm.core.version import __version__
from hpm.data.fingerprint import Fingerprint, differing
from hpm.training.schedule import num_steps, steps_per_epoch
from hpm.weights.run_folder import FOLLOWS, RunFolder, read_config

SIZES = ("image_size", "patch_size")
PATHS = ("data", "init", "codebook", "target_model")
NAMES = (TIMM, "hf/")  # prefixes of model names, which are not paths
DURATIONS = (
    "warmup",
    "freeze_encoder",
    "cooldown",
    "ema_horizon_start",
    "ema_horizon_end",
    "ema_ramp",
)
# Options whose defaults follow from other options (model and decoder; mask; init and pretrained;
# length and batch size) or the device. In config.yaml they are comments unless they were given, so
# that, as --config of another run, it does not carry the defaults of one over to another.
FOLLOWING = (
    "patch_size",
    "base_lr",
    "precision",
    "normalize",
    "hard_share_start",
    "hard_share_end",
    "secondary_mask_ratio",
    "decoder_dim",
    "decoder_depth",
    "decoder_heads",
    "freeze_encoder",
    "layer_decay",
)


def claim(
    run: RunFolder,
    given: PretrainConfig,
    config: PretrainConfig,
    count: int | None,
    found: Fingerprint,
) -> str | None:
    """Lock a run folder (see `hpm.core.lock`), remove stale temporary files, and write config.yaml
    or check it.

    Args:
        given: the options as the user set them.
        config: the same, resolved.
        count: number of training images; None for a stream.
        found: their fingerprint.

    Returns a line for the log, or None. Raises UserError if the folder holds something else, or if
    another process trains into it.
    """
    check_free(run)
    note = lock.acquire(run.folder)
    remove_stale(run.folder, run.checkpoints, run.figures, run.moments)
    latest = run.latest_checkpoint()
    if run.config_file.exists() and latest is not None:
        meta = read_meta(latest)
        before = run.options(meta)
        check_data(run.folder, meta, config.data, count, found)
        prolonged = check_options(run.folder, before, config, count, meta["step"])
        if not prolonged:
            return note
        if config.schedule == "constant":
            run.set_aside_cooldown()
            longer = "prolonged, at the constant learning rate"
            note = f"{note}; {longer}" if note else longer
    # A run without a checkpoint has nothing to lose, so its config may be overwritten.
    write_text(run.config_file, config_text(given, config))
    return note


def config_text(given: PretrainConfig, config: PretrainConfig) -> str:
    """The content of config.yaml. Options that follow from others are comments.

    given: the options as the user set them. config: the same, resolved.
    """
    options = json.loads(json.dumps(dataclasses.asdict(config)))
    not_given = [name for name in FOLLOWING if getattr(given, name) in (None, "auto")]
    follow = {name: options.pop(name) for name in not_given}
    text = (
        f"# hpm {__version__}, torch {torch.__version__}, python "
        f"{platform.python_version()}, {platform.platform()}\n"
        f"# command: {' '.join(sys.argv)}\n"
    )
    text += yaml.safe_dump(options, sort_keys=False)
    if follow:
        lines = yaml.safe_dump(follow, sort_keys=False).splitlines()
        text += f"{FOLLOWS}\n"
        text += "".join(f"# {line}\n" for line in lines)
    return text


class Begun(NamedTuple):
    """The length of a run that began before: its steps, and the seconds used so far."""

    steps: int
    seconds: float


def begun_within(config: PretrainConfig) -> Begun | None:
    """The length that the run of this folder was given when it began; None if there is none yet.

    Raises UserError if the folder holds something else, or a run of another length.
    """
    run = RunFolder(Path(config.out))
    check_free(run)
    latest = run.latest_checkpoint()
    if latest is None or not run.config_file.exists():
        return None
    before, meta = read_config(run.config_file), read_meta(latest)
    if before.get("max_hours") != config.max_hours:
        length = next((f"{n} is {before[n]}" for n in LENGTHS[::-1] if before.get(n)), "it is not")
        raise UserError(
            f"{run.folder} holds another run: there {length}, here max_hours {config.max_hours:g}; "
            f"choose another --out (with --init {run.folder} to start from its weights)"
        )
    return Begun(before["steps"], meta.get("seconds", 0.0))


def check_free(run: RunFolder) -> None:
    """Raise UserError if the folder holds something else than a run."""
    if not run.config_file.exists() and run.folder.exists() and not _is_empty(run.folder):
        raise UserError(f"{run.folder} exists and is no run folder; choose another --out")


def may_change(name: str) -> bool:
    """Whether an interrupted run may be resumed with another value of an option, because it does
    not affect what is learned."""
    return describe(PretrainConfig)[name].rules.may_change


def check_options(
    folder: Path, before: dict[str, Any], config: PretrainConfig, count: int | None, step: int
) -> bool:
    """Raise UserError for the first option whose meaning has changed. Returns whether the run is
    prolonged.

    before: the options of the run; options that it lacks were added in a later version, and are not
    compared. count: number of training images. step: of the latest checkpoint. See `check_data`
    for the data.
    """
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    per_epoch = steps_per_epoch(config, config.global_batch_size, count)
    total = num_steps(config.steps, config.epochs, per_epoch)

    def steps(duration: str) -> float:
        return duration_steps(duration, total, per_epoch)

    free = {name for name in now if may_change(name)} | {"data"}
    length = length_of(before, per_epoch) or total
    # The same length may be given in epochs or in steps, and a run may be prolonged: at any time
    # with a constant learning rate, else when it is finished.
    prolonged = total > length and (config.schedule == "constant" or step == length)
    if length == total or prolonged:
        free |= {"steps", "epochs"}
        if None in (before.get("max_hours"), config.max_hours):
            free |= {"max_hours"}
    for name, value in now.items():
        if name in free or name not in before:
            continue
        if canonical(name, before[name], steps) != canonical(name, value, steps):
            finish = f"finish it first, at step {length}, and then prolong it; or "
            longer = name in ("steps", "epochs") and total > length
            raise UserError(
                f"{folder} holds another run: there {name} is {before[name]}, here {value}; "
                f"{finish if longer else ''}"
                f"choose another --out (with --init {folder} to start from its weights)"
            )
    return prolonged


def length_of(options: dict[str, Any], steps_per_epoch: int) -> int:
    """Length in steps of a run with these options of a file; 0 if they do not say."""
    return num_steps(options.get("steps"), options.get("epochs", 0), steps_per_epoch)


def check_data(
    folder: Path, meta: dict[str, Any], data: str, count: int | None, found: Fingerprint
) -> None:
    """Raise UserError if the training images are not those of a checkpoint's metadata. Checkpoints
    without a fingerprint, of older versions, are compared by number of images and path."""
    num_images = meta["num_images"]
    if (count is None) != (num_images is None):
        now, before = ("is", "none") if count is None else ("is not", "one")
        raise UserError(
            f"{data} {now} a stream, but the run in {folder} began with {before}: put the data "
            "back, or choose another --out"
        )
    if count is not None and count != num_images:
        raise UserError(
            f"{data} has {counted(count, 'training image')}, but the run began with {num_images}: "
            "put the data back, or choose another --out"
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


def canonical(name: str, value: Any, steps: Callable[[str], float]) -> Any:
    """An option's value in a form that does not depend on its spelling.

    steps: converts a duration to steps.
    """
    if value is None:
        return None
    if name in SIZES:
        return tuple(value) if name == "patch_size" and not isinstance(value, int) else pair(value)
    if name in PATHS:
        return value if value.startswith(NAMES) else _resolved(value)
    if name in DURATIONS:
        return steps(value)
    if name == "flip":
        return {True: "horizontal", False: "none"}.get(value, value)
    return value


def _resolved(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and all(path.name == lock.FILE for path in folder.iterdir())

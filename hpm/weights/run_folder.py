"""The folder of a pre-training run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpm.core.errors import UserError, one_line
from hpm.core.files import read_meta, remove
from hpm.weights.checkpoint import FILE, FOLDER, list_checkpoints, step_of

# Options whose defaults depend on the data or the initial weights, with the values of runs of older
# versions, which lack them.
KEPT_OPTIONS = {"base_lr": None, "freeze_encoder": "0%", "layer_decay": 1.0}

# The line of config.yaml above the options that were not given and follow from others.
FOLLOWS = "# Not given; these defaults follow from the options above:"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a pre-training run."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def moments(self) -> Path:
        """Panels of held-out images at each evaluation, for the report."""
        return self.folder / "moments"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone.safetensors"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the best probe during training."""
        return self._checkpoint("best")

    @property
    def before_cooldown(self) -> Path:
        """The checkpoint from which a run of constant learning rate is prolonged."""
        return self._checkpoint("before_cooldown")

    def _checkpoint(self, name: str) -> Path:
        """A folder if a sharded run has written it, else a file, whether it exists or not."""
        folder = self.checkpoints / f"{name}{FOLDER}"
        return folder if folder.exists() else self.checkpoints / f"{name}{FILE}"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    def latest_checkpoint(self) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def set_aside_cooldown(self) -> None:
        """Make the checkpoint before the cooldown the latest one. Later ones are renamed.

        Afterwards there is no `before_cooldown`: the prolonged run writes its own.
        """
        if not self.before_cooldown.exists():
            return
        before = self.before_cooldown
        start = read_meta(before)["step"]
        for path in list_checkpoints(self.checkpoints):
            if step_of(path) > start:
                aside = path.with_name(f"cooled_{path.name}")
                remove(aside)  # of an earlier cooldown
                path.rename(aside)
        latest = self.latest_checkpoint()
        if latest is None or step_of(latest) != start:
            before.rename(before.with_name(f"step_{start:08d}{before.suffix}"))
        else:
            remove(before)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def options(self, meta: dict[str, Any]) -> dict[str, Any]:
        """All options of a run that is resumed: those of config.yaml, and from the metadata of its
        latest checkpoint those that config.yaml leaves out because they follow from others."""
        return meta["config"] | read_config(self.config_file)

    def kept_options(self) -> dict[str, Any]:
        """Options of a run that it keeps when it is resumed, whatever their defaults are by then;
        empty if there is no run to resume."""
        latest = self.latest_checkpoint()
        if not self.config_file.exists() or latest is None:
            return {}
        options = self.options(read_meta(latest))
        return KEPT_OPTIONS | {n: value for n, value in options.items() if n in KEPT_OPTIONS}


def training_minutes(metrics: list[dict[str, Any]], batch_size: int, first_step: int = 0) -> float:
    """Minutes of training from `first_step` on, without evaluations, from the logged speeds."""
    seconds, last_step = 0.0, first_step
    for line in metrics:
        if "images_per_second" in line:
            seconds += (line["step"] - last_step) * batch_size / line["images_per_second"]
            last_step = line["step"]
    return seconds / 60


def latest_values(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of each metric."""
    found: dict[str, Any] = {}
    for line in metrics:
        found |= line
    return found


def following_options(text: str) -> dict[str, Any]:
    """The options that the text of a config.yaml has as comments, because they were not given and
    follow from others; none in those of older versions. Raises YAMLError."""
    lines = text.partition(f"{FOLLOWS}\n")[2].splitlines()
    return yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines)) or {}


def read_config(path: Path) -> dict[str, Any]:
    remedy = "repair it, or choose another --out"
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no options): {remedy}")
    return content

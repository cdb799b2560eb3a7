"""A pre-training run, as `hpm.pretrain` returns it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError
from hpm.core.wording import of_clips, worded
from hpm.evals.saved import saved_evaluations
from hpm.show.curves import number
from hpm.show.drawing import Drawing, drawing
from hpm.show.judgement import judge
from hpm.show.options import Panel
from hpm.show.pictures import Pictures, picture_of
from hpm.show.plots import plot_metrics
from hpm.show.readings import read_metrics
from hpm.show.report import TILES, read_options
from hpm.show.status import Status, read_status
from hpm.training.sessions import read_sessions
from hpm.weights.backbone import Backbone
from hpm.weights.resolve import load_encoder
from hpm.weights.run_folder import RunFolder, latest_values


@dataclass(frozen=True, init=False)
class Run(RunFolder, os.PathLike[str]):
    """A run by its folder: `hpm.Run("runs/first")`. A notebook shows it as a summary.

    A run may be passed wherever a run folder is: `hpm.evaluate("knn", run, "flowers/")`.
    """

    def __init__(self, folder: str | Path):
        object.__setattr__(self, "folder", Path(folder).expanduser())  # it is frozen

    def __fspath__(self) -> str:
        return str(self.folder)

    def load_encoder(self) -> Backbone:
        """The encoder of the latest checkpoint, else of the backbone file (see `load_encoder`)."""
        return load_encoder(self.folder)

    @property
    def status(self) -> Status:
        """State, steps, and seconds elapsed and left. Raises UserError if the folder holds no
        run."""
        return self._status(read_metrics(self.folder))

    def _status(self, metrics: list[dict[str, Any]]) -> Status:
        return read_status(self.folder, self._options(), metrics, read_sessions(self.folder))

    @property
    def judgement(self) -> str:
        """One sentence on what the run has learned. Raises UserError if the folder holds no run."""
        return self._judgement(read_metrics(self.folder))

    def _judgement(self, metrics: list[dict[str, Any]]) -> str:
        evaluations, total = saved_evaluations(self.folder), self._status(metrics).total
        return judge(self._options(), metrics, evaluations, total)

    def plot(self, *metrics: str) -> Drawing:
        """Curves of the run: its losses and ranking accuracies, or these metrics.

        metrics: names in metrics.jsonl, such as `learning_rate`. Raises UserError for others.
        """
        return plot_metrics(read_metrics(self.folder), self._options(), metrics)

    def show(
        self,
        images: Pictures,
        panels: Sequence[Panel] | None = None,
        count: int = 8,
        **options: Any,
    ) -> Drawing:
        """What the latest weights make of images: losses, mask, reconstruction, features.

        Args:
            images: a source such as a folder (see `hpm.pretrain`), of which `count` are drawn at
                random; or pictures: paths, Pillow images, or uint8 or uint16 arrays [H W C].
            panels: some of image, actual, predicted, mask, reconstruction, pca, attention.
                Default: all that the weights allow.
            options: hard_share, mask_ratio, num_masks, seed, device; see `hpm show`.

        Raises UserError if images or weights cannot be used.
        """
        return drawing(picture_of(self.folder, images, panels, count, options), across=1.3)

    def _options(self) -> dict[str, Any]:
        if not self.config_file.is_file():
            raise UserError(f"{self.folder}: no run folder of hpm pretrain (it has no config.yaml)")
        return read_options(self.config_file)

    def _repr_html_(self) -> str | None:
        """A summary; None, so that a notebook shows text, if there is no run yet."""
        if not self.config_file.is_file():
            return None
        metrics = read_metrics(self.folder)  # once: of a long run, it takes seconds
        status, last = self._status(metrics), latest_values(metrics)
        rows = {"progress": f"{status.words}; {status.times}".rstrip("; ")}
        clips = of_clips(self._options())
        rows |= {worded(t, clips): number(last[name]) for name, t in TILES.items() if name in last}
        rows |= {"report": str(self.report)}
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in rows.items()
        )
        return (
            f"<p><b>{escape(str(self.folder))}</b>: {escape(self._judgement(metrics))}</p>"
            f"<table>{cells}</table>"
        )

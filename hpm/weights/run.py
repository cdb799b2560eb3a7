"""A pre-training run, as `hpm.pretrain` returns it."""

from __future__ import annotations

from dataclasses import dataclass

from hpm.weights.backbone import Backbone
from hpm.weights.resolve import load_encoder
from hpm.weights.run_folder import RunFolder


@dataclass(frozen=True)
class Run(RunFolder):
    """The folder of a run, and the encoder in it."""

    def load_encoder(self) -> Backbone:
        """The encoder of the latest checkpoint, else of the backbone file (see `load_encoder`)."""
        return load_encoder(self.folder)

"""The folder of a supervised training: locking, resuming and saving."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpm.core import distributed, lock
from hpm.core.errors import UserError
from hpm.core.files import remove_stale
from hpm.data.fingerprint import differing
from hpm.data.unreadable import UnreadableImages
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint, restore, save_checkpoint


@dataclass
class TrainingFolder:
    """The folder of a training.

    folder: used by one training at a time.
    kind: name of the kind of training in messages, such as `fine-tuning`.
    identity: values that must be unchanged to resume (options, data, first weights), JSON-like.
    """

    folder: Path
    kind: str
    identity: dict[str, Any]

    def __post_init__(self) -> None:
        self.identity = json.loads(json.dumps(self.identity))  # tuples become lists

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def claim(self) -> str | None:
        """Create and lock the folder (see `hpm.core.lock`) until `release`. Returns a line for the
        log, or None."""
        return distributed.main_first(lambda: lock.acquire(self.folder))

    def release(self) -> None:
        lock.release(self.folder)

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, unreadable: UnreadableImages
    ) -> int:
        """Restore the latest checkpoint. Returns its step, or 0 if there is none.

        Raises UserError if the checkpoint belongs to another training.
        """
        distributed.main_first(lambda: remove_stale(self.folder, self.checkpoints))
        found = distributed.from_main(list_checkpoints(self.checkpoints))
        if not found:
            return 0
        checkpoint = load_checkpoint(found[-1])
        before, now = checkpoint.meta.get("identity", {}), self.identity
        if "data" in now and "data" not in before:
            raise UserError(
                f"{self.folder} holds a {self.kind} of an older version of hpm, which did not say "
                "on which data: choose another --out, or delete the folder to train again"
            )
        if changed := differing(before.get("data", {}), now.get("data", {})):
            raise UserError(
                f"{self.folder} holds a {self.kind} on other data ({' and '.join(changed)} "
                "differ): choose another --out, or delete the folder to train again"
            )
        for name in now:
            if before.get(name) != now[name]:
                raise UserError(
                    f"{self.folder} holds another {self.kind}: there {name} is "
                    f"{before.get(name)}, here {now[name]}; choose another --out"
                )
        restore(checkpoint, model, None, optimizer)
        unreadable.indices = set(map(int, checkpoint.meta.get("unreadable", ())))
        return checkpoint.meta["step"]

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        unreadable: UnreadableImages,
    ) -> None:
        """Write a checkpoint, which replaces the previous one."""
        found = sorted(unreadable.indices)
        meta = {"step": step, "identity": self.identity, "unreadable": found}
        distributed.main_first(
            lambda: save_checkpoint(self.checkpoints, model, None, optimizer, meta, keep=1)
        )


def weights_fingerprint(model: nn.Module, *extras: object) -> str:
    """A digest of a model's weights and buffers: equal weights have the same on every machine.

    extras: numbers, texts, or lists of them that belong to the weights.
    """
    digest = hashlib.sha256(repr(extras).encode() if extras else b"")
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

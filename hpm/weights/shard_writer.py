"""Write the checkpoints of sharded runs, in the background; see `hpm.weights.sharded`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import AsyncStager

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.files import (
    META_FILE,
    StateDict,
    disk_error,
    replace_folder,
    temporary_path,
    write_text,
)
from hpm.core.signals import Interrupted


class _Writer(dcp.HuggingFaceStorageWriter):
    """Calls a function in the main process once all processes have written their shards."""

    def __init__(self, path: Path, complete: Callable[[], None]):
        super().__init__(str(path), save_distributed=True)
        self.complete = complete

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        self.complete()


class _Copies(AsyncStager):
    """Copies tensors to the CPU before training goes on. PyTorch's own stagers copy the description
    of every sharded tensor as well, which takes far longer than the shards do."""

    should_synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {
            part: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            for part, tensors in state_dict.items()
        }

    def synchronize_staging(self) -> None:
        """Nothing: `stage` has copied everything when it returns."""

    def close(self) -> None:
        """Nothing is kept."""


class ShardWriter:
    """Writes checkpoints in the background, one at a time. All processes call each method."""

    def __init__(self) -> None:
        # Its own group: the training communicates at the same time.
        self._group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)
        self._writing: Future | None = None
        self._path = self._temporary = Path()

    def write(
        self,
        path: Path,
        tensors: StateDict,
        meta: dict[str, Any],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Copy the tensors, and begin to write them into the folder `path`, which appears when it
        is complete. Waits for the checkpoint before.

        tensors: whole ones must be equal in all processes. then: called in the main process once
        the folder is there.

        Raises UserError if the checkpoint before could not be written.
        """
        self.wait()
        temporary = distributed.from_main(temporary_path(path))
        distributed.main_first(lambda: _new_folder(temporary, path))
        text = json.dumps(meta)

        def complete() -> None:
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            described = json.dumps({"files": sizes, "meta": json.loads(text)})
            write_text(temporary / META_FILE, described)
            replace_folder(temporary, path)
            if then is not None:
                then()

        self._path, self._temporary = path, temporary
        self._writing = dcp.async_save(  # type: ignore[assignment]
            _by_part(tensors),
            storage_writer=_Writer(temporary, complete),
            # Which process writes what is the same each time.
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
            process_group=self._group,
            async_stager=_Copies(),
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises UserError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except dcp.CheckpointException as failed:
            if distributed.is_main():
                shutil.rmtree(self._temporary, ignore_errors=True)
            cause = next(iter(failed.failures.values()))[0]
            if isinstance(cause, UserError):
                raise cause from None
            raise disk_error(self._path, cause) from failed  # type: ignore[arg-type]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the last checkpoint at the end of the context. An error that ends the context is
        not hidden by one of writing."""
        try:
            yield
        except Interrupted:
            self.wait()
            raise
        except BaseException:
            with suppress(Exception):
                self.wait()
            raise
        self.wait()


def _by_part(tensors: StateDict) -> dict[str, StateDict]:
    """`model.norm.weight` as `norm.weight` of `model`: PyTorch joins the names again. It does some
    work, including a message to its log, for every entry of the outermost dictionary."""
    parts: dict[str, StateDict] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _new_folder(temporary: Path, path: Path) -> None:
    """Raises UserError if the folder cannot be created."""
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        os.makedirs(temporary)
    except OSError as error:
        raise disk_error(path, error) from error

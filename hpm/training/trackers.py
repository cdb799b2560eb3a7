"""Log metrics and figures to Weights & Biases or MLflow (`--tracker`).

Both are configured by their usual environment variables (server, credentials, project).
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from hpm.core.choices import TrackerName
from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.core.files import write_text


class Tracker(ABC):
    """Interface of a tracker. Methods may raise: `RunLog` warns once and stops tracking."""

    id: str  # the tracker's own id of the run

    @abstractmethod
    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step."""

    @abstractmethod
    def figure(self, step: int, path: Path) -> None:
        """Log a figure (PNG)."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """End tracking. finished: whether training is complete rather than interrupted."""


def check_tracker(name: TrackerName) -> None:
    """Raise UserError if the tracker's package is missing, or if it has nowhere to write."""
    if name == "none":
        return
    library = need(name, name, f"--tracker {name}")
    if name == "mlflow":
        try:
            library.MlflowClient()  # does not contact the server yet
        except Exception as error:
            reason = one_line(error, 160)
            raise UserError(
                f"MLflow cannot write to {library.get_tracking_uri()} ({reason}): set "
                "MLFLOW_TRACKING_URI to your server, or pip install mlflow for a local database"
            ) from None


def start_tracker(
    name: TrackerName, folder: Path, config: dict[str, Any], resumed: bool
) -> Tracker | None:
    """Start to track a run. A resumed run continues under the id stored in its `tracker.json`."""
    if name == "none":
        return None
    file = folder / "tracker.json"
    ids: dict[str, str] = json.loads(file.read_text()) if resumed and file.exists() else {}
    kinds: dict[str, type[WandbTracker] | type[MlflowTracker]]
    kinds = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    tracker = kinds[name](folder, config, ids.get(name))
    write_text(file, json.dumps(ids | {name: tracker.id}) + "\n")
    return tracker


class WandbTracker(Tracker):
    """Weights & Biases. The default project is hpm."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None):
        self.library = need("wandb", "wandb", "--tracker wandb")
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", "hpm"),
            name=folder.name,
            dir=str(folder),
            id=run_id,
            resume="allow",
            config=config,
            # Some options, such as workers, may change when a run is resumed. wandb must not
            # capture the console.
            settings=self.library.Settings(allow_val_change=True, console="off"),
        )
        self.id = self.run.id

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def figure(self, step: int, path: Path) -> None:
        self.run.log({"figure": self.library.Image(str(path))}, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MlflowTracker(Tracker):
    """MLflow. The default experiment is hpm."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None):
        # By default, a server that does not answer would block training for a quarter of an hour.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        library = need("mlflow", "mlflow", "--tracker mlflow")
        self.entities = library.entities
        self.client = library.MlflowClient()
        if run_id:
            self.client.update_run(run_id, status="RUNNING")
            self.id = run_id
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hpm")
        found = self.client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self.client.create_experiment(experiment)
        self.id = self.client.create_run(place, run_name=folder.name).info.run_id
        params = [self.entities.Param(option, str(value)) for option, value in config.items()]
        for start in range(0, len(params), 100):  # MLflow's limit per request
            self.client.log_batch(self.id, params=params[start : start + 100])

    def metrics(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(n, value, now, step) for n, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def figure(self, step: int, path: Path) -> None:
        self.client.log_artifact(self.id, str(path), "figures")

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

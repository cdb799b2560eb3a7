import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers import TINY, stop_after

import hpm
from hpm.core.config import PretrainConfig
from hpm.training.log import RunLog
from hpm.training.resume import may_change


def pretrain(folder, out, **changes):
    return hpm.pretrain(data=str(folder), out=str(out), **TINY | {"holdout": 8} | changes)


def stop_and_go_on(folder, out, monkeypatch, tracker):
    """A run that is stopped at step 4 and goes on from there, tracked."""
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pretrain(folder, out, tracker=tracker, eval_every="4 steps")
    return pretrain(folder, out, tracker=tracker, eval_every="4 steps")


class FakeWandb(ModuleType):
    """As much of wandb as we use; records the calls, run by run."""

    def __init__(self):
        super().__init__("wandb")
        self.fail, self.runs, self.Settings = (), [], dict
        self.Image = lambda path: f"image {path}"

    def init(self, **options):
        run = FakeRun(self, options)
        self.runs.append(run)
        run.may("init")
        return run


class FakeRun:
    def __init__(self, library, options):
        self.library, self.options, self.logged, self.ended = library, options, [], None
        self.id = options["id"] or "new"

    def may(self, call):
        if call in self.library.fail:
            raise RuntimeError(f"no network\nfor {call}")

    def log(self, values, step):
        self.logged.append((step, values))
        self.may("log")

    def finish(self, exit_code):
        self.ended = exit_code
        self.may("finish")


@pytest.fixture
def fake_wandb(monkeypatch):
    library = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return library


def test_a_tracker_receives_what_metrics_jsonl_has(image_folder, tmp_path, fake_wandb):
    run = pretrain(image_folder, tmp_path / "run", tracker="wandb")
    (tracked,) = fake_wandb.runs
    numbers = [(step, values) for step, values in tracked.logged if "figure" not in values]
    lines = [dict(line) for line in run.metrics()]
    assert numbers == [(line.pop("step"), line) for line in lines]
    figures = [(step, values) for step, values in tracked.logged if "figure" in values]
    assert figures == [(8, {"figure": f"image {run.figures / 'step_00000008.png'}"})]
    options = tracked.options
    assert (options["project"], options["name"]) == ("hpm", "run")
    assert options["config"]["mask"] == "easy_to_hard" and options["config"]["betas"] == [0.9, 0.95]
    assert tracked.ended == 0


def open_log(folder, start_step, **options):
    config = PretrainConfig("photos", str(folder), tracker="wandb", **options)
    return RunLog(folder, start_step, 8, True, config)


def test_a_resumed_run_goes_on_as_the_same(tmp_path, fake_wandb):
    for start, steps in [(0, (2, 4)), (4, (6, 8)), (8, ()), (0, (2,))]:
        log = open_log(tmp_path, start)
        for step in steps:
            log.metrics(step, {"loss": 1.0})
        log.close()
    # A finished run is not taken up again; one that begins anew is another.
    assert [run.options["id"] for run in fake_wandb.runs] == [None, "new", None]
    assert [run.ended for run in fake_wandb.runs] == [1, 0, 1]
    assert may_change("tracker"), "it may be chosen when a run goes on"


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once(tmp_path, fake_wandb, capfd, call):
    fake_wandb.fail = (call,)
    log = open_log(tmp_path, 0)
    for step in (2, 4, 8):
        log.metrics(step, {"loss": 1.0})
        log.figure(step, tmp_path / "figure.png")
    log.close()
    errors = capfd.readouterr().err
    assert errors.count("warning:") == 1
    assert f"warning: tracking by wandb failed (no network for {call})" in errors
    assert len(fake_wandb.runs[0].logged) == {"init": 0, "log": 1, "finish": 6}[call]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line(image_folder, tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(
        hpm.UserError, match=rf"--tracker {tracker} needs .*'hpm-vision\[{tracker}\]'"
    ):
        pretrain(image_folder, tmp_path / "run", tracker=tracker)
    assert not (tmp_path / "run").exists()


class FakeClient:
    """As much of MLflow's client as we use."""

    def __getattr__(self, call):
        def record(*arguments, **options):
            self.requests.append((call, arguments, options))
            info = SimpleNamespace(run_id="new")
            return {"get_experiment_by_name": None, "create_experiment": "7"}.get(
                call, SimpleNamespace(info=info)
            )

        return record


@pytest.fixture
def fake_mlflow(monkeypatch):
    library = ModuleType("mlflow")
    library.entities = SimpleNamespace(
        Param=lambda key, value: (key, value),
        Metric=lambda key, value, timestamp, step: (step, key, value),
    )
    library.MlflowClient = type("Client", (FakeClient,), {"requests": []})
    library.get_tracking_uri = lambda: "sqlite:///mlflow.db"
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return library


@pytest.mark.slow
def test_mlflow_receives_the_same(image_folder, tmp_path, fake_mlflow, monkeypatch):
    run = stop_and_go_on(image_folder, tmp_path / "run", monkeypatch, "mlflow")
    requests = fake_mlflow.MlflowClient.requests
    calls = [call for call, _, _ in requests]
    assert calls[:3] == ["get_experiment_by_name", "create_experiment", "create_run"]
    assert calls.count("create_run") == 1
    assert ("update_run", ("new",), {"status": "RUNNING"}) in requests
    ends = [arguments for call, arguments, _ in requests if call == "set_terminated"]
    assert ends == [("new", "KILLED"), ("new", "FINISHED")]
    params = dict(p for _, _, options in requests for p in options.get("params", []))
    assert params["mask_ratio"] == "0.75" and params["tracker"] == "mlflow"
    metrics = [m for _, _, options in requests for m in options.get("metrics", [])]
    expected = [
        (line["step"], name, value)
        for line in run.metrics()
        for name, value in line.items()
        if name != "step"
    ]
    # Speeds are the only numbers that differ between what was logged before and after a stop.
    assert [m[:2] for m in metrics] == [m[:2] for m in expected]
    figures = [arguments[1] for call, arguments, _ in requests if call == "log_artifact"]
    assert [Path(path).name for path in figures] == ["step_00000004.png", "step_00000008.png"]


def test_mlflow_without_a_store_is_one_line(image_folder, tmp_path, fake_mlflow):
    def no_client():
        raise RuntimeError("unsupported\nURI")

    fake_mlflow.MlflowClient = no_client
    with pytest.raises(
        hpm.UserError, match=r"sqlite:///mlflow\.db \(unsupported URI\): set MLFLOW_TRACKING_URI"
    ):
        pretrain(image_folder, tmp_path / "run", tracker="mlflow")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_real_wandb_offline(image_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    run = stop_and_go_on(image_folder, tmp_path / "run", monkeypatch, "wandb")
    tracked = json.loads((run.folder / "tracker.json").read_text())["wandb"]
    parts = list((run.folder / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(tracked) for part in parts)
    assert all(list(part.glob("*.wandb")) for part in parts)
    assert list(parts[0].glob("files/media/images/figure_*.png"))


@pytest.mark.slow
def test_the_real_mlflow_with_a_file_store(image_folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    run = stop_and_go_on(image_folder, tmp_path / "run", monkeypatch, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("hpm")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED" and tracked.info.run_name == "run"
    assert tracked.data.params["mask"] == "easy_to_hard"
    losses = client.get_metric_history(tracked.info.run_id, "reconstruction_loss")
    lines = [line for line in run.metrics() if "reconstruction_loss" in line]
    assert [(m.step, m.value) for m in losses] == [
        (line["step"], line["reconstruction_loss"]) for line in lines
    ]
    assert "held_out/ranking_accuracy" in tracked.data.metrics
    figures = client.list_artifacts(tracked.info.run_id, "figures")
    assert [Path(f.path).name for f in figures] == ["step_00000004.png", "step_00000008.png"]

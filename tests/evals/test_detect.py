import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from detecting import TINY, arguments, write_coco
from helpers import assert_refused, run_here
from jobs import torchrun
from PIL import Image
from safetensors.torch import load_file

import hpm
from hpm.core.options import make_config, read_preset
from hpm.data.detection import Detections, objects, open_detection, to_results
from hpm.evals.detect import Options
from hpm.evals.detect.data import open_data
from hpm.evals.detect.figure import draw_objects
from hpm.evals.detect.testing import DetectionScores, Found
from hpm.evals.detect.training import DetectorTraining
from hpm.evals.display import as_rgb
from hpm.weights.detection import DetectionModel
from hpm.weights.finetuned import load_model


@pytest.fixture(scope="module")
def on_demo(finished_run, tmp_path_factory):
    """The whole command line, on the built-in images."""
    out = tmp_path_factory.mktemp("detect")
    result = run_here(
        "eval",
        "detect",
        finished_run.folder,
        "demo",
        "--out",
        out,
        "--max-test-images=4",
        *arguments(window_size=2, accumulate=2, precision="bfloat16"),
    )
    assert result.returncode == 0, result.stderr
    return out, result


def test_demo_on_the_command_line(on_demo):
    out, result = on_demo
    [file] = out.glob("*.json")
    content = json.loads(file.read_text())
    assert set(content["values"]) == {"trained, boxes", "trained, masks"}
    for settings in content["values"].values():
        assert {"AP", "AP50", "AP75"} <= set(settings["detect"])
    about = content["about"]
    assert about["test_images"] == 4 and about["train_images"] == 4096 and about["classes"] == 10
    [figure] = content["figures"]
    with Image.open(out / figure) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and pixels.std() > 10
    assert "AP50" in result.stdout and "trained, masks" in result.stdout
    [folder] = (path for path in out.iterdir() if path.is_dir())
    rows = [json.loads(row) for row in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss_mask", "loss_classifier", "learning_rate"} <= set(rows[-1])
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_what_was_trained_can_be_loaded_and_used(on_demo, tmp_path):
    out, _ = on_demo
    model = load_model(out)
    assert isinstance(model, DetectionModel) and not model.training
    assert len(model.classes) == 10 and model.network.backbone.encoder.window_size == 2
    [file] = out.rglob("detector.json")
    assert json.loads(file.read_text())["classes"] == model.classes
    source = open_detection("demo").test
    picture = source.open(3).resize((100, 70))
    found = model.predict(picture)
    assert found.masks.shape[1:] == (70, 100) and found.boxes[:, 2].max() > 32
    path = tmp_path / "picture.png"
    picture.save(path)
    again = model.predict(path)
    assert torch.equal(again.boxes, found.boxes) and torch.equal(again.masks, found.masks)

    results = tmp_path / "results.json"
    result = run_here("predict", out, path, "--out", results, "--workers=0", "--device=cpu")
    assert result.returncode == 0 and str(results) in result.stdout
    content = json.loads(results.read_text())
    boxes = torch.tensor([row["bbox"] for row in content["annotations"]])
    torch.testing.assert_close(boxes[:, :2], found.boxes[:, :2])
    assert content["images"] == [{"id": 0, "file_name": "picture.png", "height": 70, "width": 100}]
    assert_refused(run_here("predict", out, path, "--out", results), "exists")


def test_resumed_equals_straight_through(finished_run, tmp_path, monkeypatch):
    """Stopped after two of four steps: the same command ends at the same weights, bitwise."""
    data = write_coco(tmp_path / "data")
    run, options = str(finished_run.folder), TINY | {"drop_path": 0.5, "checkpoint_every": "50%"}
    straight = hpm.evaluate("detect", run, str(data), out=str(tmp_path / "straight"), **options)
    save = DetectorTraining.save

    def save_and_stop(training):
        save(training)
        if training.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DetectorTraining, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            hpm.evaluate("detect", run, str(data), out=str(tmp_path / "stopped"), **options)
    resumed = hpm.evaluate("detect", run, str(data), out=str(tmp_path / "stopped"), **options)
    one, two = (
        load_file(next((tmp_path / name).rglob("detector.safetensors")))
        for name in ("straight", "stopped")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert straight.values == resumed.values


def test_options_of_the_test_do_not_train_anew(finished_run, tmp_path):
    data, run = str(write_coco(tmp_path / "data")), str(finished_run.folder)
    out, options = tmp_path / "out", TINY | {"steps": 1}
    hpm.evaluate("detect", run, data, out=str(out), **options)
    [file] = out.rglob("step_*.safetensors")
    written = file.stat().st_mtime_ns
    hpm.evaluate("detect", run, data, out=str(out), score_threshold=0.3, **options)
    hpm.evaluate("detect", run, data, out=str(out), max_test_images=2, **options)
    assert [f.stat().st_mtime_ns for f in out.rglob("step_*.safetensors")] == [written]
    assert len(list(out.glob("*.json"))) == 3


def test_random_weights_and_another_run_beside_it(finished_run, tmp_path):
    data, run = str(write_coco(tmp_path / "data")), str(finished_run.folder)
    result = hpm.evaluate(
        "detect",
        run,
        data,
        out=str(tmp_path / "out"),
        compare=run,
        baselines=True,
        **(TINY | {"steps": 2, "figure_images": 0}),
    )
    names = [
        f"{b}, {k}" for b in ("trained", "compared", "random weights") for k in ("boxes", "masks")
    ]
    assert list(result.values) == names
    assert set(result.differences) == {"trained, boxes", "trained, masks"}
    assert result.differences["trained, masks"]["detect"]["AP"] == 0  # of the same run
    one, two, random = (
        load_file(next((tmp_path / "out").rglob(f"{name}*/detector.safetensors")))
        for name in ("trained", "compared", "random_weights")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    name = "network.backbone.encoder.blocks.0.attn.qkv.weight"
    assert not torch.allclose(one[name], random[name], atol=1e-3)
    assert not list((tmp_path / "out").glob("*.png")) and result.figures == []


def test_boxes_alone(finished_run, tmp_path):
    data = str(write_coco(tmp_path / "data", masks=False))
    out = tmp_path / "out"
    options = TINY | {"steps": 1, "image_size": None}
    result = hpm.evaluate("detect", str(finished_run.folder), data, out=str(out), **options)
    assert list(result.values) == ["trained, boxes"]
    model = load_model(out)
    assert model.image_size == 32  # twice the 16 pixels of pre-training
    assert not model.shape.masks and model.predict(Image.new("RGB", (50, 40))).masks is None


def test_a_fifth_is_held_out_where_there_is_one_split(finished_run, tmp_path):
    data = str(write_coco(tmp_path / "data", splits=["train"], count=10))
    options = TINY | {"steps": 1}
    result = hpm.evaluate(
        "detect", str(finished_run.folder), data, out=str(tmp_path / "out"), **options
    )
    assert result.about["train_images"] == 8 and result.about["test_images"] == 2


def test_other_test_images_are_those_of_their_test_split(tmp_path):
    data, other = (str(write_coco(tmp_path / name)) for name in ("data", "other"))
    opened = open_data(make_config(Options, {"run": "run", "data": data, "test": other}))
    assert opened.test.path(0).startswith(str(tmp_path / "other" / "val"))
    alone = str(write_coco(tmp_path / "alone", splits=["train"]))
    opened = open_data(make_config(Options, {"run": "run", "data": data, "test": alone}))
    assert opened.test.path(0).startswith(str(tmp_path / "alone" / "train"))


def test_average_precision_of_perfect_detections():
    source = open_detection("demo").test
    rows = []
    for index in range(3):
        there = objects(source, index)
        scores = torch.ones(len(there))
        rows += to_results(index, Detections(there.boxes, scores, there.classes, there.masks))
    from hpm.data.detection import ground_truth

    truth = ground_truth(source, range(3))
    for kind in ("boxes", "masks"):
        perfect = DetectionScores(Found(truth, rows), kind)
        nothing = DetectionScores(Found(truth, []), kind)
        assert perfect.numbers(0)["AP"] == pytest.approx(100)
        assert perfect.difference(nothing, 0)["AP50"] == pytest.approx(100)


def test_a_drawing_shows_boxes_masks_names_and_scores():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    code = to_results(
        0,
        Detections(
            torch.tensor([[2, 3, 12, 8.0]]),
            torch.tensor([0.75]),
            torch.tensor([1]),
            torch.ones(1, 20, 30, dtype=torch.bool),
        ),
    )
    pixels = as_rgb(torch.full((3, 20, 30), 51, dtype=torch.uint8))
    assert pixels == pytest.approx(0.2)
    draw_objects(axis, pixels, code, ["cat", "dog"])
    [box], [text], [image] = axis.patches, axis.texts, axis.images
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (1.5, 2.5, 10, 5)
    assert text.get_text() == "dog 0.75"
    assert (np.asarray(image.get_array()) != pixels).any()
    deep = torch.linspace(0, 0.01, 5 * 20 * 30).view(5, 20, 30)
    assert as_rgb(deep).min() == 0 and as_rgb(deep).max() == 1
    assert as_rgb(torch.zeros(2, 20, 30, dtype=torch.uint8)).shape == (20, 30, 3)


def test_the_preset_is_vitdets():
    preset = read_preset("detect_vit_base_coco")
    options = make_config(Options, preset | {"run": "r", "data": "d"})
    assert (options.image_size, options.scale, options.batch_size) == (1024, (0.1, 2.0), 64)
    assert (options.steps, options.lr, options.lr_factor) == (184_375, 1e-4, 0.1)
    assert options.milestones == ("163889 steps", "177546 steps")
    assert (options.weight_decay, options.layer_decay, options.drop_path) == (0.1, 0.7, 0.1)
    assert options.window_size == 14 and options.anchor_scale * 4 == 32


@pytest.mark.slow
def test_stopped_by_a_signal_and_gone_on(finished_run, tmp_path):
    data = write_coco(tmp_path / "data")
    command = ["eval", "detect", finished_run.folder, data, *arguments(steps=40)]
    straight = run_here(*command, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "hpm", *map(str, command), "--out", str(tmp_path / "stopped")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "stopped").rglob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    resumed = run_here(*command, "--out", tmp_path / "stopped")
    assert resumed.returncode == 0, resumed.stderr
    one, two = (
        load_file(next((tmp_path / name).rglob("detector.safetensors")))
        for name in ("straight", "stopped")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes_share_the_work(finished_run, tmp_path):
    data = write_coco(tmp_path / "data", count=7)
    result = torchrun(
        "-m",
        "hpm",
        "eval",
        "detect",
        finished_run.folder,
        data,
        "--out",
        tmp_path / "out",
        *arguments(accumulate=2),
    )
    assert result.returncode == 0, result.stderr
    [file] = (tmp_path / "out").glob("*.json")
    content = json.loads(file.read_text())
    assert content["about"]["test_images"] == 7
    assert {"trained, boxes", "trained, masks"} == set(content["values"])


@pytest.mark.slow
def test_eight_photographs_are_learned_by_heart(shared_data, tmp_path):
    """From hardly trained weights: that the whole is right, from annotations to AP."""
    pennfudan, data = shared_data / "pennfudan", tmp_path / "data"
    table = json.loads((pennfudan / "annotations/instances_train.json").read_text())
    images = table["images"][:8]
    chosen = {image["id"] for image in images}
    table |= {
        "images": images,
        "annotations": [a for a in table["annotations"] if a["image_id"] in chosen],
    }
    (data / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (data / f"annotations/instances_{split}.json").write_text(json.dumps(table))
        (data / split).symlink_to((pennfudan / "train/images").resolve())
    run = hpm.pretrain(
        data="demo",
        out=str(tmp_path / "run"),
        model="vit_nano",
        image_size=32,
        patch_size=8,
        steps=4,
        batch_size=8,
        holdout=8,
        workers=0,
        device="cpu",
    )
    result = hpm.evaluate(
        "detect",
        str(run.folder),
        str(data),
        out=str(tmp_path / "out"),
        image_size=160,
        steps=300,
        batch_size=4,
        lr=1e-3,
        layer_decay=1.0,
        weight_decay=0.05,
        drop_path=0.0,
        clip_grad=1.0,
        scale=(1.0, 1.0),
        flip=False,
        channels=64,
        proposals=100,
        box_batch_size=32,
        workers=0,
        device="cpu",
    )
    assert result.values["trained, boxes"]["detect"]["AP50"] > 90
    assert result.values["trained, masks"]["detect"]["AP50"] > 90

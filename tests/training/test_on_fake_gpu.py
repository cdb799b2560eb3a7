"""What runs on a GPU keeps its tensors on it; see `fake_gpu`."""

import json

import pytest
import torch
from fake_gpu import APPLE_GPU, GPU, fake_gpu
from helpers import TINY, run_here
from segmentation import UPERNET

import hpm
from hpm.commands.bench_step import noise_batch
from hpm.core.config import PretrainConfig
from hpm.core.signals import Stop
from hpm.evals.finetune.training import ClassifierTraining
from hpm.evals.segment.upernet import UPerNetTraining
from hpm.pretraining import train_step, training_parts
from hpm.training.build import build_run
from hpm.training.trial import trial_of
from hpm.weights.checkpoint import load_checkpoint

ON_GPU = {name: value for name, value in TINY.items() if name != "data"} | {
    "device": "cuda",
    "compile": "false",
}
CLIPS = {"data": "demo-video", "frames": 4, "patch_size": (2, 4, 4)}
WAYS = [
    {"accumulate": 2},
    {"teacher_scale": 0.5, "target": "hog"},
    {"mine_by": "memory", "predictor_loss": "none"},
    {"mine_by": "progress", "repeat_augment": 2},
    {"mine_every": 2, "target": "teacher"},
    {"teacher_view": "masked", "predictor_loss": "absolute"},
    {"mask_unit": 2, "mining_temperature": 0.5, "decoder_keep": 0.5},
    {"mask": "attention", "checkpoint_activations": True},
    {"mask": "uniform", "secondary_mask_ratio": 0.25},
    {"mask": "multi_block", "target": "pixels", "ranking_signal": "normalized_pixels"},
    {"mask": "blue_noise", "target": "normalized_channels"},
    {"mask": "block", "layer_decay": 0.75},
    CLIPS | {"mine_by": "memory", "mine_tubes": "mean"},
]


def name_of(way):
    return ",".join(map(str, way.values()))


def test_the_fake_gpu_is_strict():
    """As PyTorch is with a real one."""
    with fake_gpu() as devices:
        x = torch.ones(2, 3, device=GPU)
        assert x.device == (x[0] + 1).device == torch.zeros_like(x).device == GPU
        assert x.cpu().numpy().sum() == 6 and x.cpu().device.type == "cpu"
        assert devices.waits == ["a copy to cpu"] * 2
        assert (x * torch.tensor(2.0)).device == GPU  # a number, which PyTorch allows
        for wrong in (
            lambda: x + torch.ones(2, 3),
            lambda: torch.cat([x, torch.ones(2, 3)]),
            lambda: torch.ones(2)[torch.tensor([0], device=GPU)],
            lambda: torch.nn.Linear(3, 1)(x),
            lambda: x.uniform_(generator=torch.Generator()),
            lambda: torch.rand(2, device=GPU, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="cuda"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        devices.waits.clear()
        assert x[x > 0].sum().item() == 6
        assert len(devices.waits) == 2  # for the size, and for the number


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_a_step_mixes_no_devices_and_never_waits(way, tmp_path):
    options = {"data": "demo", "normalize": "imagenet"} | ON_GPU | way
    with fake_gpu() as devices:
        run = build_run(PretrainConfig(out=str(tmp_path / "run"), **options), GPU, quiet=True)
        batch = noise_batch(run)
        train_step(run, batch, 0, num_hard=2)
        devices.waits.clear()
        for step in (1, 2):
            result = train_step(run, batch, step, num_hard=2)
        assert devices.waits == []
        assert result.losses["reconstruction_loss"].device == GPU


FEW = ("--batch-size=2", "--channels=16", "--repeats=1", "--steps-each=1")
SEGMENT = {name: value for name, value in UPERNET.items() if name != "device"}


@pytest.mark.parametrize(
    ("training", "protocol", "data", "options"),
    [
        (ClassifierTraining, "finetune", "image_folder", {"epochs": 1, "batch_size": 8}),
        (UPerNetTraining, "segment", "scenes", SEGMENT | {"steps": 2, "accumulate": 2}),
    ],
)
def test_steps_with_labels_never_wait(
    training, protocol, data, options, finished_run, request, tmp_path, monkeypatch
):
    waits, take_step = [], training.train_step
    with fake_gpu() as devices:

        def counted(*arguments):
            devices.waits.clear()
            result = take_step(*arguments)
            waits.extend(devices.waits)
            return result

        monkeypatch.setattr(training, "train_step", counted)
        data = str(request.getfixturevalue(data))
        options = options | {"workers": 0, "device": "cuda", "out": str(tmp_path)}
        hpm.evaluate(protocol, str(finished_run.folder), data, **options)
    assert waits == []


def test_each_trial_counts_its_own_memory(image_folder, tmp_path, monkeypatch):
    """`hpm plan` tries larger settings first, up to those that do not fit."""
    config = PretrainConfig(data=str(image_folder), out=str(tmp_path / "run"), **ON_GPU)
    with fake_gpu(), monkeypatch.context() as patch:
        counted = []
        patch.setattr(torch.cuda, "reset_peak_memory_stats", counted.append)
        with trial_of(config, GPU, training_parts(None), Stop()):
            assert counted == [GPU]


@pytest.mark.parametrize("gpu", [GPU, pytest.param(APPLE_GPU, marks=pytest.mark.slow)], ids=str)
def test_a_whole_run_with_all_that_follows(gpu, image_folder, tmp_path):
    """Trained, drawn, resumed and evaluated."""
    data, out, device = str(image_folder), str(tmp_path / "run"), gpu.type
    options = ON_GPU | {"holdout": 8, "probe": data, "probe_every": "100%", "device": device}
    with fake_gpu(gpu):
        run = hpm.pretrain(data, out=out, **options)
        saved = load_checkpoint(max((run.folder / "checkpoints").glob("step_*")))
        assert device in saved.rng
        saved.path.unlink()
        run.backbone.unlink()
        run = hpm.pretrain(data, out=out, **options)  # from the checkpoint before
        metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
        assert metrics[-1]["step"] == TINY["steps"]
        few = {"workers": 0, "device": device}
        for protocol in ("knn", "hardness"):
            hpm.evaluate(protocol, out, data, **few)
        for protocol in ("linear", "attentive", "finetune"):
            hpm.evaluate(protocol, out, data, epochs=1, **few)
        encoder = hpm.load_encoder(out).to(gpu)
        pooled, _ = encoder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
        assert pooled.device == gpu


@pytest.mark.parametrize("gpu", [GPU, APPLE_GPU], ids=str)
@pytest.mark.parametrize(
    "command",
    [
        ("embed", "RUN", "DATA", "--out=OUT/features", "--patches=true", "--dtype=float16"),
        ("show", "RUN", "DATA", "--out=OUT/figure.png", "--images=2"),
        ("tokenize", "DATA", "--out=OUT/codes.safetensors", "--codes=4", "--image-size=16"),
        ("bench", "segment", "--model=vit_nano", "--image-size=32", "--patch-size=8", *FEW),
    ],
    ids=" ".join,
)
def test_commands(command, gpu, finished_run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hpm.commands.bench_dense.matrix_product_flops", lambda device: 2e11)
    places = {"RUN": finished_run.folder, "DATA": image_folder, "OUT": tmp_path}
    words = list(command)
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    with fake_gpu(gpu):
        result = run_here(*words, f"--device={gpu.type}")
    assert result.returncode == 0, result.stderr

"""Small inputs, and the command line as a person types it."""

import contextlib
import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hpm.models.architecture import Architecture

# Seconds after which a command hangs, also on a busy machine. The timeout of most tests is shorter.
HANGS = 1800

# Options of a run that takes seconds.
TINY = {
    "model": "vit_nano",
    "image_size": 16,
    "patch_size": 4,
    "batch_size": 8,
    "steps": 8,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "base_lr": 1e-2,
    "workers": 0,
    "log_every": 2,
    "holdout": 0,
    "eval_every": "100%",
    "checkpoint_every": "4 steps",
    "ema_horizon_start": "2 steps",
    "hard_share_start": 0.25,
    "device": "cpu",
}


def architecture_of(shape: dict) -> Architecture:
    """An architecture from the values that files hold."""
    return Architecture.from_json(shape)


def tiny_arguments(**changes) -> list[str]:
    """TINY as a person types it."""
    options = TINY | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def write_images(folder: Path, classes: int = 3, per_class: int = 16, size: int = 20) -> Path:
    """Class folders of PNG images: noise on a colour that tells the class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        below = folder / f"class_{label}"
        below.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = rng.integers(0, 120, (size, size, 3)) + rng.integers(0, 60)
            pixels[..., label % 3] += 70
            Image.fromarray(pixels.astype(np.uint8)).save(below / f"{number:03d}.png")
    return folder


def run_hpm(*arguments, cwd=None, env=None, **options) -> subprocess.CompletedProcess:
    """`hpm ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hpm", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=HANGS,
        env=os.environ | (env or {}),
        **options,
    )


def run_here(*arguments) -> subprocess.CompletedProcess:
    """The same in this process, seconds sooner: unless a process is what is tested."""
    from hpm.commands.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def full_disk(size: int):
    """No file grows beyond `size` bytes, so that writing really fails halfway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """One clear line on stderr with these words, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("hpm: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def stop_after(monkeypatch, steps):
    """Pull the plug when a checkpoint of that step has been written."""
    from hpm.training.run import PretrainingRun

    save = PretrainingRun.save

    def save_and_stop(run):
        save(run)
        if run.step == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(PretrainingRun, "save", save_and_stop)

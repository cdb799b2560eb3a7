"""`hpm demo`: pre-train on the built-in images or videos, measure, draw, and say where to look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hpm.commands.options import DemoConfig
from hpm.core.config import PretrainConfig
from hpm.core.options import make_config, read_preset
from hpm.core.progress import result_console
from hpm.evals import evaluate
from hpm.evals.contract import RANDOM, RAW_PIXELS, TRAINED, Numbers
from hpm.evals.features import CLASS_TOKEN, PATCH_MEAN
from hpm.evals.result import Result, print_hardness, print_result
from hpm.pretraining import run_pretraining
from hpm.show.command import show
from hpm.show.options import ShowConfig
from hpm.show.report import write_report
from hpm.show.run import Run

# What a sentence is said of. On images, the class token is good in some seeds only; on videos, the
# mean of the patches knows less of motion.
OF_IMAGES, OF_VIDEOS = PATCH_MEAN, CLASS_TOKEN
ABOUT_NEIGHBOURS = (
    "Nearest neighbours take the features as they are, without learning which of them matter; "
    "after masked modelling they tell less than a probe."
)
# One pass over this grid takes seconds.
PROBE: dict[str, Any] = {"lr": (0.03, 0.1, 0.3, 1.0), "weight_decay": (0.0,), "epochs": 30}


def demo(config: DemoConfig) -> Run:
    """Pre-train, evaluate and draw. Run it again to resume; a finished run is only evaluated."""
    preset, folder = ("demo_video", "demo-video") if config.video else ("demo", "demo")
    options = read_preset(preset) | {"out": config.out or f"runs/{folder}"}
    if config.steps is not None:
        options["steps"] = config.steps
    if config.seed is not None:
        options["seed"] = config.seed
    run = run_pretraining(make_config(PretrainConfig, options))
    console = result_console()
    figure = _measure_videos(run, console) if config.video else _measure_images(run, console)
    write_report(run.folder)  # with the evaluations
    kind = "videos" if config.video else "images"
    clips = " --frames 16 --patch-size 2,16,16" if config.video else ""
    console.print(
        f"\nreport:      {run.report}\n"
        f"figures:     {figure}, {run.figures}/ (during training)\n"
        f"curves:      tensorboard --logdir {run.folder}\n"
        f"your {kind}: hpm pretrain FOLDER_OF_{kind.upper()}{clips} --out runs/first",
        highlight=False,
        soft_wrap=True,
    )
    return run


def _measure_images(run: Run, console: Console) -> Path:
    """What a linear probe and nearest neighbours know of the classes, and a figure."""
    probe = evaluate("linear", str(run.folder), "demo", **PROBE)
    nearest = evaluate("knn", str(run.folder), "demo")
    figure = _draw(run, "demo")
    print_result(probe, console)
    console.print(verdict("classes", "images", probe, OF_IMAGES), highlight=False, soft_wrap=True)
    console.print(ABOUT_NEIGHBOURS, highlight=False, soft_wrap=True)
    print_result(nearest, console)
    return figure


def _measure_videos(run: Run, console: Console) -> Path:
    """What a linear probe knows of motion, beside what is left of it without motion, and where the
    patches of highest predicted loss lie."""
    folder = str(run.folder)
    moving = evaluate("linear", folder, "demo-video", **PROBE)
    still = evaluate("linear", folder, "demo-video", frame_stride=0, baselines=False, **PROBE)
    hardness = evaluate("hardness", folder, "demo-video").hardness
    print_result(moving, console)
    frame = {"its own features of one frame, repeated": _numbers(still, TRAINED + OF_VIDEOS)}
    text = verdict("motion", "videos", moving, OF_VIDEOS, frame)
    console.print(text, highlight=False, soft_wrap=True)
    print_hardness(hardness, console, clips=True)
    return _draw(run, "demo-video")


def _draw(run: Run, data: str) -> Path:
    return show(ShowConfig(str(run.folder), data, str(run.folder / "demo.png"), images=6))


def verdict(
    what: str,
    kind: str,
    probe: Result,
    features: str,
    further: dict[str, Numbers] | None = None,
) -> str:
    """Whether a linear probe of these features is better than chance, and than one of raw pixels,
    of random weights and of `further` rows, in a sentence. One is above another if their 95 %
    intervals do not overlap."""
    chance = 100 / probe.about["classes"]
    ours = _numbers(probe, TRAINED + features)
    others = {
        "chance": {"top1": chance, "top1_high": chance},
        RAW_PIXELS: _numbers(probe, RAW_PIXELS),
        **(further or {}),
        RANDOM: _numbers(probe, RANDOM + features),
    }
    above: list[str] = []
    not_above: list[str] = []
    for other, numbers in others.items():
        clear = ours["top1_low"] > numbers["top1_high"]
        (above if clear else not_above).append(f"{other} ({numbers['top1']:.1f} %)")
    return (
        f"{what}: by a linear probe, {TRAINED + features} tells {ours['top1']:.1f} % of the {kind} "
        f"({ours['top1_low']:.1f} to {ours['top1_high']:.1f}); "
        f"above: {', '.join(above) or 'none'}; not above: {', '.join(not_above) or 'none'}"
    )


def _numbers(result: Result, name: str) -> Numbers:
    return result.values[name][result.protocol]

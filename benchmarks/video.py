"""Does pre-training on clips help? Fights in surveillance videos, paired over seeds.

    python benchmarks/video.py --minutes 60      # again and again, until it says done
    python benchmarks/video.py --report          # RESULTS.md, as far as it is

Every step is a command of `hpm`; an interrupted one goes on where it was. The protocol below was
written before the first of these runs. It replaces one that shared out the clips by their numbers:
in its first run, scenes of the test were in training with the other label, and every row of the
linear probe was below chance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from calling import call
from evidence import as_arguments
from results import interval, machine, spread, table, write_section
from scipy.sparse.csgraph import connected_components

from hpm.data.video.clip import middle_frame
from hpm.data.video.opening import open_video

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data" / "fight128"
CLASSES = ("fight", "noFight")
SEEDS = 3
SIMILAR = 0.6  # correlation above which two middle frames are of one scene

PROTOCOL = """
- **Data.** fight128: 300 clips of about two seconds, half of them of fights, 64 px. Many show one
  scene, also with both labels, so each seed tests other scenes: clips whose middle frames
  correlate by more than {similar} (32 x 24 pixels, grey) are of one scene, and scenes are shared
  out among {seeds} parts of equal size, half fights. Seed s tests part s; the others pre-train,
  without labels, and train the probes. Over the seeds each clip is tested once.
- **Clips.** 8 frames at a stride of 4, patches of 2 x 8 x 8; vit_nano, {steps} steps of 16 clips,
  90 % hidden in whole tubes, target: normalised pixels. HPM mines tubes by the mean of their
  predicted losses; "random tubes" hides random ones and has no predictor, as VideoMAE.
- **Frames.** The baseline: HPM on random frames of the same clips, patches of 8 x 8, 75 % hidden,
  vit_nano, {image_steps} steps of 64 frames, which is as many patches per step and about as
  much time. Its features are averaged over the frames of a clip.
- **Probes.** `hpm eval linear` and `attentive` with their default grids, on the middle clip of
  each training video; two clips of each test video, whose probabilities are averaged. Random
  weights are measured in both ways: of clips, and of frames.
- **Seeds** 0 to {last}, paired: the same clips, order, crops and initial encoder in both arms of
  clips.
"""

# Peak learning rate of the frames: the best of the experiment on images (2e-3 at a batch of 64);
# of the clips, that divided by the root of the ratio of the batches.
COMMON: dict[str, Any] = {
    "model": "vit_nano",
    "image_size": 64,
    "crop_scale": "0.5,1",
    "holdout": 0,
    "eval_every": "100%",
    "checkpoint_every": "20%",
    "keep_checkpoints": 1,
    "workers": 0,
}
STEPS, IMAGE_STEPS = 500, 360  # chosen so that HPM and the frames take as long on a CPU
SAMPLING = {"frames": 8, "frame_stride": 4}
CLIPS = SAMPLING | {
    "patch_size": "2,8,8",
    "mask_ratio": 0.9,
    "batch_size": 16,
    "base_lr": 1.6e-2,
    "steps": STEPS,
}
ARMS: dict[str, dict[str, Any]] = {
    "HPM": CLIPS | {"mask": "easy_to_hard", "mine_tubes": "mean"},
    "random tubes": CLIPS | {"mask": "tube", "predictor_loss": "none"},
    "frames": {"patch_size": 8, "batch_size": 64, "base_lr": 8e-3, "steps": IMAGE_STEPS},
}
PROBES: dict[str, dict[str, Any]] = {"linear": {"segments": 2}, "attentive": {"segments": 2}}
# Rows of the report: (arm whose evaluation holds it, start of the name of its features), by title.
ROWS = {
    "HPM": ("HPM", "trained"),
    "random tubes": ("random tubes", "trained"),
    "random weights": ("HPM", "random weights"),
    "frames, pooled": ("frames", "trained"),
    "frames, random weights": ("frames", "random weights"),
    "raw pixels": ("HPM", "raw pixels"),
}
PAIRS = (
    ("HPM", "random weights"),
    ("random tubes", "random weights"),
    ("HPM", "random tubes"),
    ("HPM", "frames, pooled"),
    ("frames, pooled", "frames, random weights"),
)


@cache
def scenes(data: Path) -> list[list[tuple[str, str]]]:
    """The (path, class) of the clips of each scene, the largest scenes first."""
    files = [(file, name) for name in CLASSES for file in sorted((data / name).glob("*.mp4"))]
    if not files:
        raise SystemExit(f"{data}: no videos (see --data)")
    frames = [
        middle_frame(open_video(str(file))).convert("L").resize((32, 24)) for file, _ in files
    ]
    pixels = np.stack([np.asarray(frame, float).ravel() for frame in frames])
    alike = np.corrcoef(pixels) > SIMILAR
    scene = connected_components(alike)[1]
    found: list[list[tuple[str, str]]] = [[] for _ in range(scene.max() + 1)]
    for (file, name), number in zip(files, scene, strict=True):
        found[number].append((str(file.resolve()), name))
    return sorted(found, key=len, reverse=True)


def parts(data: Path) -> list[list[tuple[str, str]]]:
    """The clips of each part: every scene goes to the part with the fewest clips of its class."""
    found: list[list[tuple[str, str]]] = [[] for _ in range(SEEDS)]
    for scene in scenes(data):
        counts = [sum(b in {name for _, name in scene} for _, b in part) for part in found]
        found[counts.index(min(counts))] += scene
    return found


def write_fold(data: Path, seed: int, out: Path) -> tuple[Path, Path]:
    """Lists of the videos to learn from and to test on."""
    lists: tuple[list[str], list[str]] = [], []
    for number, part in enumerate(parts(data)):
        lists[number == seed].extend(f"{path} {name}" for path, name in part)
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"train_{seed}.txt", out / f"test_{seed}.txt"
    for path, lines in zip(paths, lists, strict=True):
        path.write_text("\n".join(lines) + "\n")
    return paths


def commands(arm: str, seed: int, chosen: argparse.Namespace) -> Iterator[list[str]]:
    """The arguments of `hpm` that remain for this arm and seed, in order."""
    train, test = write_fold(chosen.data, seed, chosen.out)
    run = folder(arm, seed, chosen)
    if not (run / "backbone.safetensors").exists():
        options = COMMON | ARMS[arm] | {"seed": seed}
        if chosen.steps:
            options["steps"] = chosen.steps
        yield ["pretrain", str(train), "--out", str(run), *as_arguments(options)]
    for probe, options in PROBES.items():
        out = run / probe
        if not list(out.glob("*.json")):
            options = options | SAMPLING | {"test": test, "seed": seed, "out": out, "workers": 0}
            yield ["eval", probe, str(run), str(train), *as_arguments(options)]


def folder(arm: str, seed: int, chosen: argparse.Namespace) -> Path:
    return chosen.out / arm.replace(" ", "_") / f"seed_{seed}"


def run(chosen: argparse.Namespace) -> bool:
    """Run what has no numbers yet, seed by seed, until the time is up. Returns whether all is
    done."""
    end = time.monotonic() + 60 * chosen.minutes
    known = keep(chosen)
    for seed in range(SEEDS):
        for arm in ARMS:
            if str(seed) in known.get(arm, {}):
                continue
            for command in commands(arm, seed, chosen):
                log = folder(arm, seed, chosen).with_suffix(".log")
                if not call(command, log, end):
                    return False
                what = command[1] if command[0] == "eval" else command[0]
                print(f"{time.strftime('%H:%M')} {arm}, seed {seed}: {what}", flush=True)
            keep(chosen)
    return True


def keep(chosen: argparse.Namespace) -> dict[str, Any]:
    """Add the numbers of finished runs to those of the results file."""
    known = json.loads(chosen.results.read_text()) if chosen.results.exists() else {}
    for arm in ARMS:
        for seed in range(SEEDS):
            if found := measured(folder(arm, seed, chosen), ARMS[arm]["batch_size"]):
                known.setdefault(arm, {})[str(seed)] = found
    chosen.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known


def measured(run: Path, batch_size: int) -> dict[str, Any] | None:
    """Top-1 by probe and features, and minutes of training; None if it is not finished."""
    files = {probe: list((run / probe).glob("*.json")) for probe in PROBES}
    if not all(files.values()):
        return None
    found: dict[str, Any] = {
        probe: {
            features: settings[probe]["top1"]
            for features, settings in json.loads(file[0].read_text())["values"].items()
        }
        for probe, file in files.items()
    }
    return found | {"minutes": training_minutes(run, batch_size)}


def training_minutes(run: Path, batch_size: int) -> float:
    """By the clock, without measurements, figures and steps that were made again."""
    seconds, before = 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "images_per_second" in entry and entry["step"] > before:
            seconds += (entry["step"] - before) * batch_size / entry["images_per_second"]
            before = entry["step"]
    return seconds / 60


def report(chosen: argparse.Namespace) -> None:
    known = keep(chosen)
    seeds = sorted(set.intersection(*(set(known.get(arm, {})) for arm in ARMS)))
    if not seeds:
        raise SystemExit("no seed has been finished yet")
    sections = []
    for probe in PROBES:
        found = {
            (title, kind): values
            for title, (arm, start) in ROWS.items()
            for kind, values in by_kind(known[arm], seeds, probe, start).items()
        }
        kinds = sorted({kind for _, kind in found if kind})
        rows = [
            [
                title,
                *[
                    spread(found.get((title, kind), found.get((title, ""), [])))
                    for kind in kinds or [""]
                ],
            ]
            for title in ROWS
        ]
        pairs = [
            [
                f"{first} minus {second}",
                *[
                    interval(
                        [a - b for a, b in zip(found[first, k], found[second, k], strict=True)]
                    )
                    for k in kinds or [""]
                ],
            ]
            for first, second in PAIRS
        ]
        head = [f"{probe} probe, top-1 in %", *(kinds or ["patches"])]
        sections.append(table(head, [*rows, *pairs]))
    minutes = {arm: spread([known[arm][seed]["minutes"] for seed in seeds]) for arm in ARMS}
    write_section(
        "video",
        "## Clips: fight128\n\n"
        f"`python benchmarks/video.py` on {machine()}, one thread, beside other work.\n"
        + PROTOCOL.format(
            similar=SIMILAR, seeds=SEEDS, steps=STEPS, image_steps=IMAGE_STEPS, last=SEEDS - 1
        )
        + "\nMean ± standard deviation over the seeds; differences as mean ± half of the 95 % "
        "t-interval. A difference that is smaller than the number after ± is not significant. "
        f"Seeds: {len(seeds)}. Chance is 50 %.\n\n"
        + "\n\n".join(sections)
        + "\n\nMinutes of training: "
        + ", ".join(f"{arm} {value}" for arm, value in minutes.items())
        + ".",
    )


def by_kind(
    by_seed: dict[str, Any], seeds: list[str], probe: str, start: str
) -> dict[str, list[float]]:
    """Top-1 over the seeds by kind of features (class token, patch mean; "" where there is one)."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for features, top1 in by_seed[seed][probe].items():
            if features.startswith(start):
                kind = features.removeprefix(start).removesuffix(", mean of frames")
                found.setdefault(kind.removeprefix(", "), []).append(top1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/video"))
    parser.add_argument("--results", type=Path, default=FOLDER / "video.json")
    parser.add_argument("--minutes", type=float, default=9, help="of this piece")
    parser.add_argument("--steps", type=int, help="of pre-training, to try the script")
    parser.add_argument("--report", action="store_true", help="write the report alone")
    chosen = parser.parse_args()
    if not chosen.report:
        done = run(chosen)
        print("done" if done else "time is up: run the same command again to resume")
    report(chosen)


if __name__ == "__main__":
    main()

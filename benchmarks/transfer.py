"""Do the features help where it counts? Segmentation and detection, paired over seeds.

    python benchmarks/transfer.py --minutes 60      # again and again, until it says done
    python benchmarks/transfer.py --report          # RESULTS.md, as far as it is

It evaluates runs of MAE and HPM that `evidence.py` trained, beside random weights, each seed with
another order, other crops and other initial heads. Each job is one command of `hpm eval`; its
training goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from calling import call
from evidence import as_arguments
from results import interval, machine, spread, table, write_section

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data"
FEATURES = {"trained": "HPM", "compared": "MAE", "random weights": "random weights"}


class Job(NamedTuple):
    """An evaluation: its protocol, data, options and numbers (title: what is measured, name)."""

    protocol: str
    data: str
    options: dict[str, Any]
    numbers: dict[str, tuple[str, str]]


DETECTION = {
    "image_size": 128,
    "batch_size": 4,
    "steps": 200,
    "lr": 1e-3,
    "layer_decay": 0.9,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "channels": 64,
    "proposals": 100,
    "box_batch_size": 32,
    "max_test_images": 100,
}
IOU = {"mean IoU": ("", "mean_iou")}
AP = {"box AP": (", boxes", "AP"), "box AP50": (", boxes", "AP50"), "mask AP": (", masks", "AP")}
# Chosen for the time that they take on two cores, before the first of these runs; the learning rate
# of detection is that of a training by heart (tests/evals/test_detect.py).
JOBS = {
    "CamVid, linear head": Job("segment", "camvid", {"ignored": 11, "steps": 200}, IOU),
    "CamVid, UPerNet": Job(
        "segment",
        "camvid",
        {
            "ignored": 11,
            "head": "upernet",
            "steps": 150,
            "image_size": 96,
            "batch_size": 8,
            "peak_lr": 1e-4,
            "layer_decay": 0.9,
            "channels": 64,
        },
        IOU,
    ),
    "pennfudan, Mask R-CNN": Job("detect", "pennfudan", DETECTION, AP),
    "coco_mini, Mask R-CNN": Job("detect", "coco_mini", DETECTION, AP),
}


def command(name: str, seed: int, chosen: argparse.Namespace) -> list[str]:
    """The arguments of `hpm`."""
    job = JOBS[name]
    data = chosen.data / job.data
    options = dict(job.options)
    options |= {"compare": chosen.runs / f"MAE/seed_{seed}", "seed": seed, "workers": 0}
    options |= {"out": folder(name, seed, chosen), "baselines": "true"}
    if job.protocol == "segment":
        options["test"] = data / "test"
    run = chosen.runs / f"HPM/seed_{seed}"
    return ["eval", job.protocol, str(run), str(data), *as_arguments(options)]


def folder(name: str, seed: int, chosen: argparse.Namespace) -> Path:
    return chosen.out / name.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"


def measured(name: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any] | None:
    """What a finished job has measured, by features and number; None if it is not finished."""
    files = list(folder(name, seed, chosen).glob("*.json"))
    if not files:
        return None
    values = json.loads(files[0].read_text())["values"]
    return {
        title: {
            number: next(iter(values[key + suffix].values()))[value]
            for number, (suffix, value) in JOBS[name].numbers.items()
        }
        for key, title in FEATURES.items()
    }


def run(chosen: argparse.Namespace) -> bool:
    """Run the open jobs, seed by seed, until the time is up. Returns whether all are done."""
    end = time.monotonic() + 60 * chosen.minutes
    for seed in range(chosen.seeds):
        for name in chosen.jobs:
            if measured(name, seed, chosen):
                continue
            log = folder(name, seed, chosen) / "log.txt"
            if not call(command(name, seed, chosen), log, end):
                return False
            keep(chosen)
            print(f"{time.strftime('%H:%M')} {name}, seed {seed}", flush=True)
    return True


def keep(chosen: argparse.Namespace) -> dict[str, Any]:
    """Add the numbers of finished jobs to those of the results file."""
    known = json.loads(chosen.results.read_text()) if chosen.results.exists() else {}
    for name in JOBS:
        for seed in range(chosen.seeds):
            if found := measured(name, seed, chosen):
                known.setdefault(name, {})[str(seed)] = found
    chosen.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known


def report(chosen: argparse.Namespace) -> None:
    known, rows, commands = keep(chosen), [], []
    for name, by_seed in known.items():
        for number in JOBS[name].numbers:
            found = {
                title: [values[title][number] for values in by_seed.values()]
                for title in FEATURES.values()
            }
            pairs = [
                interval([a - b for a, b in zip(found[first], found[second], strict=True)])
                for first, second in (
                    ("HPM", "random weights"),
                    ("MAE", "random weights"),
                    ("HPM", "MAE"),
                )
            ]
            spreads = [spread(values) for values in found.values()]
            rows.append([f"{name}: {number}", str(len(by_seed)), *spreads, *pairs])
        options = " ".join(
            as_arguments(JOBS[name].options | {"compare": "MAE", "baselines": "true"})
            + (["--test=" + JOBS[name].data + "/test"] if JOBS[name].protocol == "segment" else [])
        )
        commands.append(
            f"- {name}: `hpm eval {JOBS[name].protocol} HPM {JOBS[name].data} {options}`"
        )
    head = ["in %", "seeds", *FEATURES.values()]
    head += ["HPM minus random", "MAE minus random", "HPM minus MAE"]
    write_section(
        "transfer",
        "## Segmentation and detection\n\n"
        f"`python benchmarks/transfer.py` on {machine()}, beside other work.\n\n"
        "The encoders are those of [the experiment](#does-mining-help): vit_nano, 10 epochs on "
        "20,000 images of 64 px. Each seed has encoders of its own, and another order, other "
        "crops and other initial heads. The trainings are short, because two cores made them.\n\n"
        "Mean ± standard deviation over the seeds; differences as mean ± half of the 95 % "
        "t-interval. A difference that is smaller than the number after ± is not significant.\n\n"
        f"{table(head, rows)}\n\n" + "\n".join(commands),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", default=list(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="of evidence.py")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--results", type=Path, default=FOLDER / "transfer.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9, help="of this piece")
    parser.add_argument("--report", action="store_true", help="write the report alone")
    chosen = parser.parse_args()
    if not chosen.report:
        done = run(chosen)
        print("done" if done else "time is up: run the same command again to resume")
    report(chosen)


if __name__ == "__main__":
    main()

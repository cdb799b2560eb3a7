"""Continued training on one's own images, against training from nothing, paired over seeds.

    python benchmarks/continued.py --minutes 60     # again and again, until it says done
    python benchmarks/continued.py --report         # RESULTS.md, as far as it is

Every step is a command of `hpm` in a separate process. Results are kept in --results and runs in
--out; an interrupted run resumes. The protocol below was fixed before the first evaluation, except
for the outcome of the choice in it. Backbones and trainings had been longer, and by HPM, until the
first of them showed how slow the machine was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from calling import call
from evidence import as_arguments
from results import interval, machine, mean_and_half, spread, table, write_section

PROTOCOL = """
- **Backbones.** vit_nano, 64 px, patches of 8 pixels, one for each seed: plain MAE on the first
  {rows} training rows of 100 classes of Tiny ImageNet, {epochs} epochs in batches of 128, base lr
  4e-3. Only the encoder is kept (`backbone.safetensors`).
- **Own images.** The 3,457 training photographs of flowers, without their labels; plain MAE,
  {steps} steps in batches of 64, all other options at their defaults.
- **Arms.** From scratch (random weights); the backbone, unchanged; the backbone, continued with the
  defaults (`--init backbone.safetensors --init-partial`); the same with the defaults of a run from
  scratch (`--freeze-encoder 0% --layer-decay 1`).
- **Choice of the default base lr**: 1, 1/4 and 1/10 of that of a run from scratch, with the
  backbone of seed 0, but another order and other crops; judged by the linear probe on a fifth of
  the labels of the training photographs, fitted on the others. The best, 1, became the default
  before the arms were trained.
- **Seeds** 0 to {last}, paired: the same backbone, order and crops in every arm of a seed.
- **Measures.** Top-1 on the 860 validation photographs by a linear probe and kNN (k = 20), both on
  the mean of the patches.
"""

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data"
TUNING_SEED = 100
SHARES = (1.0, 0.25, 0.1)  # of the base lr of a run from scratch
MODEL = {"model": "vit_nano", "image_size": 64, "patch_size": 8}
RECORD = {"holdout": 0, "workers": 0, "keep_checkpoints": 1, "log_every": 50, "eval_every": "100%"}
PLAIN_MAE: dict[str, Any] = {"mask": "random", "predictor_loss": "none"}
BACKBONE: dict[str, Any] = PLAIN_MAE | {"base_lr": 4e-3, "batch_size": 128}
OWN: dict[str, Any] = PLAIN_MAE | {"batch_size": 64}
SCRATCH, AS_IS = "from nothing", "backbone as it is"
CONTINUED, UNSUITED = "continued", "continued as from nothing"
ARMS = (SCRATCH, AS_IS, CONTINUED, UNSUITED)  # as the results file names them
TITLES = {
    SCRATCH: "from scratch",
    AS_IS: "backbone, unchanged",
    CONTINUED: "continued",
    UNSUITED: "continued, from-scratch defaults",
}
PAIRS = (
    (CONTINUED, SCRATCH),
    (CONTINUED, AS_IS),
    (CONTINUED, UNSUITED),
    (AS_IS, SCRATCH),
    (UNSUITED, AS_IS),
)
MEASURES = {"linear": "linear probe, top-1", "knn": "kNN, top-1"}


class Job(NamedTuple):
    """A command of `hpm` to run once. done: a file that it writes when it is finished."""

    name: str
    arguments: list[str]
    done: Path


class Experiment:
    """The jobs, in their order, and their results."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen, self.out = chosen, chosen.out
        self.flowers = chosen.data / "flowers"

    def jobs(self) -> list[Job]:
        """All jobs: the choice of the rate, then seed by seed, so that what is there is pairs."""
        arms = [(arm, seed) for seed in range(self.chosen.seeds) for arm in ARMS]
        return self.tuning() + [job for arm, seed in arms for job in self.arm(arm, seed)]

    def arm(self, arm: str, seed: int) -> list[Job]:
        run = self.folder(arm, seed)
        if arm == AS_IS:
            train = self.backbone(seed)
        else:
            train = self.training(run, seed, seed, self.options(arm))
        measures = [self.measure(run, m, self.flowers, None) for m in MEASURES]
        return [train, *measures]

    def tuning(self) -> list[Job]:
        """The jobs of the choice of the rate, with a backbone that the arms have, too."""
        jobs = [self.backbone(0)]
        fit, held = self.lists()
        for share in SHARES:
            run = self.folder(f"share {share:g}", TUNING_SEED)
            rate = {"base_lr": share * self.scratch_lr()}
            jobs.append(self.training(run, TUNING_SEED, 0, rate))
            jobs.append(self.measure(run, "linear", fit, held))
        return jobs

    def backbone(self, seed: int) -> Job:
        run = self.folder(AS_IS, seed)
        rows = self.out / "rows.parquet"
        options = {"out": run, "epochs": self.chosen.epochs, "seed": seed} | BACKBONE
        return self._pretrain(run, rows, options)

    def training(self, run: Path, seed: int, backbone: int, options: dict[str, Any]) -> Job:
        """Training on the photographs: from the backbone of a seed, unless the options say no."""
        weights = self.folder(AS_IS, backbone) / "backbone.safetensors"
        start = {"init": weights, "init_partial": "true"}
        options = {"out": run, "steps": self.chosen.steps, "seed": seed} | OWN | start | options
        return self._pretrain(run, self.flowers, options)

    def options(self, arm: str) -> dict[str, Any]:
        """The options of an arm beside those of all."""
        unsuited = {"freeze_encoder": "0%", "layer_decay": 1}
        each: dict[str, dict[str, Any]]
        each = {SCRATCH: {"init": None}, CONTINUED: {}, UNSUITED: unsuited}
        return each[arm]

    def scratch_lr(self) -> float:
        """The default base lr of a training from nothing of this length."""
        from hpm.training.schedule import default_base_lr

        return default_base_lr(self.chosen.steps, OWN["batch_size"])

    def measure(self, run: Path, protocol: str, data: Path, test: Path | None) -> Job:
        options: dict[str, Any] = {"out": run / protocol, "baselines": "false", "workers": 0}
        options |= {"k": "[20]"} if protocol == "knn" else {}
        options |= {} if test is None else {"test": test}
        arguments = ["eval", protocol, str(run), str(data), *as_arguments(options)]
        return Job(f"{run.parent.name}, {run.name}, {protocol}", arguments, run / protocol)

    def _pretrain(self, run: Path, data: Path, options: dict[str, Any]) -> Job:
        given = {n: v for n, v in (MODEL | RECORD | options).items() if v is not None}
        if "init" not in given:
            given.pop("init_partial", None)
        arguments = ["pretrain", str(data), *as_arguments(given)]
        return Job(f"{run.parent.name}, {run.name}", arguments, run / "backbone.safetensors")

    def folder(self, arm: str, seed: int) -> Path:
        return self.out / arm.replace(" ", "_") / f"seed_{seed}"

    def lists(self) -> tuple[Path, Path]:
        """Lists of the labelled training photographs: four fifths, and every fifth."""
        return self.out / "fit.txt", self.out / "held.txt"

    def prepare(self) -> None:
        """Write the rows of the backbones, and the lists."""
        import pyarrow.parquet as pq

        self.out.mkdir(parents=True, exist_ok=True)
        rows = self.out / "rows.parquet"
        if not rows.exists():
            (file,) = (self.chosen.data / "tin100").glob("train*.parquet")
            part = pq.read_table(file).slice(0, self.chosen.rows)
            pq.write_table(part, rows.with_suffix(".tmp"), row_group_size=1024)
            rows.with_suffix(".tmp").replace(rows)
        paths = sorted((self.flowers / "train").resolve().glob("*/*.jpg"))
        lines = [f"{path} {path.parent.name}\n" for path in paths]
        fit, held = self.lists()
        fit.write_text("".join(line for n, line in enumerate(lines) if n % 5))
        held.write_text("".join(lines[::5]))

    def run(self) -> bool:
        """Run the open jobs until the time is up. Returns whether all are done."""
        end = time.monotonic() + 60 * self.chosen.minutes
        self.prepare()
        for job in self.jobs():
            if finished(job):
                continue
            log = job.done.parent.with_suffix(".log")
            if not call(job.arguments, log, end):
                return False
            self.keep()
            print(f"{time.strftime('%H:%M')} {job.name}", flush=True)
        return True

    def keep(self) -> dict[str, Any]:
        """Add the numbers of finished jobs to those of the results file."""
        file = self.chosen.results
        known = json.loads(file.read_text()) if file.exists() else {}
        settings = {name: getattr(self.chosen, name) for name in ("rows", "epochs", "steps")}
        known |= {"settings": settings}
        arms = [(arm, seed) for arm in ARMS for seed in range(self.chosen.seeds)]
        arms += [(f"share {share:g}", TUNING_SEED) for share in SHARES]
        for arm, seed in arms:
            for measure in MEASURES:
                if (top1 := measured(self.folder(arm, seed) / measure)) is not None:
                    known.setdefault(arm, {}).setdefault(str(seed), {})[measure] = top1
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return known


def finished(job: Job) -> bool:
    return job.done.is_file() or bool(list(job.done.glob("*.json")))


def measured(folder: Path) -> float | None:
    """Top-1 on the mean of the patches, from an evaluation's file; None if there is none."""
    files = list(folder.glob("*.json"))
    if not files:
        return None
    values = json.loads(files[0].read_text())["values"]
    return next(iter(values["trained, patch mean"].values()))["top1"]


def differences_of(known: dict[str, Any], measure: str, pair: tuple[str, str]) -> list[float]:
    """Differences of two arms, seed by seed."""
    first, second = (known.get(arm, {}) for arm in pair)
    both = [seed for seed in sorted(first) if measure in first[seed].keys() & second.get(seed, {})]
    return [first[seed][measure] - second[seed][measure] for seed in both]


def summary(known: dict[str, Any]) -> str:
    """What the linear probe says about continuing, in words."""
    against = {
        (CONTINUED, SCRATCH): "a run of as many steps from scratch",
        (CONTINUED, AS_IS): "the backbone that it starts from",
        (CONTINUED, UNSUITED): "the same with the defaults of a run from scratch",
    }
    said = []
    for pair, name in against.items():
        values = differences_of(known, "linear", pair)
        if len(values) < 2:
            return "The measurement is not complete yet."
        mean, half = mean_and_half(values)
        verdict = "is better than" if mean > 0 else "is worse than"
        if abs(mean) <= half:
            verdict = "does not differ significantly from"
        said.append(f"{verdict} {name} ({mean:+.1f} ± {half:.1f} points)")
    settings = known["settings"]
    return (
        "Measured on 3,457 photographs of flowers, with a vit_nano of 64 px that plain MAE had "
        f"pre-trained on {settings['rows']:,} images of Tiny ImageNet, over {len(values)} seeds, "
        f"by a linear probe (with 95 % t-intervals): training continued for {settings['steps']} "
        f"steps {'; it '.join(said)}."
    )


def report(experiment: Experiment) -> None:
    known = experiment.keep()
    rows, differences = [], []
    for measure, title in MEASURES.items():
        found = {
            arm: {seed: v[measure] for seed, v in known.get(arm, {}).items() if measure in v}
            for arm in ARMS
        }
        seeds = str(len(found[CONTINUED]))
        rows.append([title, seeds, *[spread(list(by_seed.values())) for by_seed in found.values()]])
        pairs = [interval(differences_of(known, measure, pair)) for pair in PAIRS]
        differences.append([title, *pairs])
    write_section(
        "continued",
        f"{summary(known)}\n\nTop-1 in %, mean ± standard deviation over the seeds:\n\n"
        f"{table(['', 'seeds', *TITLES.values()], rows)}\n\n"
        "[RESULTS.md](../benchmarks/RESULTS.md#continued-training-on-ones-own-images) has the "
        "protocol and the paired differences.",
        FOLDER.parent / "docs" / "recipes.md",
    )
    shares = [
        [f"{share:g}", f"{values['linear']:.1f}"]
        for share in SHARES
        for values in known.get(f"share {share:g}", {}).values()
    ]
    settings = known["settings"]
    protocol = PROTOCOL.format(last=experiment.chosen.seeds - 1, **settings).strip()
    write_section(
        "continued",
        "## Continued training on one's own images\n\n"
        f"`python benchmarks/continued.py` on {machine()}, one thread, beside other work.\n\n"
        f"{protocol}\n\n"
        "Top-1 in %, mean ± standard deviation over the seeds:\n\n"
        f"{table(['', 'seeds', *TITLES.values()], rows)}\n\n"
        "Paired differences in points, mean ± half of the 95 % t-interval:\n\n"
        + table(["", *[f"{TITLES[a]} minus {TITLES[b]}" for a, b in PAIRS]], differences)
        + "\n\nThe choice of the default base lr, as a share of that of a run from scratch "
        "(linear probe on held-out training labels):\n\n" + table(["share", "top-1"], shares),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/continued"))
    parser.add_argument("--results", type=Path, default=FOLDER / "continued.json")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3, help="of the backbones")
    parser.add_argument("--steps", type=int, default=600, help="on the own images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9, help="of this piece")
    parser.add_argument("--report", action="store_true", help="write the report alone")
    chosen = parser.parse_args()
    experiment = Experiment(chosen)
    if not chosen.report:
        done = experiment.run()
        print("done" if done else "time is up: run the same command again to resume")
    report(experiment)


if __name__ == "__main__":
    main()

"""Does mining help? Masked autoencoders with and without mining, paired over seeds.

    python benchmarks/evidence.py --minutes 60          # again and again, until it says done
    python benchmarks/evidence.py --timing              # once, after tuning; nothing else may run
    python benchmarks/evidence.py --report              # RESULTS.md and the figure, as far as it is

On a GPU (data: a folder with the two parquet files of tin100):
    python benchmarks/evidence.py --data DATA --model vit_small --rows 37000 --epochs 100 \
        --side-by-side 8 --minutes 8

Every step is a command of `hpm` in a separate process. Results are kept in --results and runs in
--out; an interrupted run resumes. The protocol below was written before the first run and has not
been changed since; DEPARTURES says what was done otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import interval, machine, mean_and_half, spread, table, write_section

PROTOCOL = """
- **Data.** 100 classes of Tiny ImageNet, 64 px. Pre-training on the first {rows} training rows,
  probes on the labels of the same rows. Test: the 13,000 training rows from 37,000 on and the
  5,000 of validation, 18,000 images that no choice ever sees. Choices are judged on the
  training rows 30,000 to 34,999 ({rows} rows or fewer pre-train) or on a held-out fifth of the
  training labels (more).
- **Model.** {model}, patches of 8 pixels, batch 128, {epochs} epochs, target: normalised
  pixels, in every arm but the two of raw pixels.
- **Arms.** MAE; the predictor's loss with random masks; HPM (easy to hard); HPM by memory,
  without a predictor; green noise (ColorMAE), a mask that needs no learning; MAE for as long as
  HPM takes, in steps, by the measured ratio of their steps; MAE and HPM with raw pixels.
- **Tuning**, for each arm alike, on seeds from 100 on: half of the epochs, linear probe. Base
  learning rate 2e-3, 4e-3, 8e-3, extended by factors of 2 until the best is inside the grid;
  where the best two differ by less than 0.5 points, a second seed decides. Then the mask ratio
  of MAE (0.65, 0.75, 0.85) and the hard share of HPM at the end of training (0.25, 0.5) at the
  best learning rate.
- **Seeds** 0 to 6, paired: the same order, crops and initial encoder in every arm. Reported:
  the mean of the paired differences to MAE with its 95 % t-interval.
- **Primary measures.** Top-1 of a linear probe on the mean of the patches; mean IoU of a linear
  head on frozen patch features of CamVid. Secondary: kNN (k = 20), attentive probe.
- **Order of work**: tuning and seeds of MAE and HPM, then predictor, memory, equal time, green
  noise, raw pixels; so that what is there is complete pairs.
"""

# What was done otherwise, and when.
DEPARTURES = """
- **Order of work.** When all pairs of MAE and HPM were known (2026-11-26), equal time was moved
  before the predictor's arm (`--first`), because it is what a user who must choose wants to know;
  then, when four of its pairs were known, memory before the others, because it costs no time. When
  four pairs of memory for as many steps as that were known (2026-11-27), the other ways to mine, by
  memory, came before the last pairs.
- **Arms added** when two seeds of memory were known, both ahead of MAE by linear probe and kNN:
  memory for as many steps as MAE for HPM's time has, to see whether longer training keeps what it
  gains; and the three other ways to mine, by memory too.
- **MAE with the mask ratio of HPM**, 0.75, was added when two seeds of the predictor's arm were
  known (2026-11-27). Only MAE's ratio was tuned (0.85), so that the other arms differ from it in
  the ratio too. The predictor's loss beside mining by memory was added then, because each alone
  was ahead of MAE at its tuned ratio. Both before any result of MAE at 0.75.
- **Two kinds of CPU.** MAE at 0.75, the predictor's arm, green noise and the predictor's loss with
  mining by memory were trained on an Intel Xeon, the arms before them on an AMD EPYC. Pairs across
  the two share order, crops and initial encoder, but not the rounding of their sums.
- **The ratio of the steps**, which gives MAE for HPM's time its length ({ratio:.2f}), was measured
  with a mask ratio of 0.75 for both. MAE's tuned one is 0.85, which makes its step faster. Measured
  afterwards at each arm's own setting, in turns, a step of HPM takes {HPM} times as long as MAE's,
  one of memory {memory} times, and one of the predictor's loss with random masks {predictor} times.
  So MAE could have had more steps in HPM's time.
- **Memory** was tuned by learning rate only, as the protocol says: its mask ratio (0.75) and hard
  share (0.5) are the defaults.
"""

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data" / "tin100"
CAMVID = DATA.with_name("camvid")
SEEDS, TUNING_SEEDS = range(7), (100, 101)
RATES, FACTOR, CLOSE = (2e-3, 4e-3, 8e-3), 2.0, 0.5
# Ways to mine that may be better: one option changed, two seeds each. Temperature and unit were
# chosen before the first run.
WAYS: dict[str, dict[str, Any]] = {
    "sampled": {"mining_temperature": 1.0},
    "progress": {"mine_by": "progress"},
    "units": {"mask_unit": 2},
}
MINED = {"mask": "easy_to_hard", "predictor_loss": "relative"}
PLAIN = {"mask": "random", "predictor_loss": "none"}
REMEMBERED = {"mask": "easy_to_hard", "mine_by": "memory", "predictor_loss": "none"}
EQUAL_TIME, LONGER_MEMORY = "MAE, HPM's time", "memory, HPM's time"
SAME_RATIO, BOTH = "MAE, ratio 0.75", "memory, predictor's loss"
METHODS: dict[str, dict[str, Any]] = {
    "MAE": PLAIN,
    "HPM": MINED,
    "predictor": {"mask": "random", "predictor_loss": "relative"},
    "memory": REMEMBERED,
    EQUAL_TIME: PLAIN,
    LONGER_MEMORY: REMEMBERED,
    SAME_RATIO: PLAIN | {"mask_ratio": 0.75},
    "green noise": {"mask": "green_noise", "predictor_loss": "none"},
    "MAE, raw pixels": PLAIN | {"target": "pixels"},
    "HPM, raw pixels": MINED | {"target": "pixels"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"memory, {way}": REMEMBERED | changed for way, changed in WAYS.items()},
    BOTH: REMEMBERED | {"predictor_loss": "relative"},
    **{f"HPM, {way}": MINED | changed for way, changed in WAYS.items()},
}
ARMS = METHODS | VARIANTS
VARIANT_SEEDS = range(2)
STEP_ROUNDS = 5
PAIR = ("MAE", "HPM")  # whose seeds come first
# Whose best setting an arm takes: that of the arm that it changes.
TUNED_AS = {
    EQUAL_TIME: "MAE",
    LONGER_MEMORY: "memory",
    SAME_RATIO: "MAE",
    **{name: name.split(",")[0] for name in VARIANTS},
}
LONGER = (EQUAL_TIME, LONGER_MEMORY)
TITLES = {
    "predictor": "predictor's loss, random masks",
    "memory": "HPM by memory, no predictor",
    "green noise": "green noise (ColorMAE)",
    EQUAL_TIME: "MAE for as long as HPM takes",
    LONGER_MEMORY: "HPM by memory, as many steps as that",
    SAME_RATIO: "MAE with mask ratio 0.75",
    BOTH: "HPM by memory, with the predictor's loss",
    "HPM, sampled": "HPM, mined patches sampled (temperature 1)",
    "HPM, progress": "HPM by the progress of the loss",
    "HPM, units": "HPM over units of 2 x 2 patches",
    "memory, sampled": "HPM by memory, mined patches sampled (temperature 1)",
    "memory, progress": "HPM by the progress of the loss, no predictor",
    "memory, units": "HPM by memory, over units of 2 x 2 patches",
}
# Rows of the figure, by what they have in common, and their names there.
BLOCKS = {
    "After as many epochs": ("MAE", SAME_RATIO, "predictor", "HPM", "memory", "green noise"),
    "After HPM's time": ("HPM", EQUAL_TIME, LONGER_MEMORY),
    "Raw pixels as target": ("MAE, raw pixels", "HPM, raw pixels"),
    "Ways to mine by memory": ("memory", *(f"memory, {way}" for way in WAYS), BOTH),
    "Ways to mine by the predictor": ("HPM", *(f"HPM, {way}" for way in WAYS)),
}
SHORT = {
    SAME_RATIO: "MAE, mask ratio 0.75",
    "predictor": "predictor's loss, random masks",
    "memory": "HPM by memory",
    EQUAL_TIME: "MAE",
    LONGER_MEMORY: "HPM by memory, steps as MAE",
    "MAE, raw pixels": "MAE",
    "HPM, raw pixels": "HPM",
    **{name: name.split(", ")[1] for name in VARIANTS},
    BOTH: "with the predictor's loss",
}
# The README's table: (title, arm, what it is compared with)
SUMMARY = (
    ("HPM minus MAE ({tuned:g}, as tuned)", "HPM", "MAE"),
    ("HPM by memory minus MAE ({tuned:g})", "memory", "MAE"),
    ("MAE (0.75) minus MAE ({tuned:g})", SAME_RATIO, "MAE"),
    ("HPM minus MAE (0.75)", "HPM", SAME_RATIO),
    ("HPM by memory minus MAE (0.75)", "memory", SAME_RATIO),
    ("predictor's loss with random masks minus MAE (0.75)", "predictor", SAME_RATIO),
    ("HPM minus predictor's loss with random masks: mining alone", "HPM", "predictor"),
    ("green noise minus MAE (0.75)", "green noise", SAME_RATIO),
    ("HPM minus MAE ({tuned:g}) in HPM's time", "HPM", EQUAL_TIME),
    ("HPM by memory minus that MAE, with as many steps", LONGER_MEMORY, EQUAL_TIME),
)
IN_README = ("linear", "segment", "knn")
# (arm, what it is compared with)
COMPARISONS = dict.fromkeys(
    (
        *(
            (name, "MAE")
            for name in METHODS
            if name not in ("MAE", "MAE, raw pixels", "HPM, raw pixels", LONGER_MEMORY)
        ),
        *((arm, base) for _, arm, base in SUMMARY),
        ("memory", "HPM"),
        ("HPM, raw pixels", "MAE, raw pixels"),
        *((name, TUNED_AS[name]) for name in VARIANTS),
    )
)
ALSO_TUNED = {"MAE": ("mask_ratio", (0.65, 0.75, 0.85)), "HPM": ("hard_share_end", (0.25, 0.5))}
DEFAULTS = {"mask_ratio": 0.75, "hard_share_end": 0.5}
MEASURES = {
    "linear": "linear probe, top-1",
    "segment": "CamVid, mean IoU",
    "knn": "kNN, top-1",
    "attentive": "attentive probe, top-1",
}
CHECKPOINTS = 10  # of the runs in which objects are looked for


@dataclass(frozen=True)
class Job:
    """A pre-training and its evaluations. key: name of its results."""

    key: str
    run: Path
    options: tuple[tuple[str, Any], ...]
    measures: tuple[tuple[str, ...], ...]  # arguments of `hpm eval`, and of `--objects`

    def commands(self, data: Path) -> Iterator[list[str]]:
        """The commands that remain to be run, in order."""
        if not (self.run / "backbone.safetensors").exists():
            train = data / "train.parquet"
            yield [
                "-m",
                "hpm",
                "pretrain",
                str(train),
                "--out",
                str(self.run),
                *as_arguments(dict(self.options)),
            ]
        for protocol, test in self.measures:
            out = self.run / protocol
            if protocol == "objects" and not (self.run / "objects.json").exists():
                yield [__file__, "--objects", str(self.run), "--data", str(data)]
            elif protocol == "segment" and not list(out.glob("*.json")):
                camvid = Path(test)
                options = {"test": camvid / "test", "out": out, "baselines": "false"}
                options |= {"ignored": 11, "steps": 200, "figure_images": 0, "workers": 0}
                command = ["-m", "hpm", "eval", "segment", str(self.run), str(camvid)]
                yield [*command, *as_arguments(options)]
            elif protocol != "objects" and not list(out.glob("*.json")):
                options = {"test": data / test, "out": out, "baselines": "false", "workers": 0}
                options |= {"k": "[20]"} if protocol == "knn" else {}
                yield [
                    "-m",
                    "hpm",
                    "eval",
                    protocol,
                    str(self.run),
                    str(data / "train.parquet"),
                    *as_arguments(options),
                ]

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for protocol, _ in self.measures:
            if protocol == "objects":
                found[protocol] = json.loads((self.run / "objects.json").read_text())
                continue
            (file,) = (self.run / protocol).glob("*.json")
            values = json.loads(file.read_text())["values"]
            name = "trained, patch mean" if protocol in ("linear", "knn") else "trained"
            numbers = next(iter(values[name].values()))
            found[protocol] = numbers["mean_iou" if protocol == "segment" else "top1"]
        return found


class Experiment:
    """The results so far, and the jobs to run next."""

    def __init__(self, chosen: argparse.Namespace):
        self.out, self.file, self.chosen = chosen.out, chosen.results, chosen
        self.data = write_splits(chosen.data, chosen.out, chosen.rows, chosen.smoke)
        self.known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.epochs = chosen.epochs
        self.seeds = range(2) if chosen.smoke else SEEDS

    def keep(self, key: str, values: Any) -> None:
        self.known[key] = values
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
        temporary.replace(self.file)

    def plan(self) -> list[Job]:
        """All open jobs that can be run now, most important first."""
        jobs: list[Job] = []
        others = dict.fromkeys([*(self.chosen.first or ()), *ARMS])
        for method in PAIR:
            del others[method]
        for methods in (PAIR, *((name,) for name in others)):
            settings = {}
            for method in methods:
                missing, settings[method] = self.tune(method)
                jobs += missing
            if methods[0] in LONGER and "ratio" not in self.known:
                continue
            for seed in VARIANT_SEEDS if methods[0] in VARIANTS else self.seeds:
                jobs += [
                    self.job(method, setting, seed)
                    for method in methods
                    if (setting := settings[method]) is not None
                ]
        if all(job.key in self.known for job in jobs):  # the costliest measure comes last
            jobs += [self.attentive_job(m, s) for m in METHODS for s in self.seeds]
        return [job for job in dict.fromkeys(jobs) if job.key not in self.known]

    def tune(self, method: str) -> tuple[list[Job], dict[str, Any] | None]:
        """(jobs that are still needed, the best setting once it is known)."""
        method = TUNED_AS.get(method, method)
        rates = list(RATES)
        while True:
            jobs = [self.tuning_job(method, {"base_lr": rate}) for rate in rates]
            if any(job.key not in self.known for job in jobs):
                return jobs, None
            scores = {rate: self.score(method, {"base_lr": rate}) for rate in rates}
            best, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
            if best == min(rates):
                rates.append(best / FACTOR)
            elif best == max(rates):
                rates.append(best * FACTOR)
            elif scores[best] - scores[second] < CLOSE:
                jobs = [
                    self.tuning_job(method, {"base_lr": rate}, TUNING_SEEDS[1])
                    for rate in (best, second)
                ]
                if any(job.key not in self.known for job in jobs):
                    return jobs, None
                break
            else:
                break
        setting = {"base_lr": best}
        if method in ALSO_TUNED:
            name, values = ALSO_TUNED[method]
            others = [setting | {name: v} for v in values if v != DEFAULTS[name]]
            jobs = [self.tuning_job(method, other) for other in others]
            if any(job.key not in self.known for job in jobs):
                return jobs, None
            first = self.known[self.tuning_job(method, setting).key]["linear"]
            found = [
                (self.known[job.key]["linear"], other)
                for job, other in zip(jobs, others, strict=True)
            ]
            top, other = max(found, key=lambda pair: pair[0])
            setting = other if top > first else setting
        return [], setting

    def score(self, method: str, setting: dict[str, Any]) -> float:
        keys = [self.tuning_job(method, setting, seed).key for seed in TUNING_SEEDS]
        return statistics.mean(self.known[key]["linear"] for key in keys if key in self.known)

    def tuning_job(self, method: str, setting: dict[str, Any], seed: int = TUNING_SEEDS[0]) -> Job:
        name = ", ".join(f"{k} {v:g}" for k, v in setting.items())
        key = f"tuning / {method} / {name} / seed {seed}"
        options = self.options(method, setting, seed, max(1, self.epochs // 2))
        return Job(key, self.folder(key), options, (("linear", "tuning.parquet"),))

    def job(self, method: str, setting: dict[str, Any], seed: int) -> Job:
        key = f"{method} / seed {seed}"
        options = dict(self.options(method, setting, seed, self.epochs))
        measures = [(protocol, "test.parquet") for protocol in ("linear", "knn")]
        measures.append(("segment", str(self.chosen.camvid)))
        if method in LONGER:
            steps_per_epoch = self.chosen.rows // options["batch_size"]
            options["steps"] = round(options.pop("epochs") * steps_per_epoch * self.known["ratio"])
        if method == "HPM":
            options |= {"checkpoint_every": f"{100 // CHECKPOINTS}%"}
            options |= {"keep_checkpoints": CHECKPOINTS}
            measures.append(("objects", "test.parquet"))
        return Job(key, self.folder(key), tuple(options.items()), tuple(measures))

    def attentive_job(self, method: str, seed: int) -> Job:
        run = self.folder(f"{method} / seed {seed}")
        return Job(f"{method} / seed {seed} / attentive", run, (), (("attentive", "test.parquet"),))

    def folder(self, key: str) -> Path:
        return self.out / key.replace(" / ", "/").replace(", ", "_").replace(" ", "_")

    def options(
        self, method: str, setting: dict[str, Any], seed: int, epochs: int
    ) -> tuple[tuple[str, Any], ...]:
        options = {
            "model": self.chosen.model,
            "image_size": 64,
            "patch_size": 8,
            "batch_size": 128,
            "holdout": 0,
            "workers": 0,
            "keep_checkpoints": 1,
            "log_every": 50,
            "cache": "true",
            "target": "normalized_pixels",
            "checkpoint_every": "5%",
        }
        options |= setting | ARMS[method] | {"seed": seed, "epochs": epochs}
        if self.chosen.smoke:
            options |= {"batch_size": 64}
        return tuple(options.items())

    def run(self, deadline: float) -> bool:
        """Run open jobs. Returns True if none is left."""
        threads = max(1, (os.cpu_count() or 1) // self.chosen.side_by_side)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        running: dict[Job, tuple[subprocess.Popen, float]] = {}
        while True:
            waiting = [job for job in self.plan() if job not in running]
            if not waiting and not running:
                return True
            while waiting and len(running) < self.chosen.side_by_side:
                self._start(waiting.pop(0), running, environment)
            time.sleep(0.5)
            for job, (process, began) in list(running.items()):
                if process.poll() is None and time.time() < deadline:
                    continue
                if process.poll() is None:
                    process.terminate()
                    process.wait()
                hours = self.known.get("hours", 0.0) + (time.time() - began) / 3600
                self.keep("hours", round(hours, 3))
                del running[job]
                if process.returncode and time.time() < deadline:
                    sys.exit(f"failed: {job.key}\n{log_of(job).read_text()[-2000:]}")
                if time.time() < deadline:
                    self._start(job, running, environment)
            if time.time() > deadline and not running:
                return False

    def _start(self, job: Job, running: dict, environment: dict) -> None:
        """The next command of a job; saves its results if none is left."""
        command = next(job.commands(self.data), None)
        if command is None:
            self.keep(job.key, job.results())
            print(f"{time.strftime('%H:%M')} {job.key}: {self.known[job.key]}", flush=True)
            # Checkpoints are large, and only the backbone is needed again.
            shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
            return
        job.run.parent.mkdir(parents=True, exist_ok=True)
        with open(log_of(job), "a") as log:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, env=environment
            )
        running[job] = (process, time.time())

    def report(self) -> None:
        """Write the section of RESULTS.md and the figure from the results so far."""
        found = {
            method: {
                seed: self.known[key] | self.known.get(f"{key} / attentive", {})
                for seed in self.seeds
                if (key := f"{method} / seed {seed}") in self.known
            }
            for method in ARMS
        }
        rows = []
        for method, by_seed in found.items():
            if not by_seed:
                continue
            _, setting = self.tune(method)
            setting = {k: ARMS[method].get(k, v) for k, v in (setting or {}).items()}
            chosen = ", ".join(f"{k} {v:g}" for k, v in setting.items())
            cells = [spread([v[m] for v in by_seed.values() if m in v]) for m in MEASURES]
            rows.append([TITLES.get(method, method), chosen, str(len(by_seed)), *cells])
        gains = []
        for method, base in COMPARISONS:
            if pairs := pairs_of(found[method], found[base]):
                differences = paired(found[method], found[base])
                cells = [interval(differences.get(m, [])) for m in MEASURES]
                title = f"{TITLES.get(method, method)} minus {TITLES.get(base, base)}"
                gains.append([title, str(len(pairs)), *cells])
        tuning = [
            [*key.split(" / ")[1:], f"{values['linear']:.1f}"]
            for key, values in sorted(self.known.items())
            if key.startswith("tuning")
        ]
        total = len(METHODS) * len(self.seeds)
        done = sum(len(found[method]) for method in METHODS)
        figure = FOLDER / "evidence.png"
        parts = [
            "## Does mining help?",
            f"`python benchmarks/evidence.py --model {self.chosen.model} --rows {self.chosen.rows} "
            f"--epochs {self.epochs}`, on {machine()}, code of commit "
            f"`{self.known.get('commit', 'unknown')}`; {done} of {total} runs and {len(tuning)} "
            f"runs of tuning so far, {self.known.get('hours', 0):.1f} process hours beside other "
            "work.",
            "### Protocol, fixed before the first run",
            PROTOCOL.format(
                rows=f"{self.chosen.rows:,}", model=self.chosen.model, epochs=self.epochs
            ).strip(),
            "### Departures from the protocol",
            self.departures(),
            "### Results",
        ]
        if rows:
            draw(found, figure)
            parts += [
                "In %, mean ± standard deviation over the seeds.",
                table(["", "setting", "seeds", *MEASURES.values()], rows),
                f"![top-1 by arm]({figure.name})",
            ]
        else:
            parts.append("No arm has been run yet.")
        if gains:
            parts += [
                "Paired differences in points, mean ± half of the 95 % t-interval. A difference "
                "that is smaller than the number after ± is not significant.",
                table(["", "pairs", *MEASURES.values()], gains),
            ]
        objects = [v["objects"] for v in found["HPM"].values() if "objects" in v]
        if objects:
            parts += [
                "### Are the mined patches the objects?",
                "Share of the patches that lie in the object's box, in %, on test images: of the "
                "patches that the teacher predicts to be hardest, of as many that the student in "
                "fact reconstructs worst, and of all patches (chance). Mean over "
                f"{len(objects)} HPM runs.",
                table(["of training", "mined", "really hardest", "chance"], object_rows(objects)),
            ]
        if tuning:
            parts += ["### Tuning", table(["arm", "setting", "seed", "linear probe"], tuning)]
        write_section("evidence", "\n\n".join(parts))
        if len(pairs_of(found["HPM"], found["MAE"])) > 1:
            write_section("evidence", self.summary(found), FOLDER.parent / "README.md")

    def departures(self) -> str:
        """DEPARTURES, with the measured ratios of the steps."""
        ratios = self.known.get("step_ratios", {})
        told = {
            arm: f"{ratios[arm][0]:.2f} ({ratios[arm][1]:.2f} to {ratios[arm][2]:.2f})"
            if arm in ratios
            else "(not measured yet)"
            for arm in ("HPM", "memory", "predictor")
        }
        return DEPARTURES.strip().format(ratio=self.known.get("ratio", float("nan")), **told)

    def summary(self, found: dict[str, dict[int, dict]]) -> str:
        """The README's part: how the arms compare so far."""
        text = (
            f"Each method trains {self.chosen.model} on {self.chosen.rows:,} images of Tiny "
            f"ImageNet for {self.epochs} epochs, or for as long as HPM takes for that. The table "
            "shows differences in points with 95 % t-intervals; bold ones are significant. MAE's "
            "mask ratio is in brackets; the other methods use 0.75."
        )
        tuned = (self.tune("MAE")[1] or {}).get("mask_ratio", DEFAULTS["mask_ratio"])
        rows = [
            [
                title.format(tuned=tuned),
                str(count),
                *[marked(differences.get(measure, [])) for measure in IN_README],
            ]
            for title, arm, base in SUMMARY
            if (count := len(pairs_of(found[arm], found[base]))) > 1
            for differences in [paired(found[arm], found[base])]
        ]
        differences = table(["", "seeds", *map(MEASURES.__getitem__, IN_README)], rows)
        return "\n\n".join(
            [
                textwrap.fill(text, 100),
                differences,
                "![linear probe, mean IoU and kNN by method](benchmarks/evidence.png)",
                "*A dot for each seed, a line through the dots of a seed, and a bar at the mean.*",
            ]
        )


def marked(differences: list[float]) -> str:
    """Mean and interval; bold if it does not hold 0."""
    mean, half = mean_and_half(differences)
    text = interval(differences)
    return f"**{text}**" if abs(mean) > half else text


def write_splits(data: Path, out: Path, rows: int, smoke: bool) -> Path:
    """The rows of each part of the data as parquet files, written once. Returns their folder."""
    folder = out / "data"
    if (folder / "test.parquet").exists():
        return folder
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    (train_file,), (test_file,) = data.glob("train*.parquet"), data.glob("val*.parquet")
    train, validation = pq.read_table(train_file), pq.read_table(test_file)
    few = 600 if smoke else None
    parts = {
        "train": train.slice(0, few or rows),
        "tuning": train.slice(30_000, few or 5_000),
        "test": pa.concat_tables([train.slice(37_000, few), validation.slice(0, few)]),
    }
    for name, part in parts.items():
        temporary = folder / f"{name}.tmp"
        pq.write_table(part, temporary, row_group_size=1024)
        temporary.replace(folder / f"{name}.parquet")
    return folder


def measure_objects(run: Path, data: Path, images: int = 512, num_masks: int = 8) -> None:
    """For each checkpoint of an HPM run, the share of mined patches inside objects' boxes."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from hpm.data.loader import evaluation_batches, normalize
    from hpm.data.sources import Subset, open_source
    from hpm.evals.loss_maps import loss_maps
    from hpm.mining.draw import Draw
    from hpm.models.patches import patchify
    from hpm.weights.resolve import load

    boxes = pq.read_table(data / "test.parquet", columns=["bbox"])["bbox"].to_pylist()
    source = open_source(str(data / "test.parquet")).train
    ids = np.sort(np.random.default_rng(0).permutation(len(source))[:images])
    (batch,) = evaluation_batches(Subset(source, ids), (64, 64), 3, images)
    inside = torch.zeros(images, 1, 64, 64)
    for row, index in enumerate(ids):
        x0, y0, x1, y1 = boxes[index]
        inside[row, 0, y0:y1, x0:x1] = 1
    share = patchify(inside, (8, 8)).mean(-1)  # of each patch, the part in the box
    found: dict[str, list[float]] = {"progress": [], "mined": [], "hardest": []}
    checkpoints = sorted((run / "checkpoints").glob("step_*.safetensors"))
    for number, file in enumerate(checkpoints, 1):
        trained = load(file)
        assert trained.model is not None and trained.teacher is not None
        assert trained.config is not None
        trained.model.eval(), trained.teacher.eval()
        pixels = normalize(batch.images, torch.tensor(trained.mean), torch.tensor(trained.std))
        target = trained.find_target(torch.device("cpu"))
        maps = loss_maps(
            trained.model,
            trained.find_miner(),
            pixels,
            Draw(0, 0, torch.from_numpy(ids)),
            target,
            trained.config.mask_ratio,
            num_masks,
        )
        count = trained.find_miner().num_hidden // 2
        for name, values in (("mined", maps.predicted), ("hardest", maps.actual)):
            assert values is not None  # the model predicts losses
            top = values.nan_to_num(nan=-torch.inf).topk(count, dim=1).indices
            found[name].append(share.gather(1, top).mean().item())
        found["progress"].append(number / len(checkpoints))
    chance = share.mean().item()
    (run / "objects.json").write_text(json.dumps({"chance": chance} | found) + "\n")


def object_rows(objects: list[dict]) -> list[list[str]]:
    chance = f"{100 * statistics.mean(o['chance'] for o in objects):.1f}"
    return [
        [
            f"{100 * progress:.0f} %",
            *[spread([100 * o[name][i] for o in objects]) for name in ("mined", "hardest")],
            chance,
        ]
        for i, progress in enumerate(objects[0]["progress"])
    ]


def measure_steps(experiment: Experiment) -> None:
    """Step times at each arm's own setting, in turns, as ratios to MAE's: median, lowest, highest.
    `hpm bench step` measures them."""
    file = experiment.out / "step.json"
    rounds: dict[str, list[float]] = {"MAE": [], "HPM": [], "memory": [], "predictor": []}
    for _ in range(STEP_ROUNDS):
        for arm, found in rounds.items():
            options = (experiment.tune(arm)[1] or {}) | ARMS[arm]
            options |= {"model": experiment.chosen.model, "image_size": 64, "patch_size": 8}
            options |= {"batch_size": 128, "repeats": 5, "json": file}
            command = ["-m", "hpm", "bench", "step", *as_arguments(options)]
            subprocess.run([sys.executable, *command], check=True)
            method = "MAE" if arm == "MAE" else "HPM"
            found.append(json.loads(file.read_text())["methods"][method]["step_ms"])
    ratios = {
        arm: sorted(step / mae for step, mae in zip(found, rounds["MAE"], strict=True))
        for arm, found in rounds.items()
    }
    experiment.keep(
        "step_ratios",
        {arm: [statistics.median(r), r[0], r[-1]] for arm, r in ratios.items() if arm != "MAE"},
    )
    if "ratio" not in experiment.known:  # else arms depend on it
        experiment.keep("ratio", statistics.median(ratios["HPM"]))


def log_of(job: Job) -> Path:
    return job.run.with_name(job.run.name + ".log")


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def pairs_of(ours: dict[int, dict], theirs: dict[int, dict]) -> list[int]:
    """The seeds that both have."""
    return sorted(set(ours) & set(theirs))


def paired(ours: dict[int, dict], theirs: dict[int, dict]) -> dict[str, list[float]]:
    """Differences by measure, seed by seed; measures that no pair has are left out."""
    found = {
        measure: [
            ours[seed][measure] - theirs[seed][measure]
            for seed in pairs_of(ours, theirs)
            if measure in ours[seed] and measure in theirs[seed]
        ]
        for measure in MEASURES
    }
    return {measure: values for measure, values in found.items() if values}


def draw(found: dict[str, dict[int, dict]], file: Path) -> None:
    """A block of rows for each question. A dot per seed, a bar at the mean, and thin lines from row
    to row through the dots of a seed, of those seeds that all rows of the block have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = {
        title: rows
        for title, arms in BLOCKS.items()
        if len(rows := {arm: found[arm] for arm in arms if found.get(arm)}) > 1
    }
    shown = {
        measure: title
        for measure, title in MEASURES.items()
        if all(
            measure in values
            for rows in blocks.values()
            for by_seed in rows.values()
            for values in by_seed.values()
        )
    }
    height = sum(len(rows) + 1.4 for rows in blocks.values())
    figure = Figure(figsize=(10, 0.7 + 0.27 * height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharey=True)
    labels: dict[float, str] = {}
    top = 0.0
    for block, rows in blocks.items():
        places = {arm: top + number for number, arm in enumerate(rows)}
        common = set.intersection(*(set(by_seed) for by_seed in rows.values()))
        for panel, measure in zip(panels, shown, strict=True):
            for seed in common:
                values = [by_seed[seed][measure] for by_seed in rows.values()]
                panel.plot(values, list(places.values()), lw=0.6, color="0.75", zorder=0)
            for arm, by_seed in rows.items():
                row, values = places[arm], [by_seed[s][measure] for s in common]
                panel.plot(values, [row] * len(values), "o", ms=4, color="#4477aa")
                panel.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color="k")
        panels[0].text(
            -0.02,
            top - 0.85,
            f"{block}, {len(common)} seeds",
            transform=panels[0].get_yaxis_transform(),
            ha="right",
            va="center",
            weight="bold",
            fontsize=9,
        )
        labels |= {place: SHORT.get(arm, arm) for arm, place in places.items()}
        top += len(rows) + 1.4
    for panel, title in zip(panels, shown.values(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("%")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(list(labels), list(labels.values()))
    panels[0].set_ylim(top - 1.4, -1.4)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--camvid", type=Path, default=CAMVID)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=FOLDER / "evidence.json")
    parser.add_argument("--minutes", type=float, default=9, help="of this piece")
    parser.add_argument("--model", default="vit_nano")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--side-by-side", type=int, default=1)
    parser.add_argument(
        "--first",
        action="append",
        choices=[name for name in ARMS if name not in PAIR],
        help="arm that follows MAE and HPM; again for the one after that",
    )
    parser.add_argument("--timing", action="store_true", help="measure step times")
    parser.add_argument("--report", action="store_true", help="write the report alone")
    parser.add_argument("--smoke", action="store_true", help="a few images: does it run through?")
    parser.add_argument("--objects", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.objects:
        measure_objects(chosen.objects, chosen.data, 64 if chosen.smoke else 512)
        return
    experiment = Experiment(chosen)
    if chosen.timing:
        measure_steps(experiment)
    elif not chosen.report:
        if "commit" not in experiment.known:
            commit = subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=FOLDER
            )
            experiment.keep("commit", commit.stdout.strip()[:12] or "unknown")
        done = experiment.run(time.time() + 60 * chosen.minutes)
        print("done" if done else "time is up: run the same command again to resume")
    if not chosen.smoke:
        experiment.report()


if __name__ == "__main__":
    main()

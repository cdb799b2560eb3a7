"""Several processes: two beside one, the cost of a checkpoint in the background, and on paper.

    python benchmarks/scaling.py            # everything: five minutes on two idle cores
    python benchmarks/scaling.py --tables   # only the tables of docs/scaling.md, from counts

Processes have one thread and a core each. Those that communicate and those that do not are measured
in turns, because the speed of a machine changes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from results import machine, table, write_section
from scaling_model import BUCKET, Link, all_reduce_seconds, backward_seconds
from scaling_tables import write_tables
from torch import Tensor

from hpm.commands.bench_step import HARD_SHARE, build_bench_run, noise_batch
from hpm.commands.options import BenchConfig
from hpm.core import distributed
from hpm.core.options import make_config
from hpm.pretraining import train_step
from hpm.training.run import PretrainingRun

CPU = torch.device("cpu")
SIZES = {"model": "vit_tiny", "image_size": 64, "patch_size": 8}
BATCH, SMALL_BATCH, DEFAULT_BATCH = 32, 16, 128  # of each of two processes
RUNS = (500, 5_000, 100_000)  # steps; a checkpoint is due after each 5 % of them


class Worker:
    """What a process does on demand: steps, all-reduces, a backward pass, checkpoints."""

    def __init__(self, run: PretrainingRun, processes: int) -> None:
        self.run = run
        self.batch = noise_batch(run).parts(processes)[0]
        self.num_hard = int(run.num_hidden * HARD_SHARE)

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of a step, and those that the process spends computing, on average."""
        distributed.wait_for_all()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self._step()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": wall / count, "cpu": cpu / count}

    def all_reduce(self, size: int, count: int) -> dict[str, float]:
        """Seconds that a sum of `size` bytes takes; share of them in which the process is busy."""
        values = torch.ones(max(1, size // 4))
        dist.all_reduce(values)
        dist.barrier()
        seconds, cpu, start = [], time.process_time(), time.perf_counter()
        for _ in range(count):
            begin = time.perf_counter()
            dist.all_reduce(values)
            seconds.append(time.perf_counter() - begin)
        busy = (time.process_time() - cpu) / (time.perf_counter() - start)
        return {"seconds": statistics.median(seconds), "busy": busy}

    def backward(self) -> tuple[list[float], list[int], float]:
        """(when each gradient is there, in seconds since the backward pass began; its bytes;
        duration of the pass), in the order in which they come."""
        found: list[tuple[float, int]] = []
        spans: list[tuple[float, float]] = []
        whole = Tensor.backward

        def backward(loss: Tensor) -> None:
            begin = time.perf_counter()
            whole(loss)
            spans.append((begin, time.perf_counter()))

        def note(parameter: Tensor) -> None:
            found.append((time.perf_counter(), parameter.numel() * 4))

        trained = [p for p in self.run.model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(note) for p in trained]
        Tensor.backward = backward  # type: ignore[method-assign, assignment]
        try:
            self._step()
        finally:
            Tensor.backward = whole  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()
        ((begin, end),) = spans
        return [when - begin for when, _ in found], [size for _, size in found], end - begin

    def interval(self, saves: bool, count: int) -> dict[str, float]:
        """Seconds of the steps after a checkpoint, or after none, until it is written."""
        distributed.wait_for_all()
        start, cpu = time.perf_counter(), time.process_time()
        if saves:
            self.run.step += 1
            self.run.save()
        blocked = time.perf_counter() - start
        for _ in range(count):
            self._step()
        if self.run.writer is not None:
            self.run.writer.wait()
        distributed.wait_for_all()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": wall, "blocked": blocked, "cpu": cpu}

    def _step(self) -> None:
        train_step(self.run, self.batch, 0, self.num_hard)


def serve(
    pipe: Connection, core: int, rank: int, processes: int, port: int, options: dict[str, Any]
) -> None:
    """Run in a process of its own: build a run, and do what is asked for until the end."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    sizes = SIZES | options | {"batch_size": options["batch_size"] * processes}
    config = make_config(BenchConfig, sizes | {"compile": "false", "device": "cpu"})
    with distributed.process_group(CPU), tempfile.TemporaryDirectory() as folder:
        run = build_bench_run(config, {}, Path(distributed.from_main(folder)) / "run", CPU)
        worker = Worker(run, processes)
        worker.steps(2)  # fills caches; DistributedDataParallel orders its buckets anew
        pipe.send("ready")
        while (asked := pipe.recv()) is not None:
            name, arguments = asked
            pipe.send(getattr(worker, name)(*arguments))
        run.log.close()
        distributed.wait_for_all()


class Group:
    """Processes, each on a core of its own, that train together."""

    def __init__(self, cores: list[int], options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank, core in enumerate(cores):
            ours, theirs = context.Pipe()
            given = (theirs, core, rank, len(cores), port, options)
            self.processes.append(context.Process(target=serve, args=given, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def ask(self, name: str, *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((name, arguments))

    def answers(self) -> list[Any]:
        return [pipe.recv() for pipe in self.pipes]

    def __call__(self, name: str, *arguments: Any) -> list[Any]:
        self.ask(name, *arguments)
        return self.answers()


@contextmanager
def groups(*cores: list[int], **options: Any) -> Iterator[list[Group]]:
    """Groups that are ready, until the end of the context."""
    started = [Group(each, options) for each in cores]
    for group in started:
        group.answers()
    yield started
    for group in started:
        for pipe in group.pipes:
            pipe.send(None)
        for process in group.processes:
            process.join()


def at_once(asked: list[Group], name: str, *arguments: Any) -> list[Any]:
    """The answers of all groups, which work at the same time."""
    for group in asked:
        group.ask(name, *arguments)
    return [answer for group in asked for answer in group.answers()]


@dataclass
class Two:
    """Two processes beside one. Each list has one entry per round.

    alone, beside, together: what `Worker.steps` gives for one process, for two that do not
    communicate, and for two that do.
    """

    link: Link
    predicted: list[float] = field(default_factory=list)  # seconds of a step together
    alone: list[dict[str, float]] = field(default_factory=list)
    beside: list[dict[str, float]] = field(default_factory=list)
    together: list[dict[str, float]] = field(default_factory=list)

    def share(self, of: list[dict[str, float]], key: str) -> list[float]:
        """Throughput per core together, relative to `of`, in each round."""
        return [a[key] / b[key] for a, b in zip(of, self.together, strict=True)]

    @property
    def off(self) -> list[float]:
        """How far the prediction is from the step that was measured."""
        pairs = zip(self.predicted, self.together, strict=True)
        return [predicted / found["seconds"] - 1 for predicted, found in pairs]


def measure_two(rounds: int, seconds: float) -> Two:
    """Steps of one process and of two, in turns, and what the simulation makes of them."""
    with groups([0], [1], [0, 1], batch_size=BATCH) as (one, other, both):
        small = both("all_reduce", 4, 200)[0]
        large = both("all_reduce", BUCKET, 20)[0]
        travel = (large["seconds"] - small["seconds"]) / 2
        found = Two(Link(small["seconds"] / 2, BUCKET / 2 / travel, large["busy"]))
        count = max(2, round(seconds / one("steps", 2)[0]["seconds"]))
        for _ in range(rounds):
            found.alone += one("steps", count)
            beside = slower(at_once([one, other], "steps", count))
            found.beside.append(beside)
            found.together.append(slower(both("steps", count)))
            passes = [at_once([one, other], "backward")[0] for _ in range(5)]
            found.predicted.append(predict(beside["seconds"], passes, found.link))
    return found


def slower(answers: list[dict[str, float]]) -> dict[str, float]:
    return max(answers, key=lambda answer: answer["seconds"])


def predict(step: float, passes: list[tuple[list[float], list[int], float]], link: Link) -> float:
    """Seconds of a step of two processes that takes `step` seconds without communication."""
    ready = [statistics.median(times) for times in zip(*(p[0] for p in passes), strict=True)]
    seconds = statistics.median(p[2] for p in passes)
    with_buckets = backward_seconds(ready, passes[0][1], seconds, 2, link)
    # The number of ranked pairs is added up before the backward pass.
    return step - seconds + with_buckets + all_reduce_seconds(4, 2, link)


@dataclass
class Checkpoints:
    """`Worker.interval` with a checkpoint and without, one pair after the other. step: seconds of a
    step of the default batch."""

    step: float
    saved: list[dict[str, float]] = field(default_factory=list)
    plain: list[dict[str, float]] = field(default_factory=list)

    def cost(self, key: str) -> tuple[float, float, float]:
        """Seconds of a checkpoint: (mean, lowest and highest of 95 % of resamplings of the
        pairs)."""
        costs = [a[key] - b[key] for a, b in zip(self.saved, self.plain, strict=True)]
        rng = random.Random(0)
        drawn = sorted(statistics.mean(rng.choices(costs, k=len(costs))) for _ in range(2000))
        return statistics.mean(costs), drawn[50], drawn[-50]


def measure_checkpoints(pairs: int, count: int) -> Checkpoints:
    """Steps of two processes that share the models, half of which begin with a checkpoint."""
    with groups([0, 1], batch_size=DEFAULT_BATCH, shard=True) as (both,):
        found = Checkpoints(slower(both("steps", 3))["seconds"])
    with groups([0, 1], batch_size=SMALL_BATCH, shard=True) as (both,):
        both("interval", True, count)
        for number in range(pairs):
            for saves in (True, False) if number % 2 else (False, True):
                answer = slower(both("interval", saves, count))
                (found.saved if saves else found.plain).append(answer)
    return found


def percent(values: list[float]) -> str:
    """Median, lowest and highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{100 * middle:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def report(two: Two, checkpoints: Checkpoints) -> str:
    """The section of RESULTS.md."""
    link = two.link
    rows = [
        [name, *[f"{1e3 * statistics.median(each[key] for each in found):.1f}" for key in KEYS]]
        for name, found in (
            ("one process", two.alone),
            ("two that do not communicate", two.beside),
            ("two that train together", two.together),
        )
    ]
    wall, cpu = checkpoints.cost("seconds"), checkpoints.cost("cpu")
    blocked = statistics.median(each["blocked"] for each in checkpoints.saved)
    shares = [f"{100 * wall[0] / (0.05 * run * checkpoints.step):.2g} %" for run in RUNS]
    return f"""## Several processes

`python benchmarks/scaling.py` on {machine()}: {SIZES["model"]}, {SIZES["image_size"]} px, patches
of {SIZES["patch_size"]}, {BATCH} images per process and step; one thread and one core for each
process, gloo.

{table(["milliseconds of a step", "time", "computing"], rows)}

- Two processes reach {percent(two.share(two.alone, "seconds"))} of the throughput per core of one
  (median, lowest and highest of {len(two.alone)} rounds), and
  {percent(two.share(two.beside, "seconds"))} of that of two which do not communicate: the rest is
  what two cores take from each other. They compute for {percent(two.share(two.alone, "cpu"))}.
- Link: {1e6 * link.latency:.0f} us per message, {link.bandwidth / 1e9:.2f} GB/s, busy for
  {100 * link.busy:.0f} % of a transfer. The simulation of `benchmarks/scaling_model.py` gives a
  step of {1e3 * statistics.median(two.predicted):.1f} ms: off by {percent(two.off)}.
- A checkpoint in the background (two processes with `--shard`, {SMALL_BATCH} images each; means of
  {len(checkpoints.saved)} pairs, 95 % of resamplings) takes {1e3 * wall[0]:.0f} ms
  ({1e3 * wall[1]:.0f} to {1e3 * wall[2]:.0f}) of the time of training, {1e3 * cpu[0]:.0f} ms
  ({1e3 * cpu[1]:.0f} to {1e3 * cpu[2]:.0f}) of each core, and {1e3 * blocked:.0f} ms until training
  goes on. A step of the default batch, {2 * DEFAULT_BATCH} images, takes {checkpoints.step:.2f} s
  there: at the default interval, 5 % of the training, checkpoints cost {shares[0]} of a run of
  {RUNS[0]:,} steps, {shares[1]} of {RUNS[1]:,}, and {shares[2]} of {RUNS[2]:,}.
"""


KEYS = ("seconds", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tables", action="store_true", help="only write the tables of the docs")
    parser.add_argument("--rounds", type=int, default=5, help="of one process and two")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=16, help="with a checkpoint and without")
    parser.add_argument("--interval", type=int, default=5, help="steps after each checkpoint")
    chosen = parser.parse_args()
    write_tables()
    if chosen.tables:
        return
    two = measure_two(chosen.rounds, chosen.seconds)
    text = report(two, measure_checkpoints(chosen.pairs, chosen.interval))
    print(text)
    write_section("scaling", text)


if __name__ == "__main__":
    main()

"""What several processes cost, on paper: pure functions of sizes, links and speeds.

Rings: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations". Buckets and their overlap with the backward pass: Li et al. 2020, "PyTorch
Distributed" (arXiv 2006.15704), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4  # bytes; gradients and gathered weights are float32, see `hpm.training.parallel`
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes; DistributedDataParallel's defaults


@dataclass(frozen=True)
class Link:
    """Between two neighbours of a ring. latency: seconds of a message. bandwidth: bytes/s of each
    process in each direction. busy: share of a process's own speed that a transfer takes from what
    it computes at the same time."""

    latency: float
    bandwidth: float
    busy: float = 0.0


def all_reduce_bytes(size: float, processes: int) -> float:
    """Bytes that each process sends (and receives) to add up `size` bytes in a ring."""
    return 2 * all_gather_bytes(size, processes)


def all_gather_bytes(size: float, processes: int) -> float:
    """The same to gather, or to reduce and scatter, a tensor that has `size` bytes as a whole."""
    return size * (processes - 1) / processes


def all_reduce_seconds(size: float, processes: int, link: Link) -> float:
    """Time of a ring: 2 (n - 1) messages of a n-th of the tensor, one after the other."""
    messages = 2 * (processes - 1)
    return messages * (link.latency + size / processes / link.bandwidth)


def all_gather_seconds(size: float, processes: int, link: Link) -> float:
    """The same to gather, or to reduce and scatter."""
    return all_reduce_seconds(size, processes, link) / 2


def buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Which gradients travel together, by their numbers: a bucket is closed by the gradient that
    fills it.

    sizes: bytes of the gradients in the order in which the backward pass computes them.
    """
    found: list[list[int]] = [[]]
    held, limit = 0, FIRST_BUCKET
    for number, size in enumerate(sizes):
        found[-1].append(number)
        held += size
        if held >= limit:
            found.append([])
            held, limit = 0, BUCKET
    return found if found[-1] else found[:-1]


def backward_seconds(
    ready: Sequence[float], sizes: Sequence[int], seconds: float, processes: int, link: Link
) -> float:
    """Duration of a backward pass during which the buckets are reduced, one after the other, until
    both are done.

    Args:
        ready: when each gradient is computed, in seconds since the pass began, if nothing else
            runs; rising.
        sizes: bytes of each gradient.
        seconds: duration of the pass if nothing else runs.
        processes: in the ring.
        link: while a bucket travels, the pass goes on at 1 - `busy` of its speed.
    """
    if processes == 1:
        return seconds
    now = done = 0.0  # time; seconds of the pass itself that are behind it
    for bucket in buckets(sizes):
        wanted = max(ready[number] for number in bucket)
        if done < wanted:  # nothing travels until the bucket is full
            now, done = now + wanted - done, wanted
        travel = all_reduce_seconds(sum(sizes[number] for number in bucket), processes, link)
        now, done = now + travel, done + travel * (1 - link.busy)
    return now + max(0.0, seconds - done)


@dataclass(frozen=True)
class Model:
    """What a step costs, from counts.

    parameters: of the student that are trained. fixed: its positions. teacher: those of the teacher
    that mining uses. mining, learning: operations per image (two per multiply-add) of the teacher's
    pass, and of the student's forward and backward passes.
    """

    name: str
    parameters: float
    fixed: float
    teacher: float
    mining: float
    learning: float

    @property
    def operations(self) -> float:
        return self.mining + self.learning

    @property
    def backward(self) -> float:
        """A backward pass has two products for each one of the forward pass."""
        return self.learning * 2 / 3


def ddp_bytes(model: Model, processes: int) -> float:
    """Bytes that each process sends per step: the gradients once."""
    return all_reduce_bytes(FLOAT * model.parameters, processes)


def fsdp_bytes(model: Model, processes: int) -> float:
    """The same when sharded: the student's weights are gathered in the forward and in the backward
    pass, the teacher's once, and the gradients are reduced and scattered."""
    moved = 3 * model.parameters + 2 * model.fixed + model.teacher
    return all_gather_bytes(FLOAT * moved, processes)


@dataclass(frozen=True)
class Machine:
    """A GPU and what feeds it.

    peak: operations/s. utilisation: share of it that a step reaches. memory: bytes/s. core: images
    that one CPU core decodes and crops per second. image: bytes.
    """

    peak: float
    utilisation: float
    memory: float
    core: float
    image: float

    def seconds(self, operations: float) -> float:
        return operations / (self.peak * self.utilisation)


# Bytes that clipping (read twice, write once), AdamW (read weight, gradient and both moments, write
# all but the gradient) and the teacher's average (read two, write one) move per parameter.
OPTIMISER_BYTES = FLOAT * (3 + 7 + 3)


def optimiser_seconds(model: Model, machine: Machine, shards: int = 1) -> float:
    """Time that memory takes to update a process's share of the parameters."""
    return OPTIMISER_BYTES * model.parameters / shards / machine.memory


def compute_seconds(model: Model, machine: Machine, images: float) -> float:
    """Time of the passes of a step with so many images per process."""
    return machine.seconds(model.operations * images)


@dataclass(frozen=True)
class Network:
    """Latencies in seconds of a message inside of a node and between nodes of `node` GPUs."""

    inside: float
    between: float
    node: int

    def ring(self, processes: int) -> float:
        """Until a message has been passed on by all but one."""
        nodes = -(-processes // self.node)
        return (processes - nodes) * self.inside + (nodes - 1) * self.between

    def tree(self, processes: int) -> float:
        """Through the node, and up a binary tree of nodes."""
        nodes = -(-processes // self.node)
        return (min(processes, self.node) - 1) * self.inside + math.log2(nodes) * self.between


def ddp_bandwidth(
    model: Model, machine: Machine, images: float, processes: int, network: Network
) -> float:
    """Bytes/s per process below which the all-reduce takes longer than the backward pass that hides
    it; infinite where latency alone takes longer. Rings or trees, whichever answer sooner."""
    messages = 1 + FLOAT * model.parameters / BUCKET  # there and back
    latency = 2 * messages * min(network.ring(processes), network.tree(processes))
    hidden = machine.seconds(model.backward * images) - latency
    return ddp_bytes(model, processes) / hidden if hidden > 0 else math.inf


def fsdp_bandwidth(
    model: Model, machine: Machine, images: float, processes: int, network: Network, units: int
) -> float:
    """The same when sharded: what is gathered and scattered, in rings, against all passes. units:
    what is gathered at a time, such as blocks."""
    hidden = compute_seconds(model, machine, images) - 4 * units * network.ring(processes)
    return fsdp_bytes(model, processes) / hidden if hidden > 0 else math.inf

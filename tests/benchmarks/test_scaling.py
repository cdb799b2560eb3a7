"""What several processes cost on paper, beside naive versions and beside what PyTorch does."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import tiny_arguments
from jobs import torchrun

from hpm.commands.cli import understand
from hpm.core.config import PretrainConfig
from hpm.models.architecture import resolve_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scaling_model as model
import scaling_tables as tables

LINK = model.Link(latency=0.01, bandwidth=100.0)


def ring(values, link):
    """An all-reduce, message by message: (results, bytes that each sends, seconds)."""
    count = len(values)
    parts = [list(each) for each in values]
    size = 4 * len(values[0]) / count
    seconds = sent = 0.0
    for phase in ("add", "copy"):
        for step in range(count - 1):
            first = 0 if phase == "add" else 1
            moving = [(r, (r - step + first) % count) for r in range(count)]
            arriving = [
                (to, part, parts[r][part]) for r, part in moving for to in [(r + 1) % count]
            ]
            for to, part, value in arriving:
                parts[to][part] = value + (parts[to][part] if phase == "add" else 0)
            seconds += link.latency + size / link.bandwidth
            sent += size
    return parts, sent, seconds


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_a_ring(processes):
    """One value per part, so that a part is a n-th of the tensor."""
    values = torch.rand(processes, processes).tolist()
    parts, sent, seconds = ring(values, LINK)
    wanted = torch.tensor(values).sum(0)
    assert all(torch.allclose(torch.tensor(each), wanted) for each in parts)
    size = 4 * processes
    assert model.all_reduce_bytes(size, processes) == pytest.approx(sent)
    assert model.all_reduce_seconds(size, processes, LINK) == pytest.approx(seconds)
    assert 2 * model.all_gather_seconds(size, processes, LINK) == pytest.approx(seconds)
    assert model.all_reduce_bytes(size, 1) == model.all_reduce_seconds(size, 1, LINK) == 0


def test_buckets_are_those_of_pytorch():
    sizes = [4 * n for n in torch.randint(1, 3_000_000, (200,)).tolist()]
    tensors = [torch.empty(size // 4, device="meta") for size in sizes]
    limits = [model.FIRST_BUCKET, model.BUCKET]
    wanted, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(tensors, limits)
    assert model.buckets(sizes) == wanted
    assert model.buckets([model.FIRST_BUCKET]) == [[0]]


def stepped(ready, sizes, seconds, link, tick):
    """The backward pass and its transfers, in small steps of time."""
    waiting, now, done, left = model.buckets(sizes), 0.0, 0.0, 0.0
    while waiting or left > 0 or done < seconds:
        if left <= 0 and waiting and done >= max(ready[n] for n in waiting[0]):
            size = sum(sizes[n] for n in waiting.pop(0))
            left = model.all_reduce_seconds(size, 2, link)
        done += tick * (1 - link.busy if left > 0 else 1)
        left -= tick
        now += tick
    return now


@pytest.mark.parametrize("busy", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bandwidth", [3e7, 3e8, 1e12])
def test_transfers_during_a_backward_pass(bandwidth, busy):
    generator = torch.Generator().manual_seed(int(bandwidth) % 7)
    sizes = [4 * n for n in torch.randint(1, 2_000_000, (40,), generator=generator).tolist()]
    ready = torch.rand(40, generator=generator).sort().values.tolist()
    link = model.Link(0.001, bandwidth, busy)
    found = model.backward_seconds(ready, sizes, 1.0, 2, link)
    assert found == pytest.approx(stepped(ready, sizes, 1.0, link, 1e-4), abs=0.01)
    assert found >= 1.0 and model.backward_seconds(ready, sizes, 1.0, 1, link) == 1.0


def test_latency_of_a_network():
    network = model.Network(inside=1.0, between=10.0, node=4)
    hops = [10.0 if (n + 1) % 4 == 0 else 1.0 for n in range(15)]  # to the next of 16
    assert network.ring(16) == sum(hops)
    assert network.tree(16) == 3 + 2 * 10
    assert network.ring(1) == network.tree(1) == 0
    assert network.ring(3) == network.tree(3) == 2


def test_a_link_that_just_suffices():
    """Reduced at exactly that speed, the gradients need as long as the backward pass."""
    big = model.Model("x", 10**9, 0, 7 * 10**8, mining=1e12, learning=3e12)
    machine = model.Machine(peak=1e15, utilisation=0.5, memory=1e12, core=1, image=1)
    network = model.Network(0.0, 0.0, 8)
    speed = model.ddp_bandwidth(big, machine, 16, 8, network)
    seconds = model.all_reduce_seconds(4 * big.parameters, 8, model.Link(0.0, speed))
    assert seconds == pytest.approx(16 * 2e12 / 5e14)
    speed = model.fsdp_bandwidth(big, machine, 16, 8, network, units=10)
    gathers = [10**9, 10**9, 10**9, 7 * 10**8]
    seconds = sum(model.all_gather_seconds(4 * n, 8, model.Link(0.0, speed)) for n in gathers)
    assert seconds == pytest.approx(16 * 4e12 / 5e14)
    slow = model.Network(1.0, 1.0, 8)
    assert math.isinf(model.ddp_bandwidth(big, machine, 16, 8, slow))
    assert math.isinf(model.fsdp_bandwidth(big, machine, 16, 8, slow, 10))


def test_more_gpus_need_faster_links():
    shape = resolve_model(PretrainConfig("demo", "run", model="vit_nano")).with_target_dim(768)
    nano = tables.count("nano", shape)
    speeds = [
        model.ddp_bandwidth(nano, tables.H100, tables.BATCH / n, n, tables.NETWORK)
        for n in tables.GPUS
    ]
    assert all(a < b or a == b == math.inf for a, b in pairwise(speeds))
    assert tables.first_limit(lambda n: n > 5) == 8 and tables.first_limit(lambda n: False) == 0


COUNTING = """
import json, sys
import torch.distributed as dist
from hpm import pretraining
from hpm.commands import cli
sent, steps = [0], []

def counted(name):
    run = getattr(dist, name)
    def call(*args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if hasattr(t, "numel")]
        size = max(t.numel() * t.element_size() for t in tensors)
        sent[0] += size * (dist.get_world_size() - 1) / dist.get_world_size()
        return run(*args, **kwargs)
    setattr(dist, name, call)

for name in ("all_gather_single", "reduce_scatter_single"):
    counted(name)
train_step = pretraining.train_step

def step(*args):
    sent[0] = 0
    result = train_step(*args)
    steps.append(sent[0])
    return result

pretraining.train_step = step
code = cli.main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(steps))
sys.exit(code)
"""


@pytest.mark.slow
def test_bytes_of_a_sharded_step(image_folder, tmp_path):
    """Counted where PyTorch sends them."""
    program, out = tmp_path / "program.py", tmp_path / "bytes.json"
    program.write_text(COUNTING)
    arguments = tiny_arguments(shard=True, steps=3, hard_share_start=0.25)
    command = ("pretrain", image_folder, "--out", tmp_path / "run", *arguments)
    result = torchrun(program, out, *command)
    assert result.returncode == 0, result.stderr
    shape = resolve_model(understand(list(map(str, command)))[1]).with_target_dim(48)
    wanted = model.fsdp_bytes(tables.count("tiny", shape), 2)
    assert json.loads(out.read_text())[-1] == pytest.approx(wanted, rel=0.02)

"""Large models are described without memory, and sharded as they are initialised."""

import dataclasses
import json
from pathlib import Path

import pytest
from jobs import torchrun

from hpm.core.config import PretrainConfig
from hpm.models.architecture import Architecture, resolve_model
from hpm.models.build import build_empty_model

GIB = 2**30
GIANT = {"embed_dim": 1408, "depth": 40, "num_heads": 16}  # of ViT-g


def architecture(name: str) -> Architecture:
    model = "vit_huge" if name == "giant" else name
    found = resolve_model(PretrainConfig("demo", "run", model=model)).with_target_dim(588)
    return dataclasses.replace(found, **GIANT) if name == "giant" else found


def memory_available() -> int:
    """Bytes; 0 where Linux does not tell."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def test_a_billion_parameters_are_described_without_memory():
    model = build_empty_model(architecture("giant"))
    assert sum(p.numel() for p in model.parameters()) > 10**9
    assert all(p.is_meta for p in model.parameters())


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.shards import local
from hpm.mining.teacher import Teacher
from hpm.models.architecture import Architecture
from hpm.models.build import build_empty_model
from hpm.training.parallel import shard

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

architecture = Architecture.from_json(json.loads(sys.argv[2]))
device, config = torch.device("cpu"), PretrainConfig("demo", "run", shard=True)
with distributed.process_group(device):
    model = build_empty_model(architecture)
    teacher = Teacher(model).model
    before = peak()
    shard(model, teacher, config, device, draw=True)
    found = {
        "grown": peak() - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "own": sum(local(p).numel() for p in model.parameters()),
        "drawn": all(local(p).std() > 0 for p in model.parameters() if p.ndim == 2),
        "equal": all(
            torch.equal(local(a), local(b))
            for a, b in zip(model.parameters(), teacher.parameters())
        ),
    }
    for rank, each in enumerate(distributed.gather(found)):
        Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(each))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("vit_large", 0.35e9), ("giant", 1e9)])
def test_two_processes_hold_half_a_model_each(name, parameters, tmp_path):
    """Student and teacher, and never a whole one of them. 8 bytes per parameter in all."""
    needed = int(8 * parameters + 4 * GIB)
    if memory_available() < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free memory")
    program, out = tmp_path / "program.py", tmp_path / "found"
    program.write_text(PROGRAM)
    shape = json.dumps(architecture(name).to_json())
    result = torchrun(program, out, shape)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        found = json.loads(Path(f"{out}.{rank}").read_text())
        assert found["parameters"] > parameters and found["drawn"] and found["equal"]
        assert found["own"] < 0.52 * found["parameters"]
        shards = 2 * 4 * found["own"]
        assert shards < found["grown"] < shards + 0.25 * 4 * found["parameters"]

import copy
import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY, architecture_of, full_disk
from safetensors.torch import load_file, save_file

import hpm
from hpm.core import files
from hpm.core.errors import UserError
from hpm.core.files import write_atomically, write_tensors
from hpm.models.build import build_model
from hpm.training.optim import adamw
from hpm.weights import checkpoint, sharded
from hpm.weights.initialise import load_initial
from hpm.weights.resolve import load

SMALL = {
    "image_size": [8, 8],
    "patch_size": [4, 4],
    "channels": 3,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "with_predictor": True,
}


def trained(seed=0):
    model = build_model(architecture_of(SMALL), seed)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.05)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(folder, step, model, optimizer, keep=2):
    teacher = copy.deepcopy(model)
    return checkpoint.save_checkpoint(folder, model, teacher, optimizer, {"step": step}, keep)


def test_everything_comes_back(tmp_path):
    model, optimizer = trained()
    torch.manual_seed(5)
    path = save(tmp_path, 7, model, optimizer)
    expected = torch.rand(3)
    other, other_optimizer = trained(seed=1)
    teacher = build_model(architecture_of(SMALL), 2)
    saved = checkpoint.load_checkpoint(path)
    checkpoint.restore(saved, other, teacher, other_optimizer)
    assert saved.meta["step"] == 7
    assert torch.equal(torch.rand(3), expected)
    for restored in (other, teacher):
        for a, b in zip(model.parameters(), restored.parameters(), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == other_optimizer.state[b].keys()
        for kind, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][kind])


def test_old_checkpoints_are_pruned(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 10, 300):
        save(tmp_path, step, model, optimizer)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step_00000010.safetensors", "step_00000300.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no space left; make room"):
        write_atomically(path, fail)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_up(tmp_path):
    model, optimizer = trained()
    first = save(tmp_path, 1, model, optimizer)
    with full_disk(10**6), pytest.raises(UserError, match="no space left"):
        write_tensors(tmp_path / "step_00000002.safetensors", {"x": torch.zeros(10**6)}, {})
    assert checkpoint.list_checkpoints(tmp_path) == [first]
    assert checkpoint.load_checkpoint(first).meta["step"] == 1
    assert os.listdir(tmp_path) == [first.name]


def killed_while_saving(path):
    """Save to a path in a process that is killed halfway. Returns its exit status."""
    child = os.fork()
    if not child:
        files.save_file = lambda tensors, temporary, header: (
            Path(temporary).write_bytes(b"half of it"),
            os.kill(os.getpid(), signal.SIGKILL),
        )
        try:
            write_tensors(path, {"x": torch.zeros(10)}, {})
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_killed_saves_left_is_removed_when_the_folder_is_claimed(image_folder, tmp_path):
    run = hpm.pretrain(data=str(image_folder), out=str(tmp_path / "run"), **TINY)
    for folder in (run.folder, run.checkpoints):
        assert killed_while_saving(folder / "step_00000009.safetensors") == -signal.SIGKILL
        assert len(list(folder.glob(".step*.tmp"))) == 1
    (run.checkpoints / ".tmpaB3xYz").touch()  # where safetensors writes first
    (run.folder / ".mine.tmp").touch()
    hpm.pretrain(data=str(image_folder), out=str(run.folder), **TINY)
    assert [path.name for path in run.folder.rglob(".*")] == [".mine.tmp", ".lock"]


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_checkpoint(tmp_path, size):
    path = save(tmp_path, 1, *trained())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="truncated or not a weights file"):
        checkpoint.load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, (self.where,))

    def __init__(self, where):
        self.where = where


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_pickled_code_is_refused_and_not_run(tmp_path, suffix):
    path, trap = tmp_path / f"weights{suffix}", tmp_path / "trap"
    torch.save({"model": Evil(str(trap))}, path)
    with pytest.raises(UserError, match="contains pickled code"):
        checkpoint.read_tensors(path)
    assert not trap.exists()


def test_pickled_code_under_a_harmless_name(tmp_path):
    path, trap = tmp_path / "step_00000001.safetensors", tmp_path / "trap"
    torch.save({"model": Evil(str(trap))}, path)
    with pytest.raises(UserError, match="truncated or not a weights file"):
        load(path)
    assert not trap.exists()


def test_a_checkpoint_of_another_architecture(tmp_path):
    path = save(tmp_path, 1, *trained())
    other = build_model(architecture_of(SMALL | {"depth": 2}))
    saved = checkpoint.load_checkpoint(path)
    with pytest.raises(UserError, match=r"another architecture \(encoder.blocks.1.norm1.weight"):
        checkpoint.load_exactly(other, saved.model, path)
    wider = build_model(architecture_of(SMALL | {"embed_dim": 32}))
    with pytest.raises(UserError, match=r"\(1, 1, 16\) instead of \(1, 1, 32\)"):
        checkpoint.load_exactly(wider, saved.model, path)


def test_initial_weights(tmp_path):
    source = build_model(architecture_of(SMALL), seed=1)
    target = build_model(architecture_of(SMALL), seed=2)
    everything = source.state_dict()
    summary = load_initial(target, everything, tmp_path, partial=False)
    assert summary.startswith(f"{len(everything)} of {len(everything)} tensors matched")
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)

    backbone = source.encoder.state_dict()
    fresh = build_model(architecture_of(SMALL), seed=3)
    with pytest.raises(UserError, match="not, the first mask_token; pass --init-partial"):
        load_initial(fresh, backbone, tmp_path, partial=False)
    summary = load_initial(fresh, backbone, tmp_path, partial=True)
    assert f"{len(backbone)} of {len(everything)} tensors matched" in summary
    assert torch.equal(fresh.encoder.cls_token, source.encoder.cls_token)

    narrow = build_model(architecture_of(SMALL | {"embed_dim": 8, "num_heads": 1})).state_dict()
    with pytest.raises(UserError, match="no weights of the encoder in .* pass the --model"):
        load_initial(fresh, narrow, tmp_path, partial=True)

    with pytest.raises(UserError, match="holds no weights of such a model"):
        load_initial(fresh, {"other": torch.zeros(1)}, tmp_path, partial=True)


def test_a_safetensors_file_of_something_else(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load(path)
    assert load_file(path)["x"].shape == (2,)


def test_shapes_are_read_without_the_tensors(tmp_path, monkeypatch):
    class Opened:
        """Notes which tensors are read whole."""

        def __init__(self, path, framework):
            self.file = real(path, framework)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    read, real = [], sharded.safe_open
    monkeypatch.setattr(sharded, "safe_open", Opened)
    tensors = {
        "a": torch.zeros(3, 4, dtype=torch.bfloat16),
        "bytes": torch.zeros(5, dtype=torch.uint8),
        "step": torch.tensor(7.0),
        "none": torch.zeros(0, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = sharded.tensor_shapes(tmp_path / "a.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    assert read == ["step"] and all(t.is_meta for t in found.values())


def test_a_run_on_the_cpu_leaves_the_gpu_alone(monkeypatch, tmp_path):
    """Its memory may be full: to ask for its generator would be an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked"))
    model, optimizer = trained()
    path = checkpoint.save_checkpoint(tmp_path, model, None, optimizer, {"step": 1}, keep=1)
    found = checkpoint.load_checkpoint(path)
    found.rng["cuda"] = torch.zeros(16, dtype=torch.uint8)  # as if it had begun on a GPU
    checkpoint.restore(found, model, None, optimizer)

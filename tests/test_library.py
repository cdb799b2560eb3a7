"""The programs of docs/library.md run as printed, and what is public is documented."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hpm
from hpm.core.torchvision_shim import import_torchvision

PAGE = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
PROGRAMS = {
    code.splitlines()[0].removeprefix("# ").removesuffix(".py"): code
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Import a program of the page, beside the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, code in PROGRAMS.items():
        Path(f"{name}.py").write_text(code, encoding="utf-8")
    yield importlib.import_module
    for name in PROGRAMS:
        sys.modules.pop(name, None)


@pytest.fixture
def started(monkeypatch):
    """The parameters of each student at the time its teacher was made."""
    copies = []
    make = hpm.mining.Teacher.__init__

    def remember(teacher, student):
        make(teacher, student)
        copies.append([p.detach().clone() for p in student.parameters()])

    monkeypatch.setattr(hpm.mining.Teacher, "__init__", remember)
    return copies


@pytest.fixture
def mined(monkeypatch):
    """(number of mined patches, their predicted losses, hidden patches) of each mask."""
    masks = []
    make = hpm.masking.make_mask

    def remember(mask, draw, grid, num_hidden, signal, num_hard):
        visible, hidden = make(mask, draw, grid, num_hidden, signal, num_hard)
        masks.append((num_hard, signal, hidden))
        return visible, hidden

    monkeypatch.setattr(hpm.masking, "make_mask", remember)
    return masks


def test_every_program_is_run():
    assert list(PROGRAMS) == ["own_loop", "lightning_loop", "vit_mae_loop"]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("own_loop", None),
        pytest.param("lightning_loop", "lightning", marks=pytest.mark.slow),
        ("vit_mae_loop", "accelerate"),
    ],
)
def test_programs(name, package, program, started, mined):
    if package:
        pytest.importorskip(package, reason=f"{package} is not installed")
    import_torchvision()  # for those that import it
    torch.manual_seed(0)
    model, teacher = program(name).main()
    assert len(started) == 1
    assert len(mined) == 20 and [mined[0][0], mined[-1][0]] == [0, 6]  # half of 12 of 16
    for count, signal, hidden in mined:
        assert hidden.shape[1] == 12
        hardest = signal.topk(count, dim=1).indices
        assert (hidden[:, :, None] == hardest[:, None]).any(1).all()
    assert not any(p.requires_grad for p in teacher.model.parameters())
    learned = 0
    for start, now, mean in zip(
        started[0], model.parameters(), teacher.model.parameters(), strict=True
    ):
        assert now.isfinite().all()
        if now.requires_grad and (now - start).norm() > 1e-3:
            learned += 1
            assert 0 < (mean - start).norm() < (now - start).norm()
    assert learned > 10


def test_patches_of_vit_mae_know_where_they_are(program):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    import_torchvision()
    model, teacher = program("vit_mae_loop").main()
    for part in (model, teacher.model):
        embeddings = [part.vit.embeddings.position_embeddings]
        embeddings += [d.decoder_pos_embed for d in (part.decoder, part.predictor)]
        for positions in embeddings:
            assert len(positions[0, 1:].unique(dim=0)) == 16


def test_public_names_are_documented_and_typed():
    rows = dict(re.findall(r"^\| `hpm\.(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert list(rows) == ["masking", "losses", "mining"]
    for name, row in rows.items():
        module = getattr(hpm, name)
        assert set(re.findall(r"`(\w+)`", row)) == set(module.__all__) - {"losses", "masking"}
        for public in map(module.__dict__.get, module.__all__):
            assert public.__doc__
            if inspect.isfunction(public):
                assert public.__annotations__.keys() >= {
                    "return",
                    *inspect.signature(public).parameters,
                }


def test_importing_hpm_imports_no_torch():
    code = "import hpm, sys; assert 'torch' not in sys.modules; hpm.mining.Teacher; hpm.masking"
    code += "; from hpm import losses; assert losses is hpm.mining.losses"
    subprocess.run([sys.executable, "-c", code], check=True)

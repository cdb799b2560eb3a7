from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

import hpm
from hpm.core.files import read_tensors
from hpm.mining.memory import DECAY, PRIOR_WEIGHT, HardnessMemory, overlaps

WHOLE = [0.0, 1.0, 0.0, 1.0]
edge_pairs = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda e: abs(e[0] - e[1]) > 0.05)


def naive_overlap(start, end, count, patch, cell):
    a, b = (start + (end - start) * (patch + i) / count for i in (0, 1))
    return max(0.0, min(max(a, b), (cell + 1) / count) - max(min(a, b), cell / count))


@given(edges=edge_pairs, count=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_overlaps(edges, count):
    found = overlaps(tuple(torch.tensor([e], dtype=torch.float64) for e in edges), count)[0]
    for patch in range(count):
        for cell in range(count):
            expected = naive_overlap(*edges, count, patch, cell)
            assert found[patch, cell].item() == pytest.approx(expected, abs=1e-6)
    # Every patch lies within the image, whole.
    assert found.sum(1).numpy() == pytest.approx(abs(edges[1] - edges[0]) / count, abs=1e-6)


def naive_write(found, crop, ids, hardness, grid, decay=DECAY):
    """One image, cell by cell."""
    rows, columns = grid
    total, weight = decay * found[0], decay * found[1]
    for patch, value in zip(ids, hardness):
        i, j = divmod(int(patch), columns)
        for y in range(rows):
            for x in range(columns):
                share = naive_overlap(crop[0], crop[1], rows, i, y) * rows
                share *= naive_overlap(crop[2], crop[3], columns, j, x) * columns
                total[y, x] += share * value
                weight[y, x] += share
    return np.stack([total, weight])


def naive_read(found, crop, grid):
    rows, columns = grid
    values = np.zeros(grid)
    for i in range(rows):
        for j in range(columns):
            total = weight = area = 0.0
            for y in range(rows):
                for x in range(columns):
                    share = naive_overlap(crop[0], crop[1], rows, i, y)
                    share *= naive_overlap(crop[2], crop[3], columns, j, x)
                    total += share * found[0, y, x]
                    weight += share * found[1, y, x]
                    area += share
            values[i, j] = total / area / (weight / area + PRIOR_WEIGHT)
    return values.ravel()


def test_writing_and_reading_as_cell_by_cell():
    """Two visits of random views, some flipped, of a grid that is not square."""
    grid, rng = (4, 3), np.random.default_rng(0)
    memory = HardnessMemory(6, grid)
    expected = np.zeros((6, 2, *grid))
    for _ in range(2):
        ids = rng.permutation(6)[:4]
        low, high = rng.uniform(0, 0.4, (4, 2)), rng.uniform(0.6, 1, (4, 2))
        crops = np.stack([low[:, 0], high[:, 0], high[:, 1], low[:, 1]], 1)
        patches = np.stack([rng.permutation(12)[:7] for _ in range(4)])
        losses = rng.uniform(0, 2, (4, 7))
        memory.write(*map(torch.from_numpy, (ids, crops.astype(np.float32), patches, losses)))
        normal = (losses - losses.mean()) / losses.std()
        for row, index in enumerate(ids):
            expected[index] = naive_write(
                expected[index], crops[row], patches[row], normal[row], grid
            )
    np.testing.assert_allclose(memory.found, expected, atol=5e-3)
    crops = torch.tensor([[0.1, 0.9, 0.8, 0.3]] * 6)
    found = memory.read(torch.arange(6), crops)
    for index in range(6):
        wanted = naive_read(expected[index], crops[index].tolist(), grid)
        np.testing.assert_allclose(found[index], wanted, atol=2e-2)


@given(seed=st.integers(0, 1000), crop=st.tuples(edge_pairs, edge_pairs))
@settings(max_examples=30, deadline=None)
def test_what_was_found_in_a_view_is_read_in_it(seed, crop):
    """Less the doubt; and in its mirror image mirrored."""
    generator = torch.Generator().manual_seed(seed)
    (top, bottom), (left, right) = crop
    crops = torch.tensor([WHOLE, WHOLE])
    memory = HardnessMemory(2, (4, 4))
    hardness = torch.randn(2, 16, generator=generator)
    memory.write(torch.arange(2), crops, torch.arange(16).expand(2, -1), hardness)
    found = memory.read(torch.arange(2), crops)
    standardised = (hardness - hardness.mean()) / hardness.std(correction=0)
    torch.testing.assert_close(found, standardised / (1 + PRIOR_WEIGHT), atol=5e-3, rtol=5e-3)
    views = torch.tensor([[top, bottom, left, right]] * 2)
    seen = memory.read(torch.arange(2), views).view(2, 4, 4)
    mirrored = memory.read(torch.arange(2), views[:, [0, 1, 3, 2]]).view(2, 4, 4)
    torch.testing.assert_close(seen, mirrored.flip(2), atol=1e-4, rtol=1e-4)
    assert seen.abs().max() <= found.abs().max() + 1e-3  # an average of what is there


def test_what_is_not_known_is_neutral_and_forgotten():
    memory = HardnessMemory(3, (2, 2))
    crops = torch.tensor([[0.0, 0.5, 0.0, 0.5]] * 2)
    assert memory.read(torch.arange(2), crops).abs().max() == 0
    left, ids = torch.tensor([WHOLE, WHOLE]), torch.tensor([0, 1])
    memory.write(ids, left, torch.tensor([[0], [0]]), torch.tensor([[2.0], [1.0]]))
    known = memory.read(ids, left)
    assert known[0, 0] > 0.5 and known[1, 0] < -0.5 and known[:, 1:].abs().max() == 0
    for _ in range(10):
        memory.write(ids, left, torch.tensor([[3], [3]]), torch.tensor([[2.0], [1.0]]))
    later = memory.read(ids, left)
    assert 0 < later[0, 0] < 0.5 * known[0, 0] and later[0, 3] > known[0, 0]
    assert memory.found[2].abs().max() == 0


def test_an_image_that_is_twice_in_a_batch_learns_from_both():
    memory = HardnessMemory(1, (1, 2))
    twice, crops = torch.tensor([0, 0]), torch.tensor([WHOLE, WHOLE])
    memory.write(twice, crops, torch.tensor([[0], [1]]), torch.tensor([[1.0], [-1.0]]))
    assert memory.read(twice[:1], crops[:1])[0].tolist() == pytest.approx([0.8, -0.8], abs=1e-2)
    assert memory.found[0, 1].tolist() == [[1.0, 1.0]]


OPTIONS = {
    "memory": {"mine_by": "memory"},
    "progress": {"mine_by": "progress", "predictor_loss": "none"},
    "memory without a predictor": {"mine_by": "memory", "predictor_loss": "none"},
    "every second step": {"mine_every": 2},
    "half-resolution teacher": {"teacher_scale": 0.5},
    "all of it": {"mine_every": 3, "teacher_scale": 0.5, "predictor_depth": 1, "accumulate": 2},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("progress", "all of it") else pytest.mark.slow)
        for n in OPTIONS
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(name, image_folder, tmp_path, monkeypatch):
    options = TINY | OPTIONS[name] | {"data": str(image_folder), "steps": 12}
    whole = hpm.pretrain(out=str(tmp_path / "whole"), **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(out=str(tmp_path / "parts"), **options)
    parts = hpm.pretrain(out=str(tmp_path / "parts"), **options)
    (first, _), (second, _) = (read_tensors(run.latest_checkpoint()) for run in (whole, parts))
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing
    assert ("memory.found" in first) == (name != "half-resolution teacher")
    assert ("memory.slow" in first) == (name == "progress")
    losses = [line["reconstruction_loss"] for line in whole.metrics() if "grad_norm" in line]
    assert np.isfinite(losses).all()


def test_the_memory_hides_where_losses_were_high(tmp_path):
    """Images that are flat but for one noisy corner: it is hidden, wherever the views lie."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(32):
        pixels = np.full((32, 32, 3), 100, np.uint8)
        pixels[:16, :16] = rng.integers(0, 256, (16, 16, 3))
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    from hpm.core.config import PretrainConfig
    from hpm.core.options import make_config
    from hpm.pretraining import train_step
    from hpm.training.build import build_run

    options = TINY | {"data": str(tmp_path / "images"), "out": str(tmp_path / "run")}
    options |= {"holdout": 0, "mine_by": "memory", "predictor_loss": "none", "target": "pixels"}
    options |= {"mask_ratio": 0.5, "steps": 24, "flip": "both", "batch_size": 16}
    state = build_run(make_config(PretrainConfig, options), torch.device("cpu"))
    noisy_hidden, noisy = 0, 0
    for step, batch in enumerate(state.batches()):
        done = train_step(state, batch, step, num_hard=0 if step < 16 else 4)
        if step >= 16:
            patches = batch.images.unfold(2, 4, 4).unfold(3, 4, 4).float()
            is_noisy = patches.std((1, 4, 5)).flatten(1) > 20
            chosen = torch.zeros_like(is_noisy).scatter_(1, done.tensors["hidden_ids"], True)
            noisy_hidden += int((is_noisy & chosen).sum())
            noisy += int(is_noisy.sum())
    state.log.close()
    assert noisy_hidden / noisy > 0.75  # by chance a half


def test_the_small_teacher_is_the_teacher_on_shrunk_images():
    from torch.nn import functional as F

    from hpm.core.config import PretrainConfig
    from hpm.mining.teacher import SmallTeacher, Teacher
    from hpm.models.architecture import resolve_model
    from hpm.models.build import build_model
    from hpm.models.patches import interpolate_positions

    config = PretrainConfig("x", "y", model="vit_nano", image_size=(32, 64), patch_size=8)
    architecture = resolve_model(config)
    student = build_model(architecture, seed=1)
    teacher = Teacher(student)
    miner = SmallTeacher(teacher.model, build_model(replace(architecture, image_size=(16, 32))))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1).add_(0.01)
    teacher.update(student, 0.5)  # the small one follows
    images = torch.randn(3, 3, 32, 64)
    found = miner.predicted_losses(images)
    apart = build_model(replace(architecture, image_size=(16, 32)))
    weights = dict(teacher.model.state_dict())
    for name in ("encoder.pos_embed", "decoder_pos_embed"):
        # The fixed ones of the decoders do not change with the student's.
        positions = weights[name] if "encoder" in name else miner.teacher.decoder_pos_embed
        weights[name] = interpolate_positions(positions, (4, 8), (2, 4))
    weights["decoder_pos_embed"] = miner.model.decoder_pos_embed
    apart.load_state_dict(weights)
    with torch.no_grad():
        coarse = apart.predict_loss(F.avg_pool2d(images, 2))[1].view(3, 1, 2, 4)
    expected = F.interpolate(coarse, (4, 8), mode="bilinear").flatten(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mine-by=memory", "--mask=attention"], ["mine_by", "attention"]),
        (["--mine-by=progress", "--mask=attention"], ["mine_by is progress", "attention"]),
        (["--mine-by=progress", "--teacher-scale=0.5"], ["mine_by is progress", "leave it out"]),
        (["--mine-by=memory", "--mine-every=4"], ["mine_every is 4", "mine_by is memory"]),
        (["--mine-by=progress", "--teacher-view=masked"], ["pass --teacher-view full"]),
        (["--mask=attention", "--teacher-view=masked"], ["mask is attention", "--teacher-view"]),
        (["--mining-temperature=1", "--mask=random"], ["mask random mines nothing"]),
        (["--mining-temperature=-1"], ["--mining-temperature is -1", "negative"]),
        (["--mask-unit=3"], ["mask_unit 3 does not divide the 4 x 4 patches", "--image-size"]),
        (["--mask-unit=4"], ["one unit of all 4 x 4 patches", "smaller"]),
        (["--mask-unit=0"], ["--mask-unit is 0"]),
        (["--mask=uniform", "--mask-unit=2", "--image-size=24"], ["even grid of units of 2"]),
        (["--mine-every=0"], ["--mine-every is 0"]),
        (["--teacher-scale=0"], ["--teacher-scale is 0"]),
        (["--teacher-scale=0.9"], ["4 x 4 patches", "smaller"]),
        (["--teacher-scale=0.5", "--target=teacher"], ["target is teacher"]),
        (["--teacher-scale=0.5", "--teacher-view=masked"], ["teacher_view"]),
        (["--predictor-loss=none"], ["--mine-by memory"]),
    ],
)
def test_contradictions_are_refused(image_folder, tmp_path, options, words):
    result = run_here(
        "pretrain", image_folder, "--out", tmp_path / "run", *tiny_arguments(), *options
    )
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()

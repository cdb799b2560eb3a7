"""Units of k x k patches are mined and hidden as a whole."""

import math

import numpy as np
import pytest
import torch
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

import hpm
from hpm.mining import masking
from hpm.mining.draw import Draw
from hpm.mining.strategies import BUILT_IN
from hpm.mining.units import mean_of_units, unit_grid, unit_of_patches

shapes = st.tuples(st.integers(2, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3)).filter(
    lambda shape: math.prod(shape[1]) > 1
)


@given(shapes, st.integers(0, 100))
def test_means_as_patch_by_patch(shape, seed):
    unit, units = shape
    grid = tuple(unit * size for size in units)
    values = np.random.default_rng(seed).normal(size=(2, *grid))
    total, count = np.zeros((2, *units)), np.zeros(units)
    which = unit_of_patches(grid, unit).view(grid)
    for place in np.ndindex(*grid):
        of = tuple(i // unit for i in place)
        total[(slice(None), *of)] += values[(slice(None), *place)]
        count[of] += 1
        assert which[place] == np.ravel_multi_index(of, units)
    found = mean_of_units(torch.from_numpy(values).flatten(1), grid, unit)
    np.testing.assert_allclose(found, (total / count).reshape(2, -1), atol=1e-12)


@given(
    st.sampled_from(BUILT_IN),
    st.sampled_from([(8, 8), (4, 12), (16, 8)]),
    st.sampled_from([2, 4]),
    st.floats(0.1, 0.95),
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0]),
)
def test_whole_units_are_hidden_but_for_the_last(mask, grid, unit, ratio, share, temperature):
    if mask == "uniform":
        grid, unit, ratio = (8, 8), 2, 0.75
    count, size = math.prod(grid), unit**2
    num_hidden = masking.num_hidden_patches(count, ratio)
    signal = torch.randn(4, count)
    _, hidden = masking.make_mask(
        mask,
        Draw(1, 0, torch.arange(4)),
        grid,
        num_hidden,
        signal,
        int(share * num_hidden),
        temperature,
        unit,
    )
    is_hidden = masking.to_mask(hidden, count)
    assert (is_hidden.sum(1) == num_hidden).all()
    share_hidden = mean_of_units(is_hidden.float(), grid, unit) * size
    assert ((share_hidden == size).sum(1) == num_hidden // size).all()
    partly = (share_hidden > 0) & (share_hidden < size)
    assert (partly.sum(1) == (num_hidden % size > 0)).all()
    assert share_hidden[partly].eq(num_hidden % size).all()


@pytest.mark.parametrize(("mask", "largest"), [("hardest", True), ("easiest", False)])
def test_the_hardest_units_by_their_mean(mask, largest):
    """Not those with the hardest patch: 7 patches are one unit, and three quarters of the next."""
    signal = torch.randn(20, 64)
    signal[:, 0] = 8.0 if largest else -8.0
    signal[:, [1, 8, 9]] = -9.0 if largest else 9.0  # the other patches of the first unit
    draw = Draw(0, 0, torch.arange(20))
    _, hidden = masking.make_mask(mask, draw, (8, 8), 7, signal, 7, unit=2)
    best = mean_of_units(signal, (8, 8), 2).topk(2, dim=1, largest=largest).indices
    of = unit_of_patches((8, 8), 2)[hidden]
    assert ((of == best[:, :1]).sum(1) == 4).all() and ((of == best[:, 1:]).sum(1) == 3).all()
    # Which patch of the last unit stays visible is drawn.
    in_last = unit_of_patches((8, 8), 2) == best[:, 1:]
    visible = (in_last & ~masking.to_mask(hidden, 64)).nonzero()[:, 1]
    assert len(set(((visible // 8) % 2 * 2 + visible % 2).tolist())) > 1


def test_the_share_of_mined_units_is_that_of_mined_patches():
    """Of 36 hidden patches, 9 units, a third are mined: 3 units."""
    signal = torch.zeros(10, 64)
    signal[:, :8] = signal[:, 8:16] = torch.arange(8.0).div(2, rounding_mode="floor")
    draw = Draw(0, 0, torch.arange(10))
    _, hidden = masking.make_mask("moderate", draw, (8, 8), 36, signal, 12, unit=2)
    of = masking.to_mask(hidden, 64)
    assert of[:, 2:8].all() and of[:, 10:16].all()  # units 1 to 3
    assert not of[:, 16:].all(0).any()


def test_a_grid_that_units_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"units of 2 .* do not divide a grid of \(4, 5\)"):
        unit_grid((4, 5), 2)


def test_training_hides_units(image_folder, tmp_path, monkeypatch):
    """From the student, and in the views of the teacher, where these are masked."""
    from hpm.mining import miner

    hidden, make_mask, predict = [], miner.make_mask, miner.predicted_losses_masked

    def record_mask(*arguments):
        hidden.append(make_mask(*arguments)[1])
        return make_mask(*arguments)

    def record_view(predict_loss, images, priority, num_hidden):
        hidden.append(masking.hide_top(priority, num_hidden)[1])
        return predict(predict_loss, images, priority, num_hidden)

    monkeypatch.setattr(miner, "make_mask", record_mask)
    monkeypatch.setattr(miner, "predicted_losses_masked", record_view)
    hpm.pretrain(
        data=str(image_folder),
        out=str(tmp_path / "run"),
        mask_unit=2,
        mining_temperature=0.5,
        teacher_view="masked",
        **TINY | {"steps": 2, "hard_share_start": 0.5},
    )
    assert len(hidden) >= 4
    for ids in hidden:  # 12 of 16 patches: 3 of 4 units
        units = mean_of_units(masking.to_mask(ids, 16).float(), (4, 4), 2)
        assert (units.sum(1) == 3).all() and (units.eq(0) | units.eq(1)).all()

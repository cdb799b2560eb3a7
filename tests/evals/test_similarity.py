"""Nearest images and pairs are those of a naive comparison in float64."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpm.core.errors import UserError
from hpm.evals import similarity
from hpm.evals.similarity import (
    Bank,
    MostSimilar,
    nearest,
    nearest_in_index,
    open_index,
    similar_pairs,
)

CPU = torch.device("cpu")


def cosines(a, b, mean=0):
    a, b = (np.asarray(x, np.float64) - mean for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=-1)[:, None] / np.linalg.norm(b, axis=-1)


def random_features(rows, dtype=np.float32):
    features = np.random.default_rng(0).normal(size=(rows, 8)).astype(dtype)
    features[5] = 3 * features[2]  # the same direction
    return features


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_rows(monkeypatch, dtype, centred):
    monkeypatch.setattr(similarity, "BLOCK", 7)
    features, query = random_features(50, dtype), np.arange(8, dtype=dtype)
    mean = features.astype(np.float64).mean(0) if centred else 0
    wanted, bank = cosines(features, query[None], mean)[:, 0], Bank(features, centred)
    rows, values = nearest(bank, query, 5)
    assert rows.tolist() == np.argsort(-wanted)[:5].tolist()
    np.testing.assert_allclose(values, np.sort(wanted)[::-1][:5], atol=1e-6)
    assert len(nearest(bank, query, 100)[0]) == 50


@pytest.mark.parametrize("threshold", [1.0, 0.5, 1e-9])
@pytest.mark.parametrize("block", [7, 50, 64])
def test_pairs(monkeypatch, threshold, block):
    monkeypatch.setattr(similarity, "BLOCK", block)
    features = random_features(50)
    wanted = np.triu(cosines(features, features) >= threshold - 1e-6, 1)
    bank = Bank(features, centred=False)
    found = [list(part) for part in similar_pairs(bank, threshold, CPU)]
    pairs = {(int(a), int(b)) for first, second, _ in found for a, b in zip(first, second)}
    assert pairs == set(zip(*map(np.ndarray.tolist, np.nonzero(wanted)))) and (2, 5) in pairs
    best = MostSimilar(3)
    for part in found:
        best.add(*part)
    assert best.pairs[0][:2] == (2, 5) and len(best.pairs) == min(3, len(pairs))
    values = [value for _, _, value in best.pairs]
    assert values == sorted(values, reverse=True) and max(values) <= 1


@given(
    arrays(np.float32, (6, 3), elements=st.floats(-2, 2, width=32), unique=True),
    st.floats(0.5, 2),
    st.floats(-3, 3),
)
def test_a_centred_bank_forgets_place_and_scale(features, scale, place):
    """The similarities of scaled and shifted features are the same."""
    one, other = Bank(features, True), Bank(scale * features.astype(np.float64) + place, True)
    torch.testing.assert_close(one.block(0), other.block(0), rtol=0, atol=1e-4)


def test_an_index_is_kept(tmp_path):
    pytest.importorskip("faiss")
    features = random_features(60)
    made_of, file = tmp_path / "f.npy", tmp_path / "f.npy.faiss"
    np.save(made_of, features)
    bank = Bank(features, centred=True)
    index = open_index(file, made_of, bank)
    rows, values = nearest_in_index(index, bank, features[7], 4)
    exact = nearest(bank, features[7], 4)
    assert rows.tolist() == exact[0].tolist()
    np.testing.assert_allclose(values, exact[1], atol=1e-6)
    written = file.stat().st_mtime_ns
    assert open_index(file, made_of, bank).ntotal == 60
    assert file.stat().st_mtime_ns == written
    assert open_index(file, made_of, Bank(features[:50], True)).ntotal == 50  # of other features
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged: remove it"):
        open_index(file, made_of, bank)


def test_faiss_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        UserError, match=r"--approximate needs faiss: pip install 'hpm-vision\[faiss\]'"
    ):
        open_index(tmp_path / "a", tmp_path / "b", Bank(random_features(9), True))

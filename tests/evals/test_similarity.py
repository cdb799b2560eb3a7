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
from hpm.evals.similarity import MostSimilar, nearest, nearest_in_index, open_index, similar_pairs

CPU = torch.device("cpu")


def cosines(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=-1)[:, None] / np.linalg.norm(b, axis=-1)


def random_features(rows, dtype=np.float32):
    features = np.random.default_rng(0).normal(size=(rows, 8)).astype(dtype)
    features[5] = 3 * features[2]  # the same direction
    return features


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_rows(monkeypatch, dtype):
    monkeypatch.setattr(similarity, "BLOCK", 7)
    features, query = random_features(50, dtype), np.arange(8, dtype=dtype)
    wanted = cosines(features, query[None])[:, 0]
    rows, values = nearest(features, query, 5)
    assert rows.tolist() == np.argsort(-wanted)[:5].tolist()
    np.testing.assert_allclose(values, np.sort(wanted)[::-1][:5], atol=1e-6)
    assert len(nearest(features, query, 100)[0]) == 50


@pytest.mark.parametrize("threshold", [1.0, 0.5, 1e-9])
@pytest.mark.parametrize("block", [7, 50, 64])
def test_pairs(monkeypatch, threshold, block):
    monkeypatch.setattr(similarity, "BLOCK", block)
    features = random_features(50)
    wanted = np.triu(cosines(features, features) >= threshold - 1e-6, 1)
    found = [list(part) for part in similar_pairs(features, threshold, CPU)]
    pairs = {(int(a), int(b)) for first, second, _ in found for a, b in zip(first, second)}
    assert pairs == set(zip(*map(np.ndarray.tolist, np.nonzero(wanted)))) and (2, 5) in pairs
    best = MostSimilar(3)
    for part in found:
        best.add(*part)
    assert best.pairs[0][:2] == (2, 5) and len(best.pairs) == min(3, len(pairs))
    values = [value for _, _, value in best.pairs]
    assert values == sorted(values, reverse=True) and max(values) <= 1


@given(
    arrays(np.float32, (6, 3), elements=st.floats(0.5, 2, width=32)),
    st.floats(0.1, 10),
    st.permutations(range(6)),
)
def test_scale_and_order_do_not_matter(features, scale, order):
    def pairs(rows):
        return {
            frozenset((rows[a], rows[b]))
            for first, second, values in similar_pairs(features[rows] * np.float32(scale), 0.9, CPU)
            for a, b, value in zip(first, second, values)
            if value > 0.9 + 1e-4  # not those at the edge
        }

    def all_but_edge(found, wanted):
        sure = cosines(features, features) > 0.9 + 1e-3
        return {pair for pair in found ^ wanted if sure[tuple(pair)]}

    assert not all_but_edge(pairs(list(range(6))), pairs(list(order)))


def test_an_index_is_kept(tmp_path):
    pytest.importorskip("faiss")
    features = random_features(60)
    made_of, file = tmp_path / "f.npy", tmp_path / "f.npy.faiss"
    np.save(made_of, features)
    index = open_index(file, made_of, features)
    rows, values = nearest_in_index(index, features[7], 4)
    exact = nearest(features, features[7], 4)
    assert rows.tolist() == exact[0].tolist()
    np.testing.assert_allclose(values, exact[1], atol=1e-6)
    written = file.stat().st_mtime_ns
    assert open_index(file, made_of, features).ntotal == 60
    assert file.stat().st_mtime_ns == written
    assert open_index(file, made_of, features[:50]).ntotal == 50  # of other features
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged: remove it"):
        open_index(file, made_of, features)


def test_faiss_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"--approximate needs faiss: pip install 'hpm\[faiss\]'"):
        open_index(tmp_path / "a", tmp_path / "b", random_features(9))

"""A cache changes nothing but the time."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from hpm.data import cache as caching
from hpm.data.arrays import Pixels
from hpm.data.cache import FORKS, Cache, make_cache
from hpm.data.loader import StepSampler, TrainingViews, training_loader
from hpm.data.sources import open_source

pytestmark = pytest.mark.skipif(not FORKS, reason="processes are not forked here")


def write_each_kind(folder, number=12):
    """JPEG (some turned, some to be reduced) and PNG, or deep arrays."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(number):
        pixels = rng.integers(0, 256, (90 + index, 70, 3), np.uint8)
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[0x0112] = 1 + index % 8
        image.save(folder / f"{index:02d}.{('jpg', 'png')[index % 2]}", exif=exif)
    return str(folder)


def write_deep(folder, number=12):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(number):
        pixels = rng.integers(0, 65536, (40 + index, 30, 3)).astype(np.uint16)
        np.save(folder / f"{index:02d}.npy", pixels if index % 2 else pixels.astype(np.float64))
    return str(folder)


def batches(source, cache, workers, channels=3):
    views = TrainingViews((16, 16), channels, 0, (0.2, 1.0), True, 4, cache)
    steps = StepSampler(len(source), 4, 9, seed=0)
    return list(training_loader(source, views, steps, workers, False))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", [write_each_kind, write_deep])
def test_views_are_the_same_with_and_without(write, workers, channels, tmp_path):
    source = open_source(write(tmp_path / "data")).train
    if write is write_deep and channels != 3:
        pytest.skip("arrays of three channels")
    cache = Cache(len(source), 10**7)
    plain = batches(source, None, workers, channels)
    for _ in range(2):
        for one, other in zip(plain, batches(source, cache, workers, channels)):
            assert torch.equal(one.images, other.images) and torch.equal(one.crops, other.crops)
    assert all(cache.get(index, channels) for index in range(len(source)))


def test_an_image_is_decoded_once_for_all_processes_and_epochs(tmp_path, monkeypatch):
    source = open_source(write_each_kind(tmp_path / "data")).train
    context = multiprocessing.get_context("fork")
    decoded, lock = context.Array("i", len(source)), context.Lock()
    decode = TrainingViews.decoded

    def counted(views, source, index):
        with lock:
            decoded[index] += 1
        return decode(views, source, index)

    monkeypatch.setattr(TrainingViews, "decoded", counted)
    cache = Cache(len(source), 10**7)
    batches(source, cache, 2)  # three epochs
    first = list(decoded)
    batches(source, cache, 2)
    # A process decodes what the other one is decoding at that moment, but nothing twice.
    assert set(first) <= {1, 2} and list(decoded) == first
    alone = Cache(len(source), 10**7)
    batches(source, alone, 1)
    assert [count - before for count, before in zip(decoded, first)] == [1] * len(source)


def test_what_does_not_fit_is_not_kept():
    pixels = Pixels(np.arange(12, dtype=np.uint8).reshape(3, 2, 2), 3)
    cache = Cache(3, 100)
    for index in range(3):
        cache.put(index, pixels)
    assert [cache.get(i, 3) is not None for i in range(3)] == [True, False, False]
    assert np.array_equal(cache.get(0, 3).array, pixels.array)


def test_auto_keeps_small_sets_alone(tmp_path, monkeypatch):
    source = open_source(write_each_kind(tmp_path / "data")).train
    views = TrainingViews((16, 16), 3, 0, (0.2, 1.0), True, 4)

    def make(wanted):
        return make_cache(wanted, source, lambda index: views.decoded(source, index))

    needed = sum(views.decoded(source, i).array.nbytes for i in range(len(source)))
    monkeypatch.setattr(caching, "available_memory", lambda: 5 * needed)
    assert make("auto") and not make("false") and make("true").size > needed
    monkeypatch.setattr(caching, "available_memory", lambda: 3 * needed)
    assert not make("auto") and make("true").size > needed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each process of a machine has its own
    assert make("true").size < needed
    monkeypatch.undo()
    assert caching.available_memory() > 0


def test_where_the_system_does_not_tell_its_free_memory(monkeypatch, tmp_path):
    """On macOS: all memory counts."""
    monkeypatch.setattr(caching, "MEMINFO", tmp_path / "meminfo")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < caching.available_memory() <= whole


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    source = open_source(str(tmp_path)).train
    views = TrainingViews((16, 16), 3, 0, (0.2, 1.0), True, 4)
    assert make_cache("auto", source, lambda index: views.decoded(source, index)) is None

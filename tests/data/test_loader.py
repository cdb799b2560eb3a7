import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from hpm.core.errors import UserError
from hpm.data import workers as data_workers
from hpm.data.cache import FORKS
from hpm.data.loader import (
    StepSampler,
    TrainingViews,
    Views,
    evaluation_batches,
    normalize,
    training_loader,
)
from hpm.data.sources import FileSource, open_source
from hpm.data.statistics import measure_statistics
from hpm.data.workers import num_workers

VIEWS = TrainingViews((16, 16), 3, 0, (0.2, 1.0), True, 4)


def batches(source, workers=0, **sampler):
    sampler = StepSampler(len(source), 8, 12, seed=0, **sampler)
    return list(training_loader(source, VIEWS, sampler, workers, pin_memory=False))


def test_the_cores_of_a_machine_are_shared_among_its_own_processes(monkeypatch):
    monkeypatch.setattr(data_workers, "usable_cores", lambda: 16)
    assert num_workers(None) == 15
    assert num_workers(3) == 3
    monkeypatch.setenv("WORLD_SIZE", "16")  # four machines of four
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers(None) == 3


def test_an_epoch_is_a_permutation():
    keys = [key for step in StepSampler(20, 5, 8, seed=1) for key in step]
    assert sorted(i for e, i in keys if e == 0) == list(range(20))
    assert sorted(i for e, i in keys if e == 1) == list(range(20))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]


def test_neither_workers_nor_restarts_nor_processes_change_a_sample(image_folder):
    source = open_source(str(image_folder)).train
    whole = batches(source)
    with_workers = batches(source, workers=2)
    restarted = batches(source, start_step=7)
    parts = [batches(source, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, with_workers[step].images)
        assert torch.equal(batch.indices, with_workers[step].indices)
        joined = torch.cat([part[step].images for part in parts])
        assert torch.equal(batch.images, joined)
        if step >= 7:
            assert torch.equal(batch.images, restarted[step - 7].images)
    # Six steps are an epoch: the same image looks different in the next.
    first, second = whole[0], {int(i): v for b in whole[6:] for i, v in zip(b.indices, b.images)}
    assert not torch.equal(first.images[0], second[int(first.indices[0])])


def test_repeats_of_an_image_are_views_of_one_decoded_image(image_folder, monkeypatch):
    source = open_source(str(image_folder)).train
    opened = []
    open_image = source.open
    monkeypatch.setattr(source, "open", lambda index: opened.append(index) or open_image(index))
    repeated = batches(source, repeats=4)
    read = opened[-12 * 2 :]
    assert len(set(read)) == len(read)  # each once, in four epochs
    for batch in repeated:
        indices = batch.indices.view(2, 4)
        assert torch.equal(indices, indices[:, :1].expand(2, 4))
        assert len(set(batch.view_ids.tolist())) == 8
        assert torch.equal(batch.view_ids.view(2, 4)[:, 0], indices[:, 0])
        assert torch.equal(batch.view_ids % len(source), batch.indices)
        assert not torch.equal(batch.images[0], batch.images[1])
        assert not torch.equal(batch.crops[0], batch.crops[1])
    parts = [batches(source, rank=rank, world_size=2, repeats=4) for rank in (0, 1)]
    for batch, one, two in zip(repeated, *parts):
        assert torch.equal(batch.images, torch.cat([one.images, two.images]))
        assert torch.equal(batch.view_ids, torch.cat([one.view_ids, two.view_ids]))
    restarted = batches(source, start_step=7, repeats=4)
    assert torch.equal(restarted[0].images, repeated[7].images)


def test_repeats_visit_every_image_in_as_many_epochs():
    keys = [key for step in StepSampler(25, 6, 4 * 6, seed=1, repeats=3) for key in step]
    assert len(keys) == 24 * 6 and len(set(keys)) == len(keys)
    for first in (0, 3):  # 4 steps an epoch, a round of three epochs
        visits = {}
        for epoch, index, number in keys:
            if first <= epoch < first + 3:
                visits.setdefault(index, []).append(number)
        assert len(visits) == 24 and all(v == [0, 1, 2] for v in visits.values())


def test_once_is_as_before(image_folder):
    source = open_source(str(image_folder)).train
    for one, other in zip(batches(source), batches(source, repeats=1)):
        assert torch.equal(one.images, other.images) and torch.equal(one.view_ids, one.indices)


@pytest.mark.skipif(not FORKS, reason="processes are not forked here")
def test_workers_start_beside_busy_threads(image_folder):
    """Forked while other threads compute and log: no lock that they hold is waited for."""
    source = open_source(str(image_folder)).train
    stop = threading.Event()
    a = torch.randn(256, 256)  # here: a thread may not draw from the generator beside a fork

    def compute():
        while not stop.is_set():
            a @ a
            logging.getLogger("hpm").debug("busy")

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert len(batches(source, workers=2)) == 12
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def broken_source(tmp_path, number=6, broken=(2, 3)):
    for index in range(number):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(path)
        if index in broken:
            path.write_bytes(b"no image")
    return open_source(str(tmp_path)).train


def test_an_unreadable_image_is_passed_over(tmp_path):
    source = broken_source(tmp_path)
    sample = Views(source, VIEWS, stand_in=True)[0, 2]
    view, index, unreadable = sample.view, sample.index, sample.unreadable
    assert index == 4 and view[0].mean() == 160
    assert [i for i, _ in unreadable] == [2, 3]
    read = list(evaluation_batches(source, (8, 8), 3, batch_size=2))
    assert torch.cat([b.indices for b in read]).tolist() == [0, 1, 4, 5]
    assert torch.cat([b.images[:, 0, 0, 0] for b in read if len(b.images)]).tolist() == [
        0,
        40,
        160,
        200,
    ]
    assert [i for b in read for i, _ in b.unreadable] == [2, 3]


def test_statistics(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    mean, std = measure_statistics(open_source(str(tmp_path)).train, (8, 8), 3, seed=0)
    assert mean == pytest.approx((pixels / 255).mean((0, 1, 2)).tolist())
    assert std == pytest.approx((pixels / 255).std((0, 1, 2)).tolist())
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    ours = normalize(images, torch.tensor(mean), torch.tensor(std))
    assert ours.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(
        ours.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=1e-4
    )


def test_no_readable_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    source = FileSource("here", [tmp_path / "a.png"])
    with pytest.raises(UserError, match="here: no readable image among 1"):
        measure_statistics(source, (8, 8), 3, seed=0)


def test_parts_of_a_batch_keep_their_views_apart(image_folder):
    source = open_source(str(image_folder)).train
    batch = batches(source, repeats=4)[0]
    one, two = batch.parts(2)
    assert torch.equal(torch.cat([one.view_ids, two.view_ids]), batch.view_ids)
    assert torch.equal(one.view_ids % len(source), one.indices) and len(set(one.view_ids)) == 4


class Damaged:
    """Many images, of which only some can be read; counts how many were tried."""

    name, labels, classes = "damaged", None, []

    def __init__(self, count, readable=()):
        self.count, self.readable, self.tried = count, set(readable), 0

    def __len__(self):
        return self.count

    def path(self, index):
        return f"{index}.png"

    def is_deep(self):
        return False

    def read(self, index):
        return None

    def open(self, index):
        self.tried += 1
        if index not in self.readable:
            raise OSError("gone")
        return Image.new("RGB", (8, 8))


def test_few_of_a_million_damaged_images_are_tried():
    source = Damaged(1_000_000)
    views = Views(source, VIEWS, stand_in=True)
    source.tried = 0
    assert views[0, 5].view is None and source.tried <= 1000
    source.tried = 0
    with pytest.raises(UserError, match="damaged: no readable image among 10240 "):
        measure_statistics(source, (8, 8), 3, seed=0)
    assert source.tried < 20_000


def test_an_image_of_another_place_stands_in_for_one_of_many_damaged_in_a_row():
    source = Damaged(1_000_000, readable=range(500_000, 1_000_000))
    views = Views(source, VIEWS, stand_in=True)
    source.tried = 0
    first, again = views[0, 5], views[0, 5]
    assert first.view is not None and first.index == again.index >= 500_000
    assert source.tried < 2 * 200


def test_every_one_of_few_images_may_stand_in():
    for last in (4, 6):
        assert Views(Damaged(900, readable=[last]), VIEWS, stand_in=True)[0, 5].index == last

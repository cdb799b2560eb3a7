"""Views of clips: which frames, which crop, and that neither workers nor repeats change them."""

import itertools
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from videos import number_of, write_video

from hpm.data.loader import (
    Batch,
    StepSampler,
    TrainingViews,
    evaluation_batches,
    training_loader,
    training_views,
)
from hpm.data.opening import open_image
from hpm.data.sources import DemoVideos, open_source
from hpm.data.statistics import measure_statistics
from hpm.data.transforms import evaluation_view, least_size
from hpm.data.video import demo
from hpm.data.video.clips import ClipEvaluationViews, ClipViews, crop_box
from hpm.data.video.frames import FrameFolder
from hpm.data.video.sampling import ClipSampling, ViewGrid

SAMPLING = ClipSampling(4, 3)
SIZE = (32, 128)  # of the numbered videos: nothing is cropped away


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        write_video(folder / f"{number}.mp4", frames=30 + number)
    return open_source(str(folder), clips=True).train


def numbers_of(view):
    return [number_of(frame) for frame in view.transpose(1, 2, 3, 0)]


def test_clips_start_anywhere_and_their_times_are_exact(videos):
    views = ClipViews(SIZE, 3, 0, (1.0, 1.0), False, 1, SAMPLING)
    starts = set()
    for epoch, index in itertools.product(range(30), range(2)):
        view, crop, times = views(videos, (epoch, index))
        numbers = numbers_of(view)
        assert view.shape == (3, 4, *SIZE) and crop == (0, 1, 0, 1)
        assert numbers == SAMPLING.numbers(numbers[0])
        length = 30 + index
        assert times == (numbers[0] / length, (numbers[0] + SAMPLING.span) / length)
        starts.add((index, numbers[0]))
    assert {start for index, start in starts if index == 0} <= set(range(21))
    assert len(starts) > 20


def test_repeats_share_a_clip_but_not_a_crop(videos, monkeypatch):
    views = ClipViews((16, 16), 3, 0, (0.2, 0.5), True, 1, SAMPLING)
    opened = []
    original = type(videos).open_video
    monkeypatch.setattr(type(videos), "open_video", lambda s, i: opened.append(i) or original(s, i))
    found = [views(videos, (3, 1, repeat)) for repeat in range(3)]
    assert opened == [1] and len({times for _, _, times in found}) == 1
    assert len({crop for _, crop, _ in found}) == 3


def test_all_frames_of_a_clip_are_cropped_and_flipped_alike():
    source = DemoVideos("train")
    views = ClipViews((24, 24), 3, 0, (0.3, 0.8), True, 1, ClipSampling(3, 2))
    flips = set()
    side, _ = least_size((24, 24), 0.3)  # the built-in videos are rendered no larger than needed
    for epoch in range(6):
        view, (top, bottom, left, right), times = views(source, (epoch, 5))
        start = round(times[0] * demo.LENGTH)
        frames = demo.render(5, "train", [start, start + 2, start + 4], side).frames
        flips.add(left > right)
        for number, frame in enumerate(frames):
            box = [round(side * edge) for edge in (top, bottom, *sorted((left, right)))]
            part = frame[box[0] : box[1], box[2] : box[3]].transpose(2, 0, 1)
            part = part[:, :, ::-1] if left > right else part
            resized = torch.nn.functional.interpolate(
                torch.from_numpy(part.copy())[None], (24, 24), mode="bicubic", antialias=True
            )
            difference = np.abs(view[:, number].astype(int) - resized[0].numpy().astype(int))
            assert difference.max() <= 1
    assert flips == {True, False}


def test_neither_workers_nor_resuming_change_clips(videos):
    def batches(workers, start=0):
        views = training_views(videos, (16, 16), 3, 0, (0.2, 1.0), True, 4, SAMPLING)
        steps = StepSampler(len(videos), 4, 3, seed=0, start_step=start, repeats=2)
        return list(training_loader(videos, views, steps, workers, pin_memory=False))

    alone, shared, late = batches(0), batches(2), batches(0, start=1)
    for one, other in [*zip(alone, shared), *zip(alone[1:], late)]:
        assert torch.equal(one.images, other.images) and torch.equal(one.times, other.times)
    assert alone[0].images.shape == (4, 3, 4, 16, 16) and alone[0].images.dtype == torch.uint8
    assert alone[0].times.shape == (4, 2) and alone[0].crops.shape == (4, 4)
    first, second = alone[0].parts(2)
    assert torch.equal(torch.cat([first.times, second.times]), alone[0].times)


def test_the_evaluated_clip_is_the_middle(videos):
    (batch,) = evaluation_batches(videos, SIZE, 3, 6, sampling=SAMPLING)
    assert numbers_of(batch.images[0].numpy()) == [10, 13, 16, 19]
    assert torch.allclose(batch.times[0], torch.tensor([10 / 30, 20 / 30]))


def test_segments_and_crops_span_the_video(videos):
    views = ClipEvaluationViews((32, 32), 3, SAMPLING, grid=ViewGrid(3, 2))
    times = [views(videos, (0, 0, view))[2] for view in range(6)]
    assert [start for start, _ in times] == [start / 30 for start in (0, 0, 10, 10, 20, 20)]
    assert [crop_box(128, 32, (32, 32), crop, 3)[::2] for crop in range(3)] == [
        (0, 32),
        (48, 80),
        (96, 128),
    ]
    assert crop_box(32, 128, (32, 32), 1, 2) == (0, 96, 32, 128)
    assert crop_box(50, 50, (32, 32), 2, 3) == (0, 0, 50, 50)


def test_a_batch_holds_all_views_of_its_videos(videos):
    batches = list(evaluation_batches(videos, SIZE, 3, 13, sampling=SAMPLING, grid=ViewGrid(3, 2)))
    assert [batch.indices.tolist() for batch in batches] == [
        [i] * 6 + [i + 1] * 6 for i in range(0, 6, 2)
    ]
    alone = evaluation_batches(videos, SIZE, 3, 6, sampling=SAMPLING, grid=ViewGrid(3, 1))
    assert numbers_of(next(alone).images[1].numpy()) == [10, 13, 16, 19]  # the middle segment


def test_videos_without_all_of_their_views():
    images = torch.arange(7)[:, None]
    batch = Batch(images, torch.tensor([4, 4, 4, 5, 5, 8, 8]), [])
    kept, indices = batch.complete(3)
    assert kept.flatten().tolist() == [0, 1, 2] and indices.tolist() == [4]
    assert torch.equal(batch.complete(1)[1], batch.indices)


def test_a_stride_of_zero_repeats_the_middle_frame(videos):
    (batch,) = evaluation_batches(videos, SIZE, 3, 6, sampling=ClipSampling(4, 0))
    assert numbers_of(batch.images[0].numpy()) == [14] * 4


def test_single_frames_are_images_from_all_of_the_video(videos):
    views = training_views(videos, SIZE, 3, 0, (1.0, 1.0), False, 1)
    made = [views(videos, (epoch, 0)) for epoch in range(40)]
    assert all(view.shape == (3, *SIZE) and times is None for view, _, times in made)
    numbers = {number_of(view.transpose(1, 2, 0)) for view, _, _ in made}
    assert len(numbers) > 15 and max(numbers) > 24 and min(numbers) < 5
    (batch,) = evaluation_batches(videos, SIZE, 3, 6)
    assert batch.images.shape == (6, 3, *SIZE) and batch.times is None
    assert number_of(batch.images[0].permute(1, 2, 0).numpy()) == 14
    mean, std = measure_statistics(videos, SIZE, 3, 0)
    assert 0.08 < mean[0] < 0.9 and std[0] > 0.1


def test_grey_clips_and_wrong_channels(videos):
    view = ClipViews(SIZE, 1, 0, (1.0, 1.0), False, 1, SAMPLING)(videos, (0, 0))[0]
    assert view.shape == (1, 4, *SIZE) and view.dtype == np.uint8
    (batch,) = evaluation_batches(videos, SIZE, 5, 6, sampling=SAMPLING)
    assert len(batch.images) == 0 and "3 channels instead of 5" in batch.unreadable[0][1]


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_deep_frames_are_resized_as_images(kind, tmp_path):
    """At edges, too, where the filter overshoots: 16 bits stay between black and white."""
    edge = np.zeros((64, 64), kind)
    edge[:, 32:] = 65535 if kind == np.uint16 else 1
    (tmp_path / "video").mkdir()
    for time in range(4):
        Image.fromarray(edge).save(tmp_path / "video" / f"{time}.tif")
    source = open_source(str(tmp_path), clips=True).train
    view, *_ = ClipEvaluationViews((48, 48), 1, ClipSampling(4, 1))(source, (0, 0))
    image = evaluation_view(open_image(tmp_path / "video" / "0.tif"), (48, 48), 1)
    assert view.dtype == np.float32 and all(np.array_equal(view[:, t], image) for t in range(4))
    assert (view.max() > 255) == (kind == np.float32)


def test_frames_of_mixed_depth_have_one_scale(tmp_path):
    for time, white in enumerate((np.uint8(255), np.uint16(65535))):
        Image.fromarray(np.full((8, 8), white)).save(tmp_path / f"{time}.png")
    frames = FrameFolder(str(tmp_path)).read([0, 1], 1)
    assert frames.dtype == np.float32 and (frames == 255).all()


def test_images_keep_their_views():
    assert isinstance(
        training_views(open_source("demo").train, SIZE, 3, 0, (0.2, 1.0), True, 4), TrainingViews
    )


# demo-video


def features(split, count, numbers):
    """Masks' and pixels' summary of single frames: what a nearest neighbour could use."""
    clips = [demo.render(i, split, numbers, size=16) for i in range(count)]
    return (
        np.stack([clip.frames.reshape(-1) for clip in clips]).astype(np.float32),
        np.stack([clip.masks.reshape(-1) for clip in clips]).astype(np.float32),
        np.array([clip.label for clip in clips]),
    )


def test_a_single_frame_tells_nothing_about_the_class():
    train = features("train", 800, [20])
    test = features("test", 300, [20])
    for seen, unseen in zip(train[:2], test[:2]):
        distances = (unseen**2).sum(1)[:, None] - 2 * unseen @ seen.T + (seen**2).sum(1)
        accuracy = (train[2][distances.argmin(1)] == test[2]).mean()
        assert accuracy < 0.16  # chance is 0.1, its standard deviation 0.017
    # Neither does the size of the object, by which growing and shrinking might differ.
    areas, labels = train[1].mean(1), train[2]
    means = np.array([areas[labels == label].mean() for label in range(10)])
    errors = np.array([areas[labels == label].std() for label in range(10)]) / np.sqrt(80)
    assert (np.abs(means - areas.mean()) < 4 * errors).all()


def test_motions_are_what_their_names_say():
    """Follow the object's mask by the phase of its circular mean."""
    for index in range(40):
        clip = demo.render(index, "test", range(16))
        angles = 2 * np.pi * (np.arange(64) + 0.5) / 64
        x, y = (
            np.unwrap(np.angle((clip.masks.sum(axis) * np.exp(1j * angles)).sum(1)))
            for axis in (1, 2)
        )
        right, down = (x[-1] - x[0]) / 2 / np.pi, (y[-1] - y[0]) / 2 / np.pi
        grown = np.diff(np.log(clip.masks.sum((1, 2))))
        name = demo.CLASSES[clip.label]
        if name in demo.DIRECTIONS:
            expected = 15 * np.array(demo.DIRECTIONS[name])
            assert np.allclose([right, down], np.sign(expected) * np.hypot(right, down), atol=0.03)
            assert 0.3 < np.hypot(right, down) < 0.7
        elif name in ("growing", "shrinking"):
            sign = 1 if name == "growing" else -1
            assert np.median(sign * grown) > 0 and (sign * grown < -0.5).sum() <= 1
        elif "clockwise" in name:
            assert _turn(x, y) == (1 if name == "clockwise" else -1)
        else:
            still, moving = (x, y) if name.endswith("down") else (y, x)
            assert np.ptp(still) < 0.12 and np.ptp(moving) > 0.5


def _turn(x, y):
    """The sign of the turn of a path, y pointing down: 1 for clockwise."""
    dx, dy = np.diff(x), np.diff(y)
    return np.sign((dx[:-1] * dy[1:] - dy[:-1] * dx[1:]).sum())


def test_demo_videos_depend_on_nothing_but_their_number():
    whole = demo.render(3, "train", range(8))
    assert np.array_equal(demo.render(3, "train", [2, 5]).frames, whole.frames[[2, 5]])
    with closing(DemoVideos("train").open_video(3)) as video:
        assert np.array_equal(video.read([2, 5, 99])[:2], whole.frames[[2, 5]])
    large = demo.render(3, "train", [2], size=128)
    shrunk = large.masks[0].reshape(64, 2, 64, 2).mean((1, 3)) > 0.5
    assert (shrunk != whole.masks[2]).mean() < 0.02
    with pytest.raises(IndexError):
        demo.render(demo.SIZES["test"], "test")
    with pytest.raises(ValueError):
        demo.render(0, "val")

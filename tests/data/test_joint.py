"""Images and annotations change together, and only by (seed, epoch, index)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpm.core.errors import UserError
from hpm.data.dense import dense_batches, dense_loader
from hpm.data.detection import Objects, objects, open_detection
from hpm.data.joint import (
    DetectionTesting,
    DetectionTraining,
    SegmentationTesting,
    SegmentationTraining,
    _resized,
    seeded,
)
from hpm.data.loader import StepSampler
from hpm.data.segmentation import open_segmentation
from hpm.data.sources import Subset

SEGMENTED, DETECTED = open_segmentation("demo").train, open_detection("demo").train
PLAIN = {"distort": False, "most_of_one_class": 1.0}


def write_masks(root, count=6, size=(40, 60)):
    """The left half is red and class 0, the right half blue and class 1."""
    labels = np.zeros(size, np.uint8)
    labels[:, size[1] // 2 :] = 1
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[labels == 0, 0] = pixels[labels == 1, 2] = 255
    for split in ("train", "val"):
        for kind, array in (("images", pixels), ("masks", labels)):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(array).save(folder / f"{number}.png")
    return open_segmentation(str(root))


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("halves")).train


@pytest.mark.parametrize("epoch", range(10))
def test_labels_follow_their_pixels(halves, epoch):
    view = SegmentationTraining(size=(32, 48), fill=[0, 255, 0], **PLAIN)
    for index in range(len(halves)):
        image, labels = view(halves, (epoch, index))
        assert image.shape == (3, 32, 48) and labels.shape == (32, 48)
        assert image.dtype == labels.dtype == torch.uint8
        # Red is class 0, green outside, blue class 1.
        expected = torch.tensor([0, 255, 1], dtype=torch.uint8)[image.argmax(0)]
        # All but the seam, where resizing mixes the colours.
        assert (expected != labels).float().mean() < 0.06


@given(st.integers(0, 30), st.integers(0, 200))
def test_boxes_and_masks_follow_the_objects(epoch, index):
    """What the masks cover looks as the object does, and boxes fit tightly around them."""
    view = DetectionTraining(size=96, scale=(0.5, 2.0), fill=[0, 0, 0])
    image, found = view(DETECTED, (epoch, index))
    assert image.shape == (3, 96, 96) and found.masks.shape[1:] == (96, 96)
    for box, mask in zip(found.boxes.int().tolist(), found.masks):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert (found.classes == index % 10).all() and not found.crowd.any()
    outside = image.sum(0) == 0
    assert (found.masks.any(0) & outside).float().mean() < 0.02


def test_masks_cover_the_pixels_of_their_objects():
    """Of an image that is white on its objects and black elsewhere, changed with them."""

    class Silhouettes(DetectionTraining):
        def image(self, source, index):
            mask = objects(source, index).masks.any(0)
            return mask.to(torch.uint8).mul(255).expand(3, -1, -1).contiguous()

    view = Silhouettes(size=64, scale=(0.3, 2.0), fill=[0, 0, 0])
    for index in range(30):
        image, found = view(DETECTED, (1, index))
        assert ((image[0] > 127) != found.masks.any(0)).float().mean() < 0.05


def test_objects_that_left_the_crop_are_dropped():
    view = DetectionTraining(size=64, scale=(1.9, 2.0))
    counts = [(len(view(DETECTED, (0, i))[1]), len(objects(DETECTED, i))) for i in range(60)]
    assert any(left < all_of_them for left, all_of_them in counts)
    assert any(left == 0 for left, _ in counts)
    empty = next(view(DETECTED, (0, i))[1] for i, (left, _) in enumerate(counts) if not left)
    assert empty.boxes.shape == (0, 4) and empty.masks.shape == (0, 64, 64)


def test_boxes_without_masks_are_cut_at_the_border():
    class Boxes(DetectionTraining):
        def objects(self, source, index, image):
            found = super().objects(source, index, image)
            return Objects(found.boxes, found.classes, None, found.crowd)

    view = Boxes(size=64, scale=(1.5, 2.0))
    for index in range(30):
        _, found = view(DETECTED, (0, index))
        assert found.masks is None and len(found.boxes) == len(found.classes)
        assert (found.boxes[:, 2:] - found.boxes[:, :2] >= 1).all()
        assert found.boxes.numel() == 0 or 0 <= found.boxes.min() <= found.boxes.max() <= 64


def test_crowds_are_not_trained_on():
    class Crowded(DetectionTraining):
        def objects(self, source, index, image):
            found = super().objects(source, index, image)
            return Objects(found.boxes, found.classes, found.masks, ~found.crowd)

    assert len(Crowded(size=64)(DETECTED, (0, 0))[1]) == 0


VIEWS = [
    (SEGMENTED, SegmentationTraining(size=(48, 48), seed=5)),
    (DETECTED, DetectionTraining(size=64, seed=5)),
]


def all_tensors(batch):
    """Of every sample, by (index, place in the batch)."""
    for target in batch.targets:
        if isinstance(target, Objects):
            yield from (target.boxes, target.classes, target.masks)
        else:
            yield target
    yield from batch.images


def alike(first, second):
    pairs = zip(all_tensors(first), all_tensors(second), strict=True)
    return torch.equal(first.indices, second.indices) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("source", "view"), VIEWS)
def test_workers_resuming_and_processes_change_nothing(source, view):
    def batches(workers=0, start=0, **options):
        steps = StepSampler(len(source), 4, 4, seed=3, start_step=start, **options)
        return list(dense_loader(source, view, steps, workers))

    whole = batches()
    assert all(map(alike, whole, batches(workers=2)))
    torch.rand(7)  # whatever was drawn before
    assert all(map(alike, whole[2:], batches(start=2)))
    parts = [batches(rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert all(map(alike, batch.parts(2), [parts[0][step], parts[1][step]]))


@pytest.mark.parametrize(("source", "view"), VIEWS)
def test_views_differ_by_seed_and_epoch_alone(source, view):
    first = view(source, (0, 3))[0]
    state = torch.get_rng_state()
    assert torch.equal(view(source, (0, 3))[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(view(source, (1, 3))[0], first)
    other = type(view)(size=view.size, seed=6)
    assert not torch.equal(other(source, (0, 3))[0], first)


def test_seeded_puts_the_generator_back():
    with seeded(1, (2, 3)):
        first = torch.rand(3)
    with seeded(1, (2, 3)):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, (2, 4)):
        assert not torch.equal(torch.rand(3), first)


def test_a_crop_is_drawn_again_where_one_class_covers_it():
    """A small view of a small object: background alone in many crops, in fewer if drawn again."""
    alone = {}
    for share in (1.0, 0.75):
        view = SegmentationTraining(
            size=(16, 16), scale=(4, 4), distort=False, most_of_one_class=share
        )
        views = (view(SEGMENTED, (0, i))[1] for i in range(40))
        alone[share] = sum(bool((labels == labels[0, 0]).all()) for labels in views)
    assert alone[0.75] < alone[1.0] / 2


def test_distortion_changes_colours_and_nothing_else():
    plain = SegmentationTraining(size=(48, 48), distort=False)
    distorted = SegmentationTraining(size=(48, 48))
    changed = 0
    for index in range(20):
        (a, labels), (b, same) = plain(SEGMENTED, (0, index)), distorted(SEGMENTED, (0, index))
        assert torch.equal(labels, same)
        changed += not torch.equal(a, b)
    assert 12 < changed <= 20


def test_deep_and_grey_images():
    view = SegmentationTraining(size=(48, 48), deep=True, distort=False)
    eight = SegmentationTraining(size=(48, 48), distort=False)
    deep, same = view(SEGMENTED, (0, 2))[0], eight(SEGMENTED, (0, 2))[0]
    assert deep.dtype == torch.float32 and (deep - same.float()).abs().max() <= 1
    distorted = SegmentationTraining(size=(48, 48), deep=True)(SEGMENTED, (0, 2))[0]
    assert distorted.max() > 1  # 255 is still full scale
    assert SegmentationTraining(size=(48, 48), channels=1)(SEGMENTED, (0, 2))[0].shape[0] == 1


def test_testing_keeps_annotations_as_they_are(tmp_path):
    splits = write_masks(tmp_path, count=1)
    image, labels = SegmentationTesting(size=20)(splits.test, (0, 0))
    assert image.shape == (3, 20, 30) and labels.shape == (40, 60)
    assert SegmentationTesting(size=None)(splits.test, (0, 0))[0].shape == (3, 40, 60)
    image, found = DetectionTesting(size=128, longest=256)(DETECTED, (0, 1))
    assert image.shape == (3, 128, 128)
    assert torch.equal(found.boxes, objects(DETECTED, 1).boxes)


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [(20, 60, (20, 30)), (40, 45, (30, 45)), (60, 60, (40, 60)), (None, 5, (40, 60))],
)
def test_the_longer_side_is_limited(tmp_path, size, longest, expected):
    splits = write_masks(tmp_path, count=1)

    class Images(DetectionTesting):
        def objects(self, source, index, image):
            return Objects(torch.zeros(0, 4), torch.zeros(0).long(), None, torch.zeros(0).bool())

    image, _ = Images(size=size, longest=longest)(splits.test, (0, 0))
    assert image.shape[1:] == expected


def test_long_images_fit_into_the_longest_side():
    """Rounding the shorter side first would make 130 pixels of 1000x200."""
    assert _resized(torch.zeros(3, 200, 1000), 128, 128).shape == (3, 26, 128)
    assert _resized(torch.zeros(3, 3000, 2), 128, 128).shape == (3, 128, 1)


def test_testing_in_order_and_in_shares():
    view = SegmentationTesting(size=64)
    source = open_segmentation("demo").test
    few = Subset(source, np.arange(7))
    batches = list(dense_batches(few, view, batch_size=3))
    assert [b.indices.tolist() for b in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert isinstance(batches[0].images, list) and batches[0].targets[0].shape == (64, 64)
    shares = [list(dense_batches(few, view, 3, rank=r, world_size=2)) for r in range(2)]
    assert [b.indices.tolist() for b in shares[1]] == [[1, 3, 5]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_mask_is_one_line(tmp_path, workers):
    splits = write_masks(tmp_path)
    Image.new("L", (9, 9)).save(tmp_path / "train" / "masks" / "2.png")
    view = SegmentationTraining(size=(16, 16))
    steps = StepSampler(6, 3, 2, seed=0)
    with pytest.raises(UserError) as caught:
        list(dense_loader(splits.train, view, steps, workers))
    assert "2.png: its mask is 9x9" in str(caught.value) and "\n" not in str(caught.value)


def test_another_stands_in_for_an_unreadable_image(tmp_path):
    splits = write_masks(tmp_path)
    (tmp_path / "train" / "images" / "2.png").write_bytes(b"broken")
    view = SegmentationTraining(size=(16, 16))
    (batch,) = dense_loader(splits.train, view, [[(0, 1), (0, 2)]])
    assert batch.indices.tolist() == [1, 3] and batch.unreadable[0][0] == 2
    batches = list(dense_batches(splits.train, SegmentationTesting(size=20), 6))
    assert batches[0].indices.tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("channels", [1, 3])
def test_photometric_distortion_in_any_unit(channels, tmp_path):
    """Floating-point images may hold anything, such as -1000 to 3000 Hounsfield units."""
    pixels = np.linspace(-1000, 3000, 32 * 32 * channels, dtype=np.float32)
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    np.save(tmp_path / "train" / "images" / "0.npy", pixels.reshape(32, 32, channels))
    mask = np.repeat(np.arange(2, dtype=np.uint8), 16)[None].repeat(32, 0)
    Image.fromarray(mask).save(tmp_path / "train" / "masks" / "0.png")
    source = open_segmentation(str(tmp_path)).train
    options = {"size": (32, 32), "scale": (1, 1), "channels": channels, "deep": True}
    view = SegmentationTraining(**options, flip=False)
    plain = SegmentationTraining(**options, flip=False, distort=False)(source, (0, 0))[0]
    distorted = [view(source, (epoch, 0))[0] for epoch in range(20)]
    assert not all(torch.equal(image, plain) for image in distorted)
    for image in distorted:
        assert image.min() / 255 > -1001 and image.max() / 255 < 3001
        assert (image - plain).abs().mean() / 255 < 600  # of a range of 4000

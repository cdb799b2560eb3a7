"""What a look at a data set finds."""

import io

import numpy as np
import pytest
from helpers import write_images
from PIL import Image

from hpm.data.opening import open_image
from hpm.data.sources import open_source
from hpm.data.survey import shape_of, spaced, survey, view_channels


def looked_at(folder, look_at=1000, search=1000):
    source = open_source(str(folder)).train
    return survey(source, look_at, search, (16, 16), None, lambda loop, about: loop)


def test_a_folder(tmp_path):
    write_images(tmp_path, classes=2, per_class=8)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(tmp_path / "class_0/wide.jpg")
    copied = (tmp_path / "class_0/000.png").read_bytes()
    for name in ("class_1/copy.png", "class_1/again.png"):
        (tmp_path / name).write_bytes(copied)
    (tmp_path / "class_0/broken.png").write_bytes(copied[: len(copied) // 2])
    found = looked_at(tmp_path)
    assert (found.count, found.classes, found.looked_at) == (20, 2, 20)
    ((name, reason),) = found.unreadable
    assert name.endswith("broken.png") and reason
    assert (max(found.widths), max(found.heights), found.short_side) == (50, 30, 20)
    assert found.channels == {3: 20} or found.channels == {3: 19}
    assert (found.searched, found.duplicates) == (20, 2)
    assert found.decode_seconds > 0


def test_a_sample(image_folder):
    found = looked_at(image_folder, look_at=10, search=20)
    assert (found.count, found.looked_at, found.searched) == (48, 10, 20)
    assert spaced(48, 10)[0] == 0 and spaced(48, 10)[-1] == 47 and len(spaced(3, 10)) == 3


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("RGB", 3), ("P", 3), ("RGBA", 4), ("CMYK", 3), ("I;16", 1)]
)
def test_channels_of_pictures(mode, channels):
    assert shape_of(Image.new(mode, (7, 5))) == (7, 5, channels)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 7), (7, 5, 1)), ((12, 5, 7), (5, 12, 7)), ((9, 30, 40), (40, 30, 9))],
)
def test_channels_of_arrays(shape, expected):
    """The shorter end of three axes is taken to be the channels."""
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.uint8))
    assert shape_of(open_image(io.BytesIO(file.getvalue()))) == expected


def test_which_channels_suit():
    assert view_channels({1: 50}) == 1
    assert view_channels({1: 50, 3: 1}) == 3
    assert view_channels({3: 10, 4: 10}) == 3
    assert view_channels({7: 10, 3: 2}) == 7
    assert view_channels({7: 2, 3: 10}) == 3
    assert view_channels({40: 2}) == 32

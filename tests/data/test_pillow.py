"""Only image decoders read images, whatever a file is called."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import hpm
from hpm.data.arrays import UnreadableImage
from hpm.data.opening import open_image
from hpm.data.pillow import FORMATS, HEIC
from hpm.data.transforms import evaluation_view
from hpm.show import view
from hpm.weights.resolve import load

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
showpage
%%EOF
"""


def encoded(kind):
    file = io.BytesIO()
    if kind == HEIC:
        pytest.importorskip("pillow_heif").register_heif_opener()
    more = {"append_images": [PICTURE], "save_all": True} if kind == "MPO" else {}
    PICTURE.save(file, kind, **more)
    return file.getvalue()


@pytest.fixture
def no_ghostscript(monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", called)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")


@pytest.mark.parametrize("kind", [*FORMATS, "MPO", HEIC])
def test_the_formats_that_are_read(kind, tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(kind))
    for file in (io.BytesIO(encoded(kind)), tmp_path / "photo.png"):
        assert evaluation_view(open_image(file), (8, 8), 3).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "content", [EPS, *(encoded(kind) for kind in ("ICO", "TGA", "PDF", "JPEG2000", "DDS"))]
)
def test_nothing_else_is_read(content, tmp_path, no_ghostscript):
    for name in ("photo.png", "photo.jpg", "photo.tif", "photo.bmp"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage, match="cannot identify"):
            evaluation_view(open_image(tmp_path / name), (8, 8), 3)
    with pytest.raises(UnreadableImage, match="cannot identify"):
        evaluation_view(open_image(io.BytesIO(content)), (8, 8), 3)


def test_nothing_else_dropped_on_the_page_is_read(finished_run, no_ghostscript):
    trained = load(finished_run.folder)
    viewer = view.Viewer(trained, *view._examples("demo", trained), 2)
    assert "cannot be read as an image" in viewer.answer({}, EPS)["error"]


def test_images_are_opened_in_one_place():
    folder = Path(hpm.__file__).parent
    found = [
        path.name for path in folder.rglob("*.py") if re.search(r"Image\.open\(", path.read_text())
    ]
    assert found == ["pillow.py"]

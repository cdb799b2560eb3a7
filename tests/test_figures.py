import numpy as np
import pytest
import torch
from PIL import Image

from hpm.config import ShowConfig
from hpm.data.sources import open_source
from hpm.figures import draw, picture, reconstruct
from hpm.masking import hide_top, noise
from hpm.models.patches import patchify
from hpm.run import load
from hpm.show import show
from hpm.targets import PixelTarget


def test_the_reconstruction_is_pasted_into_the_visible_part(finished_run):
    trained = load(finished_run.folder)
    images = torch.randn(2, 3, 16, 16)
    visible_ids, hidden_ids = hide_top(noise(torch.arange(2), 16, 0, 0), 12)
    with torch.no_grad():
        target = PixelTarget((4, 4), 3, normalized=True)
        filled = reconstruct(trained.model, images, visible_ids, hidden_ids, target)
        prediction, _ = trained.model(images, visible_ids, hidden_ids)
    before, after = patchify(images, (4, 4)), patchify(filled, (4, 4))
    for image in range(2):
        assert torch.equal(before[image, visible_ids[image]], after[image, visible_ids[image]])
        true, shown = before[image, hidden_ids[image]], after[image, hidden_ids[image]]
        std = (true.var(1, keepdim=True) + 1e-6).sqrt()
        expected = prediction[image] * std + true.mean(1, keepdim=True)
        torch.testing.assert_close(shown, expected)


def test_the_mask_holds_the_hardest_patches(finished_run):
    trained = load(finished_run.folder)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    shown = picture(trained, images, torch.arange(3), hard_share=0.5)
    assert shown.mask.sum(1).tolist() == [12, 12, 12]
    hardest = shown.maps.predicted.topk(6, dim=1).indices
    assert shown.mask.gather(1, hardest).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_figure(finished_run, tmp_path, channels):
    trained = load(finished_run.folder)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    shown = picture(trained, images, torch.arange(2), hard_share=0.5)
    if channels != 3:
        shown.images = shown.images[:, :1].repeat(1, channels, 1, 1)
        shown.reconstruction = shown.reconstruction[:, :1].repeat(1, channels, 1, 1)
    draw(shown, tmp_path / "figure.png", "title")
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert pixels.shape[1] > 900 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_show(finished_run, image_folder, tmp_path):
    out = tmp_path / "show.png"
    config = ShowConfig(str(finished_run.folder), str(image_folder), str(out), images=3)
    assert show(config) == out
    assert Image.open(out).height > 500
    one = open_source(str(image_folder)).train.path(0)
    show(ShowConfig(str(finished_run.folder), one, str(tmp_path / "one.png")))
    assert Image.open(tmp_path / "one.png").height < 400

from dataclasses import replace

import numpy as np
import pytest
import torch
from detecting import SHAPE, tiny_model

import hpm
from hpm.models.architecture import Architecture
from hpm.weights.detection import DetectionModel
from hpm.weights.finetuned import load_model


@pytest.mark.parametrize("window_size", [None, 3])
def test_an_image_alone_is_found_as_in_a_batch(window_size):
    """Whatever the others' sizes: padding reaches to one square always."""
    model = tiny_model(window_size=window_size, score_threshold=0.0)
    rng = np.random.default_rng(1)
    sizes = [(64, 64), (20, 64), (64, 33), (51, 64)]
    images = [torch.from_numpy(rng.integers(0, 256, (3, *s), dtype=np.uint8)) for s in sizes]
    together = model.detect(images, sizes)
    for image, size, expected in zip(images, sizes, together):
        [alone] = model.detect([image], [size])
        assert len(alone.boxes) > 0
        torch.testing.assert_close(alone.boxes, expected.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.scores, expected.scores, atol=1e-5, rtol=1e-4)
        assert (alone.masks != expected.masks).float().mean() < 1e-3


def test_detections_are_in_the_pixels_of_the_file():
    """What is found in an image of 64x32 that was 128x32: twice as far to the right, no lower."""
    model = tiny_model(score_threshold=0.0)
    image = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)
    [seen], [found] = model.detect([image], [(32, 64)]), model.detect([image], [(32, 128)])
    torch.testing.assert_close(found.boxes, seen.boxes * torch.tensor([2.0, 1, 2, 1]))
    assert found.masks.shape[1:] == (32, 128)
    inside = found.boxes[0].round().int().tolist()
    outside = found.masks[0].clone()
    outside[max(0, inside[1] - 2) : inside[3] + 2, max(0, inside[0] - 2) : inside[2] + 2] = False
    assert not outside.any()


def test_saved_and_loaded(tmp_path):
    model = tiny_model(window_size=2, masks=False)
    model.save(tmp_path / "detector.safetensors")
    loaded = load_model(tmp_path)
    image = model.preprocess(np.full((30, 50, 3), 200, np.uint8))
    assert image.shape == (3, 38, 64)
    torch.testing.assert_close(image[:, 0, 0], (200 / 255 - model.mean) / model.std)
    [one], [two] = model([image]), loaded([image])
    assert torch.equal(one.boxes, two.boxes) and torch.equal(one.scores, two.scores)


def test_an_encoder_without_maps_of_one_size(tmp_path):
    """Hiera merges patches on its way: its blocks' grids differ and cannot be interpolated."""
    pytest.importorskip("timm")
    hiera = Architecture(
        model="timm/hiera_tiny_224",
        image_size=(224, 224),
        patch_size=(32, 32),
        channels=3,
        embed_dim=768,
        depth=12,
    )
    with pytest.raises(hpm.UserError, match="needs a plain ViT"):
        DetectionModel(replace(SHAPE, architecture=hiera))

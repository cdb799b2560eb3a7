"""The arrays that figures and pages show, and the figure made of them."""

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image

from hpm.core.config import PretrainConfig
from hpm.core.extras import need
from hpm.core.options import make_config
from hpm.mining.draw import noise
from hpm.mining.masking import hide_top
from hpm.models.architecture import resolve_model
from hpm.models.build import build_model
from hpm.models.patches import gather_patches, patchify, unpatchify
from hpm.show import figures
from hpm.show.drawing import draw
from hpm.show.figures import (
    head_pixels,
    picture,
    pixels,
    principal_colours,
    reconstruct,
    unavailable_panels,
)
from hpm.targets.pixels import PixelTarget
from hpm.targets.registry import make_target
from hpm.weights.resolve import Trained, load

IMAGES = torch.randint(
    0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)
PANELS = ("image", "actual", "predicted", "mask", "reconstruction", "pca", "attention")


def cut(images):
    return patchify(images.float(), (4, 4))


def trained(**changes):
    """A model with random weights, as a run of those options would begin."""
    config = make_config(PretrainConfig, TINY | {"data": "", "out": "x"} | changes)
    architecture = resolve_model(config)
    mean, std = [0.5] * config.channels, [0.25] * config.channels
    target = make_target(config, architecture, mean, std, torch.device("cpu"))
    architecture = architecture.with_target_dim(target.dim)
    model = build_model(architecture).eval()
    return Trained("x", architecture, mean, std, model.encoder, model, model, config)


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


def test_what_a_whole_model_shows(finished_run):
    trained = load(finished_run.folder)
    assert unavailable_panels(trained) == {}
    shown = picture(trained, IMAGES, torch.arange(3), hard_share=0.5, panels=PANELS)
    assert shown.panels == list(PANELS)
    assert shown.mask.sum(1).tolist() == [12, 12, 12]
    hardest = shown.predicted.topk(6, dim=1).indices
    assert shown.mask.gather(1, hardest).all()
    # Visible pixels survive the way to the model and back.
    same = (cut(shown.reconstruction) == cut(IMAGES)).all(-1)
    assert same[~shown.mask].all() and not same[shown.mask].all()
    assert shown.pca.shape == (3, 16, 3) and shown.pca.min() == 0 and shown.pca.max() == 1
    assert shown.attention.shape == (3, 3, 16)
    assert (shown.attention > 0).all() and (shown.attention.sum(-1) < 1).all()


def test_what_a_run_draws_meanwhile_has_no_features(finished_run):
    shown = picture(load(finished_run.folder), IMAGES, torch.arange(3), 0.5)
    assert shown.panels == ["image", "actual", "predicted", "mask", "reconstruction"]


def test_many_images_are_shown_as_few(finished_run):
    """They are computed some at a time."""
    trained = load(finished_run.folder)
    many = IMAGES.repeat(7, 1, 1, 1)
    shown = picture(trained, many, torch.arange(3).repeat(7), 0.5, panels=PANELS)
    few = picture(trained, IMAGES, torch.arange(3), 0.5, panels=PANELS)
    assert torch.equal(shown.mask[18:], few.mask)
    torch.testing.assert_close(shown.actual[18:], few.actual, rtol=1e-4, atol=1e-5)
    assert len(shown.pca) == len(shown.attention) == 21


def test_the_mask_follows_ratio_share_and_seed():
    whole = trained()

    def mask(**options):
        options = {"hard_share": 0.5, "mask_ratio": 0.5, "seed": 0} | options
        return picture(whole, IMAGES, torch.arange(3), **options).mask

    assert mask().sum(1).tolist() == [8, 8, 8] and mask(mask_ratio=0.25).sum() == 12
    assert not torch.equal(mask(), mask(seed=1))
    assert torch.equal(mask(hard_share=1.0), mask(hard_share=1.0, seed=1))


def test_a_run_that_mines_by_memory_is_shown_mining_by_losses():
    model = trained(mine_by="memory", predictor_loss="none", mask_ratio=0.5)
    options = {"hard_share": 1.0, "num_masks": 8}
    shown = picture(model, IMAGES, torch.arange(3), panels=("mask", "actual"), **options)
    hardest = shown.actual.topk(8, dim=1).indices.sort(1).values
    hidden = shown.mask.nonzero()[:, 1].view(3, 8)
    assert torch.equal(hidden, hardest)
    alone = picture(model, IMAGES, torch.arange(3), panels=("mask",), **options)
    assert torch.equal(alone.mask, shown.mask) and alone.actual is None
    # Of a patch that no mask hid, nothing is known: it is not taken for the hardest.
    one = picture(model, IMAGES, torch.arange(3), 1.0, 1, panels=("mask", "actual"))
    assert one.actual.isnan().any() and not one.actual[one.mask].isnan().any()


def test_patches_that_no_mask_hid_are_grey():
    shown = picture(trained(), IMAGES, torch.arange(3), 0, num_masks=1, mask_ratio=0.25)
    assert (shown.actual.isnan().sum(1) == 12).all()
    drawn = pixels(shown, 0)["actual"].reshape(16, 3)
    assert (drawn[shown.actual[0].isnan().numpy()] == 128).all()
    hidden = drawn[~shown.actual[0].isnan().numpy()]
    assert len(np.unique(hidden, axis=0)) == 4


@pytest.mark.parametrize("normalized", [True, False])
def test_reconstructions_are_in_the_images_units(normalized):
    """Of a model that always predicts 0: the patch's own mean, or the training set's."""
    whole = trained(target="normalized_pixels" if normalized else "pixels")
    torch.nn.init.zeros_(whole.model.reconstructor.head.weight)
    torch.nn.init.zeros_(whole.model.reconstructor.head.bias)
    shown = picture(whole, IMAGES, torch.arange(3), 0)
    patches = cut(shown.reconstruction)
    true = cut(IMAGES).mean(-1, keepdim=True).expand_as(patches)
    expected = true if normalized else torch.full_like(true, 127.5)
    assert ((patches - expected)[shown.mask].abs() <= 0.51).all()


def test_principal_colours():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 60, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:3]
    colours = principal_colours(hidden @ basis + 5)
    for axis in range(3):  # each colour is one of the directions, in the order of their variance
        pair = torch.stack([colours[..., axis].flatten(), hidden[..., axis].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95
        assert (colours[..., axis] == 0).sum() >= 1 and (colours[..., axis] == 1).sum() >= 1


def test_principal_colours_convert_a_part_at_a_time(monkeypatch):
    """To float64, in which all features of a large page would take gigabytes."""
    features = torch.randn(5, 20, 8, generator=torch.Generator().manual_seed(0))
    whole, converted, double = principal_colours(features), [], torch.Tensor.double

    def convert(tensor):
        converted.append(len(tensor))
        return double(tensor)

    monkeypatch.setattr(figures, "ROWS", 32)
    monkeypatch.setattr(torch.Tensor, "double", convert)
    torch.testing.assert_close(principal_colours(features), whole)
    assert max(converted) == 32


def test_principal_colours_have_a_sign_of_their_own():
    features = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(3))
    turned = features.flip(1)  # another order of the patches
    torch.testing.assert_close(principal_colours(turned), principal_colours(features).flip(1))
    outlier = features.clone()
    outlier[0, 0] *= 1e3
    assert (principal_colours(outlier)[1].std(0) > 0).all()


def test_features_that_do_not_vary_are_grey():
    assert (principal_colours(torch.ones(1, 9, 8)) == 0.5).all()


def test_channels_shape_and_targets():
    """Seven channels, not square, and a target that is no pixels."""
    whole = trained(
        image_size=(16, 24), channels=7, target="hog", predictor_loss="none", mask="random"
    )
    assert unavailable_panels(whole) == {
        "predicted": "it has no loss predictor",
        "reconstruction": "its target is hog, not pixels",
    }
    images = torch.randn(2, 7, 16, 24) * 50 + 100
    shown = picture(whole, images, torch.arange(2), 0.0, panels=PANELS)
    assert shown.panels == ["image", "actual", "mask", "pca", "attention"]
    found = pixels(shown, 1)
    assert found["image"].shape == found["mask"].shape == (16, 24, 3)
    assert found["actual"].shape == found["pca"].shape == (4, 6, 3)
    assert [head.shape for head in head_pixels(shown, 1)] == [(4, 6, 3)] * 3


def test_a_backbone_shows_features_only(finished_run):
    backbone = load(finished_run.backbone)
    assert set(unavailable_panels(backbone)) == {"actual", "predicted", "mask", "reconstruction"}
    shown = picture(backbone, IMAGES, torch.arange(3), 0.0, panels=PANELS)
    assert shown.panels == ["image", "pca", "attention"]
    whole = picture(load(finished_run.folder), IMAGES, torch.arange(3), 0.0, panels=PANELS)
    assert torch.equal(shown.attention, whole.attention) and torch.equal(shown.pca, whole.pca)


def test_encoders_of_timm():
    need("timm", "timm", "the test")
    plain = trained(model="timm/vit_tiny_patch16_224", image_size=32, patch_size=16, mask="random")
    assert unavailable_panels(plain) == {"attention": "attention of timm encoders is not available"}
    hiera = trained(model="timm/hiera_tiny_224", image_size=64, patch_size=32, mask="random")
    assert unavailable_panels(hiera) == {"attention": "its encoder has no class token"}
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    shown = picture(hiera, images, torch.arange(2), 0.0, panels=PANELS)
    assert shown.panels == ["image", "actual", "predicted", "mask", "reconstruction", "pca"]


def test_a_frozen_target_that_is_not_there(finished_run):
    whole = load(finished_run.folder)
    whole.config.target, whole.config.target_model, whole.target = "frozen", "/nowhere", None
    reasons = unavailable_panels(whole)
    assert set(reasons) == {"actual", "reconstruction"} and "/nowhere" in reasons["actual"]
    shown = picture(whole, IMAGES, torch.arange(3), 0.5)
    assert shown.panels == ["image", "predicted", "mask"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure(finished_run, tmp_path, channels, suffix):
    shown = picture(load(finished_run.folder), IMAGES[:2], torch.arange(2), hard_share=0.5)
    if channels != 3:
        shown.images = shown.images[:, :1].repeat(1, channels, 1, 1)
        shown.reconstruction = shown.reconstruction[:, :1].repeat(1, channels, 1, 1)
    path = tmp_path / f"figure.{suffix}"
    draw(shown, path, "title")
    if suffix == "png":
        drawn = np.asarray(Image.open(path).convert("RGB"))
        assert drawn.shape[1] > 900 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    else:
        assert "<svg" in path.read_text()


def test_hidden_patches_are_predicted_from_visible_ones_alone(finished_run):
    """What lies under the mask does not show in the reconstruction but by its mean and contrast."""
    whole = load(finished_run.folder)
    shown = picture(whole, IMAGES, torch.arange(3), 0.0)
    changed = cut(IMAGES)
    hidden_ids = shown.mask.nonzero()[:, 1].view(3, -1)
    # The pixels of each in reverse: of the same mean and deviation.
    turned = gather_patches(changed, hidden_ids).view(3, -1, 16, 3).flip(2).flatten(2)
    index = hidden_ids[..., None].expand_as(turned)
    other = unpatchify(changed.scatter(1, index, turned), (4, 4), (4, 4)).to(torch.uint8)
    again = picture(whole, other, torch.arange(3), 0.0)
    assert torch.equal(again.mask, shown.mask) and not torch.equal(other, IMAGES)
    assert (again.reconstruction.int() - shown.reconstruction.int()).abs().max() <= 1

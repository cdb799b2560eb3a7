import dataclasses

import numpy as np
import pytest
import torch
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.extras import need
from hpm.mining.losses import squared_error, token_cross_entropy
from hpm.models.patches import gather_patches, patchify
from hpm.targets.frozen_model import of_hugging_face, of_timm
from hpm.targets.hog import HogTarget, hog
from hpm.targets.pixels import ChannelTarget, PixelTarget
from hpm.targets.teacher import TeacherTarget
from hpm.training.checks import check_pretrain


def images(batch=2, channels=3, size=(16, 16), seed=0):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 100), st.booleans())
def test_ranking_by_the_other_pixel_loss(seed, normalized):
    """Against the loss computed from the prediction itself, undone patch by patch."""
    x = images(seed=seed)
    hidden = torch.tensor([[0, 3, 5], [2, 6, 7]])
    patches = gather_patches(patchify(x, (4, 4)), hidden)
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    other = "pixels" if normalized else "normalized_pixels"
    target = PixelTarget((4, 4), 3, normalized, other)
    prediction = torch.randn(2, 3, 48)
    loss = target.patch_loss(prediction, gather_patches(target(x), hidden))
    ranked = target.ranked_by(loss, x, hidden)
    if normalized:
        expected = squared_error(prediction * std + mean, patches)
    else:
        expected = squared_error((prediction - mean) / std, (patches - mean) / std)
    torch.testing.assert_close(ranked, expected, rtol=1e-4, atol=1e-5)
    same = PixelTarget((4, 4), 3, normalized)
    assert torch.equal(same.ranked_by(loss, x, hidden), loss)


def test_pixels_normalised_by_channel():
    """Each channel of each tube has mean 0 and deviation 1, and gives its pixels back."""
    clips = torch.randn(2, 2, 4, 8, 8) * 3 + 1
    target = ChannelTarget((2, 4, 4), 2)
    found = target(clips)
    tube = found[1, 3].view(2, 4, 4, 2)  # the second column of the second row
    pixels = clips[1, :, :2, 4:, 4:].movedim(0, -1)
    for channel in range(2):
        expected = pixels[..., channel] - pixels[..., channel].mean()
        torch.testing.assert_close(
            tube[..., channel], expected / expected.std(), rtol=1e-4, atol=1e-5
        )
    patches = patchify(clips, (2, 4, 4))
    torch.testing.assert_close(target.to_pixels(found, patches), patches, rtol=1e-4, atol=1e-5)


def test_hog_equals_that_of_scikit_image():
    """Every histogram to 1e-4 but for pixels on the edge of a bin (here: none), and the same order
    of cells by gradient energy."""
    from skimage.feature import hog as reference

    rng = np.random.default_rng(0)
    picture = rng.random((32, 48)).astype(np.float32)
    expected = reference(
        picture,
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
    ).reshape(4, 6, 9)
    ours = hog(torch.from_numpy(picture)[None, None], (8, 8))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_hog_target_belongs_to_its_patch():
    """Changing what is inside of a patch (not its border) changes the target of no other one."""
    target = HogTarget((16, 16), 3)
    assert target.dim == 2 * 2 * 3 * 9 and HogTarget((4, 4), 1).dim == 9
    x = images(size=(32, 48))
    before = target(x)
    assert before.shape == (2, 6, target.dim)
    x[:, :, 20:28, 20:28] = 0
    changed = (target(x) != before).any(-1)
    assert changed.tolist() == [[False, False, False, False, True, False]] * 2


def test_hog_does_not_care_for_brightness_and_contrast():
    x = images(size=(32, 32))
    torch.testing.assert_close(hog(3 * x + 1, (8, 8)), hog(x, (8, 8)), rtol=1e-3, atol=1e-4)


def test_teacher_target_leaves_the_class_token_out():
    features = torch.randn(2, 1 + 4, 8)
    target = TeacherTarget(8, 4)
    assert torch.equal(target(images(), features), features[:, 1:])
    same = target.patch_loss(3 * features[:, 1:], features[:, 1:])
    torch.testing.assert_close(same, torch.zeros(2, 4), atol=1e-6, rtol=0)


def test_token_loss_equals_a_naive_version():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    tokens = torch.randint(0, 5, (2, 3))
    expected = -(logits.softmax(-1).log()).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(token_cross_entropy(logits, tokens).double(), expected)


def timm_model(name, **options):
    torch.manual_seed(0)
    return need("timm", "timm", "x").create_model(name, num_classes=0, **options)


def test_frozen_timm_models():
    """A ViT with class token and registers, a convolutional net, a Swin: all on the same grid."""
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    vit = timm_model(
        "vit_small_patch14_reg4_dinov2", img_size=28, depth=1, embed_dim=48, num_heads=3
    )
    frozen = of_timm(vit, data | {"input_size": (3, 28, 28)})
    pixels = torch.rand(2, 3, 28, 28)
    mean, std = (torch.tensor(data[n]).view(-1, 1, 1) for n in ("mean", "std"))
    with torch.no_grad():
        expected = vit.forward_features((pixels - mean) / std)[:, 5:]
    torch.testing.assert_close(frozen(pixels, (2, 2)), expected)
    assert frozen(torch.rand(2, 1, 16, 16), (4, 6)).shape == (2, 24, 48)  # grey, another grid
    swin = timm_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(1, 1, 1, 1)
    )
    convolutional = timm_model("resnet18")
    for model, dim in ((swin, 768), (convolutional, 512)):
        frozen = of_timm(model, data)
        assert frozen.dim == dim and frozen(torch.rand(2, 3, 32, 32), (4, 4)).shape == (2, 16, dim)
        assert not any(p.requires_grad for p in frozen.parameters())


def test_frozen_models_of_hugging_face():
    transformers = need("transformers", "hf", "x")
    small = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 32,
        "patch_size": 8,
    }
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=small, text_config={"num_hidden_layers": 1})
    )
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**small))
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], embedding_size=8)
    )
    preprocessing = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2], "size": 64}
    for model, dim, size in ((clip, 24, 32), (dino, 24, 32), (resnet, 16, 64)):
        frozen = of_hugging_face(model.eval(), preprocessing)
        assert frozen.size == (size, size) and frozen.dim == dim
        assert frozen(torch.rand(1, 3, 16, 16), (4, 4)).shape == (1, 16, dim)
        assert frozen.mean.flatten().tolist() == pytest.approx([0.4] * 3)


@pytest.mark.slow
def test_a_frozen_model_from_a_folder(tmp_path, image_folder):
    """Saved by transformers, named by its folder; trained on, resumed, shown."""
    transformers = need("transformers", "hf", "x")
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        ),
    )
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    run = hpm.pretrain(
        data=str(image_folder),
        out=str(tmp_path / "run"),
        target="frozen",
        target_model=str(tmp_path / "vit"),
        **TINY,
    )
    losses = [
        line["reconstruction_loss"] for line in run.metrics() if "reconstruction_loss" in line
    ]
    assert all(0 < loss < 4 for loss in losses)
    result = hpm.evaluate("hardness", str(run.folder), str(image_folder))
    assert 0 <= result.hardness["ranking_accuracy"] <= 1


def test_a_frozen_model_that_is_nowhere(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: False)
    for name in ("timm/vit_tiny_patch16_224", "hf/nobody/nothing"):
        with pytest.raises(hpm.UserError, match="is not on disk .it was looked for in .*hub.* and"):
            hpm.pretrain(
                data=str(image_folder),
                out=str(tmp_path / "run"),
                target="frozen",
                target_model=name,
                **TINY,
            )
    for name, words in (
        ("timm/vit_tinny_patch16_224", "timm has no such model; did you mean 'vit_tiny"),
        ("nowhere", "no such folder; name a folder, timm/NAME or hf/NAME"),
    ):
        with pytest.raises(hpm.UserError, match=words):
            hpm.pretrain(
                data=str(image_folder),
                out=str(tmp_path / "run"),
                target="frozen",
                target_model=name,
                **TINY,
            )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": "uniform", "mask_ratio": 0.6}, "mask uniform .* mask_ratio is 0.6"),
        ({"mask": "uniform", "image_size": 36}, "mask uniform needs an even grid.*9 x 9"),
        ({"target": "tokens"}, "target tokens needs --codebook"),
        ({"target": "tokens", "codebook": "nowhere"}, "codebook nowhere: no such file"),
        ({"codebook": "x"}, "codebook is x, but target is normalized_pixels"),
        ({"target": "frozen"}, "target frozen needs --target-model"),
        ({"target": "frozen", "target_model": "timm/x", "channels": 4}, "takes grey or RGB"),
        ({"target_model": "x"}, "target_model is x, but target is"),
        ({"target": "teacher", "ema_horizon_end": "1 steps"}, "target teacher needs a teacher"),
        ({"target": "teacher", "ema_horizon_end": "1step"}, "target teacher needs a teacher"),
        ({"target": "teacher", "ema_horizon_end": "0%"}, "ema_horizon_end of 0% makes it the"),
        (
            {"target": "hog", "ranking_signal": "pixels"},
            "ranking_signal is pixels, but target is hog: leave",
        ),
        ({"mask": "hardest", "predictor_loss": "none"}, "mask hardest needs a loss predictor"),
        ({"secondary_mask_ratio": 1.0}, "secondary_mask_ratio is 1;"),
        ({"predictor_dim": 30}, "predictor_dim 30 must be a multiple of 4"),
        ({"predictor_depth": 0}, "predictor_depth is 0"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    config = PretrainConfig("x", "y", **({"image_size": 32, "patch_size": 4} | options))
    with pytest.raises(hpm.UserError, match=words):
        check_pretrain(config)


def test_irrelevant_options_are_no_contradiction():
    """So that a grid of masks can share its other options."""
    config = PretrainConfig("x", "y", image_size=32, patch_size=4, mask="random")
    check_pretrain(dataclasses.replace(config, hard_share_end=0.25, teacher_view="masked"))

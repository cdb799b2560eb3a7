"""Ours against the numbers of the published implementation, for every golden_*.json there is."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published import our_state
from safetensors.torch import load_file

from hpm.mining import draw, losses, masking
from hpm.mining.teacher import Teacher, predicted_losses
from hpm.models.classifier import Classifier
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import gather_patches, sincos_positions
from hpm.models.vit import VisionTransformer
from hpm.targets.pixels import pixel_target
from hpm.training import optim

FOLDER = Path(__file__).parents[1] / ".." / "shared" / "golden"
FILES = sorted(FOLDER.glob("golden_*.json"))
TARGETS = {"raw": "pixels", "norm": "normalized_pixels"}

# The gradients of these are zero but for rounding (see the golden README), which Adam scales up.
NO_GRADIENT = ("predictor.norm.bias", "predictor.head.bias")


@pytest.fixture(scope="module", params=FILES or [None], ids=lambda f: f.stem if f else "missing")
def golden(request):
    if request.param is None:
        pytest.skip("the golden vectors (../shared/golden) are not here")
    return SimpleNamespace(
        numbers=json.loads(request.param.read_text()),
        tensors=load_file(request.param.with_suffix(".safetensors")),
    )


@pytest.fixture
def model(golden):
    return build(golden)


def pair(value):
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def build(golden) -> MaskedImageModel:
    c = golden.numbers["config"]
    encoder = VisionTransformer(
        image_size=pair(c["img_size"]),
        patch_size=pair(c["patch_size"]),
        channels=golden.tensors["images"].shape[1],
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
    )
    model = MaskedImageModel(
        encoder, c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"]
    )
    model.load_state_dict(our_state(golden.tensors, "weights."))
    return model


def ids(mask):
    hidden = mask.bool()
    order = (~hidden).long().argsort(dim=1, stable=True)
    count = int(hidden[0].sum())
    return order[:, count:], order[:, :count]


def close(ours, golden, tolerance=2e-5):
    golden = torch.as_tensor(golden)
    error = (ours.detach() - golden).norm() / golden.norm()
    assert ours.shape == golden.shape
    assert error <= tolerance, f"relative error {error:.2e}"


def reconstruct(model, images, mask, target="pixels"):
    visible_ids, hidden_ids = ids(mask)
    prediction, predicted_loss = model(images, visible_ids, hidden_ids)
    patches = pixel_target(images, model.encoder.patch_size, target)
    return (
        prediction,
        predicted_loss,
        losses.squared_error(prediction, gather_patches(patches, hidden_ids)),
    )


def relative(predicted_loss, patch_loss):
    total, pairs = losses.relative_loss(predicted_loss, patch_loss)
    return total / pairs


def test_positions(golden, model):
    close(
        sincos_positions(model.encoder.grid, model.encoder.embed_dim)[None],
        golden.tensors["weights.pos_embed"],
    )
    close(
        sincos_positions(model.encoder.grid, model.mask_token.shape[-1])[None],
        golden.tensors["weights.decoder_pos_embed"],
    )


def test_number_of_hidden_patches(golden, model):
    ratio = golden.numbers["mask_ratio"]
    assert (
        masking.num_hidden_patches(model.encoder.num_patches, ratio) == golden.numbers["num_hidden"]
    )


def test_forward(golden, model):
    images, mask = golden.tensors["images"], golden.tensors["mask"]
    close(model.encoder(images, ids(mask)[0]), golden.tensors["features"])
    prediction, predicted_loss, _ = reconstruct(model, images, mask)
    close(prediction, golden.tensors["prediction_hidden"])
    close(predicted_loss, golden.tensors["predicted_loss_hidden"])


@pytest.mark.parametrize("target", TARGETS)
def test_losses(golden, model, target):
    images, mask = golden.tensors["images"], golden.tensors["mask"]
    _, predicted_loss, patch_loss = reconstruct(model, images, mask, TARGETS[target])
    close(patch_loss, golden.tensors[f"patch_loss.{target}"])
    close(patch_loss.mean(), golden.numbers[f"loss.{target}"])
    close(relative(predicted_loss, patch_loss), golden.numbers[f"predictor_loss.relative.{target}"])
    close(
        losses.absolute_loss(predicted_loss, patch_loss),
        golden.numbers[f"predictor_loss.absolute.{target}"],
    )


def comparable(name, ours, golden):
    """Leave out what has no gradient: two biases of the predictor, the keys' part of qkv biases."""
    if name.endswith("qkv.bias"):
        third = len(ours) // 3
        keep = torch.cat([torch.arange(third), torch.arange(2 * third, 3 * third)])
        return ours[keep], golden[keep]
    return ours, golden


def test_gradients(golden, model):
    _, predicted_loss, patch_loss = reconstruct(
        model, golden.tensors["images"], golden.tensors["mask"]
    )
    total = patch_loss.mean() + relative(predicted_loss, patch_loss)
    close(total, golden.numbers["total_loss.relative.raw"])
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    expected = our_state(golden.tensors, "grad.")
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        if name in NO_GRADIENT:
            assert gradient.abs().max() < 1e-6
        else:
            close(*comparable(name, gradient, expected[name]), 1e-4)


def test_teacher_on_the_full_image(golden, model):
    features, predicted_loss = predicted_losses(
        Teacher(model).model.predict_loss, golden.tensors["images"]
    )
    close(features, golden.tensors["teacher.features"])
    close(predicted_loss, golden.tensors["teacher.predicted_loss"])


def test_five_optimiser_steps(golden, model):
    train = golden.numbers["train"]
    optimizer = optim.adamw(model, train["lr"], tuple(train["betas"]), train["weight_decay"])
    teacher = Teacher(model)
    for step, (images, mask) in enumerate(
        zip(golden.tensors["train.images"], golden.tensors["train.masks"], strict=True)
    ):
        _, predicted_loss, patch_loss = reconstruct(model, images, mask)
        predictor_loss = relative(predicted_loss, patch_loss)
        optimizer.zero_grad()
        (patch_loss.mean() + predictor_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip_grad_norm"])
        optimizer.step()
        teacher.update(model, train["ema_decay"])
        close(patch_loss.mean(), train["reconstruction_loss"][step])
        close(predictor_loss, train["predictor_loss"][step])
        close(norm, train["grad_norm"][step])
    for prefix, trained in (("train.final.", model), ("train.final_ema.", teacher.model)):
        expected, ours = our_state(golden.tensors, prefix), trained.state_dict()
        assert set(expected) <= set(ours) and expected
        for name in set(expected) - set(NO_GRADIENT):
            close(*comparable(name, ours[name], expected[name]), 1e-4)


def test_feature_target(golden):
    prediction = golden.tensors["feature.prediction_hidden"]
    target = gather_patches(golden.tensors["feature.target"], ids(golden.tensors["mask"])[1])
    patch_loss = losses.normalized_squared_error(prediction, target)
    close(patch_loss, golden.tensors["feature.patch_loss"])
    close(patch_loss.mean(), golden.numbers["feature.loss"])


def test_sampler_frequencies(golden):
    mining = golden.numbers["mining"]
    predicted_loss = golden.tensors["mining.predicted_loss"]
    num_patches = predicted_loss.shape[1]
    draws = 20_000
    for case in mining["cases"]:
        epoch, (num_hidden,) = case["epoch"], case["num_hidden"]
        num_hard = int(num_hidden * masking.hard_share((epoch + 1) / mining["total_epochs"]))
        assert num_hard == case["hard_patches"]
        priority = draw.noise(torch.arange(draws), num_patches, seed=0, epoch=epoch)
        priority = masking.hardest_first(priority, predicted_loss.expand(draws, -1), num_hard)
        _, hidden_ids = masking.hide_top(priority, num_hidden)
        frequency = masking.to_mask(hidden_ids, num_patches).float().mean(0)
        expected = golden.tensors[f"mining.frequency.{epoch}"]
        published_draws = 4000 if epoch in (99, 199) else 1000
        assert torch.equal(frequency == 1, expected == 1)
        # Both are counts of draws: the difference stays within five standard errors.
        share = (num_hidden - num_hard) / (num_patches - num_hard)
        error = (share * (1 - share) * (1 / draws + 1 / published_draws)) ** 0.5
        assert (frequency - expected).abs().max() < 5 * error


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_classifier(golden, model, pool):
    weights = {
        name.removeprefix(f"classifier.{pool}.weights."): tensor
        for name, tensor in golden.tensors.items()
        if name.startswith(f"classifier.{pool}.weights.")
    }
    classifier = Classifier(model.encoder, len(weights["head.bias"]), pool).eval()
    missing = classifier.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith("encoder.") for name in missing)
    close(classifier.pooled(golden.tensors["images"]), golden.tensors[f"classifier.{pool}.pooled"])
    close(classifier(golden.tensors["images"]), golden.tensors[f"classifier.{pool}.logits"])


def test_layer_decay(golden, model):
    expected = golden.numbers["layer_decay"]
    classifier = Classifier(model.encoder, 7, "mean")
    names = {p: name.removeprefix("encoder.") for name, p in classifier.named_parameters()}
    groups = optim.layer_decay_groups(
        classifier, 1e-3, expected["layer_decay"], expected["weight_decay"]
    )
    ours = {
        names[parameter]: {"lr_scale": group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in groups
        for parameter in group["params"]
    }
    # Where the published classifier trains something that ours has not, or the other way round.
    assert set(ours) == set(expected["params"])
    for name, values in expected["params"].items():
        assert ours[name] == pytest.approx(values), name
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in groups)


def test_learning_rate_schedule(golden):
    schedule = golden.numbers["lr_schedule"]
    for epoch, expected in schedule["at_epoch"].items():
        ours = optim.learning_rate(
            float(epoch),
            schedule["epochs"],
            schedule["warmup_epochs"],
            schedule["lr"],
            schedule["min_lr"],
        )
        assert ours == pytest.approx(expected, rel=2e-5, abs=1e-15)

"""Clips: positions and tubes against naive loops, and image weights extended to clips."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.models.architecture import Architecture, resolve_model
from hpm.models.build import build_model
from hpm.models.patches import (
    interpolate_positions,
    patchify,
    resample_projection,
    sincos_1d_positions,
    sincos_positions,
)
from hpm.weights.initialise import resample


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(3, 20).map(lambda pairs: 2 * pairs),
)
def test_positions_as_axis_by_axis(grid, dim):
    """The first axis takes the pairs of channels that cannot be shared equally."""
    found, axes = sincos_positions(tuple(grid), dim), len(grid)
    assert found.shape == (1 + math.prod(grid), dim) and (found[0] == 0).all()
    pairs = dim // 2
    shares = [pairs // axes] * axes
    shares[0] += pairs % axes
    for number, place in enumerate(itertools.product(*map(range, grid))):
        expected = []
        for coordinate, share in reversed(list(zip(place, shares, strict=True))):
            angles = [coordinate / 10000 ** (i / share) for i in range(share)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(found[1 + number], torch.tensor(expected))


def test_positions_by_number_are_videomaes():
    need("transformers", "hf", "the test")
    from transformers.models.videomae import modeling_videomae

    table = modeling_videomae.get_sinusoid_encoding_table(2 * 3 * 4, 14)[0]
    assert torch.equal(sincos_1d_positions((2, 3, 4), 14)[1:], table)


def test_tubes_are_frames_rows_columns_channels():
    clips, size = torch.randn(2, 3, 4, 6, 4), (2, 3, 2)
    patches = patchify(clips, size)
    for number, (t, y, x) in enumerate(itertools.product(range(2), range(2), range(2))):
        cut = clips[:, :, 2 * t : 2 * t + 2, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2]
        assert torch.equal(patches[:, number], cut.permute(0, 2, 3, 4, 1).flatten(1))


def test_a_projection_of_tubes_is_a_convolution():
    model = clip_model()
    clips = torch.randn(2, 3, 4, 16, 16)
    embed = model.encoder.patch_embed
    expected = embed.proj(clips).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(clips, (2, 8, 8))), expected, atol=1e-5, rtol=1e-5)


def clip_model(seed=0, **options):
    options = {"frames": 4, "image_size": 16, "patch_size": 8} | options
    return build_model(resolve_model(PretrainConfig("x", "y", model="vit_nano", **options)), seed)


@pytest.mark.parametrize(
    ("positions", "class_token"), [("sincos", True), ("sincos_1d", False), ("sincos", False)]
)
def test_no_hidden_pixel_reaches_the_encoder(positions, class_token):
    model = clip_model(positions=positions, class_token=class_token).eval()
    clips, visible, hidden = torch.randn(1, 3, 4, 16, 16), [0, 3, 6], [1, 2, 4, 5, 7]
    others = clips.clone()
    for patch in hidden:
        t, y, x = patch // 4, patch // 2 % 2, patch % 2
        others[:, :, 2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = torch.randn(2, 8, 8)
    ids = torch.tensor([visible]), torch.tensor([hidden])
    for one, other in zip(model(clips, *ids), model(others, *ids), strict=True):
        assert torch.equal(one, other)
    assert model.encoder(clips, ids[0]).shape == (1, class_token + 3, 96)
    assert not torch.equal(model.encoder(clips), model.encoder(others))


def test_the_architecture_of_clips_in_files():
    config = PretrainConfig(
        "x",
        "y",
        model="vit_nano",
        frames=4,
        image_size=16,
        patch_size=(4, 8, 8),
        positions="sincos_1d",
        class_token=False,
    )
    architecture = resolve_model(config)
    assert architecture.image_size == (4, 16, 16) and architecture.patch_size == (4, 8, 8)
    assert Architecture.from_json(architecture.to_json()) == architecture
    image = resolve_model(PretrainConfig("x", "y", model="vit_nano"))
    assert not {"positions", "class_token"} & set(image.to_json())  # as older files


def test_patches_of_frames_need_clips():
    with pytest.raises(UserError, match="patch_size 2,8,8 .* frames is 1"):
        resolve_model(PretrainConfig("x", "y", model="vit_nano", patch_size=(2, 8, 8)))
    with pytest.raises(UserError, match="takes images"):
        resolve_model(PretrainConfig("x", "y", model="timm/vit_tiny_patch16_224", frames=4))


def test_an_image_model_sees_a_still_clip_as_its_image():
    """With the projection copied and divided, tokens without positions are equal; the positions
    are the image's on average over time, and differ between times."""
    image = build_model(
        resolve_model(PretrainConfig("x", "y", "vit_nano", image_size=16, patch_size=8)), 1
    )
    model = clip_model()
    state, notes = resample(image.state_dict(), model, (16, 16))
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)  # the decoders' heads, too
    pixels = torch.randn(2, 3, 16, 16)
    clip = pixels[:, :, None].expand(-1, -1, 4, -1, -1)
    tokens = model.encoder.patch_embed(patchify(clip, (2, 8, 8))).unflatten(1, (2, 4))
    expected = image.encoder.patch_embed(patchify(pixels, (8, 8)))
    torch.testing.assert_close(tokens, expected[:, None].expand_as(tokens), atol=1e-5, rtol=1e-5)
    positions = model.encoder.pos_embed[0, 1:].unflatten(0, (2, 4))
    torch.testing.assert_close(positions.mean(0), image.encoder.pos_embed[0, 1:])
    assert (positions[0] - positions[1]).abs().max() > 0.1
    assert any("4 x 4" in note or "2 x 2 to 2 x 2 x 2" in note for note in notes)


def test_clips_of_another_length():
    before, after = clip_model(1), clip_model(frames=8, patch_size=(4, 8, 8))
    state, _ = resample(before.state_dict(), after, (4, 16, 16))
    torch.testing.assert_close(
        state["encoder.pos_embed"], before.encoder.pos_embed
    )  # as many times as before
    still = torch.randn(1, 3, 1, 16, 16)
    weights = state["encoder.patch_embed.proj.weight"]
    embedded = (
        torch.nn.functional.conv3d(
            still.expand(-1, -1, frames, -1, -1), weight, stride=weight.shape[2:]
        )
        for frames, weight in ((2, before.encoder.patch_embed.proj.weight), (4, weights))
    )
    torch.testing.assert_close(*embedded, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="--frames"):
        resample(
            before.state_dict(),
            build_model(resolve_model(PretrainConfig("x", "y", "vit_nano"))),
            None,
        )


def test_positions_over_time_are_interpolated_linearly():
    positions = torch.randn(1, 1 + 2 * 3, 4)
    found = interpolate_positions(positions, (2, 1, 3), (3, 1, 3))[0, 1:].unflatten(0, (3, 3))
    first, last = positions[0, 1:].unflatten(0, (2, 3))
    torch.testing.assert_close(found, torch.stack([first, (first + last) / 2, last]))
    assert torch.equal(interpolate_positions(positions[:, :4], (3, 1), (3, 1)), positions[:, :4])


def test_a_projection_of_another_size_and_more_frames():
    weight = torch.randn(5, 3, 4, 4)
    found = resample_projection(weight, (2, 8, 8))
    torch.testing.assert_close(found.sum(2), resample_projection(weight, (8, 8)))
    assert torch.equal(found[:, :, 0], found[:, :, 1])

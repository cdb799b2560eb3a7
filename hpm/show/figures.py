"""Compute panels of a model's outputs on images.

Panels: image, actual loss, predicted loss, mask, reconstruction, principal components of the
features, attention of the class token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.core.wording import sample_word
from hpm.data.loader import normalize
from hpm.evals.loss_maps import loss_maps
from hpm.mining.draw import Draw
from hpm.mining.masking import to_mask
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import gather_patches, patchify, unpatchify
from hpm.show.options import PANELS, Panel
from hpm.show.page import colours
from hpm.show.scale import Scale, as_losses, scale_of
from hpm.targets.pixels import PixelTarget
from hpm.weights.resolve import Trained

TITLES: dict[Panel, str] = {
    "image": "image",
    "actual": "actual loss",
    "predicted": "predicted loss",
    "mask": "mask",
    "reconstruction": "reconstruction",
    "pca": "features (PCA)",
    "attention": "attention",
}
MASKED: tuple[Panel, ...] = ("actual", "predicted", "mask", "reconstruction")  # need the decoders
TRAINING: tuple[Panel, ...] = ("image", *MASKED)  # drawn during training
BATCH_SIZE = 16
GREY = 128
ROWS = 1 << 14  # patches whose features are in float64 at a time

Map = Float[Tensor, "batch patches"]
Pixels = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class MaskSettings:
    """How the masks of a picture are drawn; see `picture`."""

    hard_share: float
    num_masks: int
    seed: int
    mask_ratio: float | None


@dataclass
class Picture:
    """The panels of a batch of images or clips; None for those that are unavailable or not
    requested."""

    images: Tensor  # [B C H W] or [B C T H W], as in a batch
    grid: tuple[int, ...]
    actual: Map | None = None  # NaN for patches that no mask hid
    predicted: Map | None = None
    mask: Bool[Tensor, "batch patches"] | None = None  # True where hidden
    reconstruction: Tensor | None = None  # shaped like images; hidden patches are predicted
    pca: Float[Tensor, "batch patches 3"] | None = None  # 0 to 1
    attention: Float[Tensor, "batch heads patches"] | None = None
    laid: bool = field(default=False, init=False)  # of clips, frames side by side (see `strips`)

    @property
    def of_clips(self) -> bool:
        return self.laid or self.images.ndim == 5

    @cached_property
    def scale(self) -> Scale | None:
        """The scale of the actual and predicted losses of all images."""
        return None if self.actual is None else scale_of(self.actual.numpy())

    def losses(self, row: int) -> dict[Panel, np.ndarray]:
        """The maps of actual and predicted losses of an image [rows columns], on one scale where
        the actual one is there."""
        found: dict[Panel, np.ndarray] = {}
        if self.actual is not None:
            found["actual"] = self.actual[row].numpy()
        if self.predicted is not None:
            predicted = self.predicted[row].numpy()
            known = found.get("actual")
            found["predicted"] = predicted if known is None else as_losses(predicted, known)
        return {name: values.reshape(self.grid) for name, values in found.items()}

    @property
    def panels(self) -> list[Panel]:
        """The available panels, in the order of PANELS."""
        return [name for name in PANELS if name == "image" or getattr(self, name) is not None]


def panel_title(panel: Panel, clips: bool) -> str:
    """The caption of a panel of an image or a clip."""
    return sample_word(clips) if panel == "image" else TITLES[panel]


def unavailable_panels(trained: Trained) -> dict[Panel, str]:
    """The panels that are unavailable for these weights, and why."""
    reasons: dict[Panel, str] = {}
    if trained.model is None or trained.teacher is None or trained.config is None:
        reasons |= dict.fromkeys(MASKED, "it has a backbone only, no decoders")
    else:
        if trained.teacher.predictor is None:
            reasons["predicted"] = "it has no loss predictor"
        try:
            target = trained.find_target(_device(trained.encoder))
            if not isinstance(target, PixelTarget):
                reasons["reconstruction"] = f"its target is {trained.config.target}, not pixels"
        except UserError as error:  # the frozen model or codebook of its target is missing
            reasons["actual"] = reasons["reconstruction"] = str(error)
    if not trained.encoder.has_class_token:
        reasons["attention"] = "its encoder has no class token"
    elif type(trained.encoder).with_attention is Encoder.with_attention:
        reasons["attention"] = "attention of timm encoders is not available"
    return reasons


def picture(
    trained: Trained,
    images: Tensor,
    sample_ids: Int[Tensor, " batch"],
    hard_share: float,
    num_masks: int = 10,
    seed: int = 0,
    mask_ratio: float | None = None,
    panels: Collection[Panel] = TRAINING,
    progress: bool = False,
) -> Picture:
    """Compute the requested panels that are available, for images [B C H W] or clips [B C T H W].

    The mask is drawn as in training at this hard share. The actual loss is the mean over
    `num_masks` random masks. mask_ratio defaults to that of training.
    """
    wanted = set(panels) - set(unavailable_panels(trained))
    masks = MaskSettings(hard_share, num_masks, seed, mask_ratio)
    split = zip(images.split(BATCH_SIZE), sample_ids.split(BATCH_SIZE), strict=True)
    steps = track(split, "computing", -(-len(images) // BATCH_SIZE)) if progress else split
    parts = [_show(trained, part, ids, wanted, masks) for part, ids in steps]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    features = found.pop("features", None)
    pca = None if features is None else principal_colours(features)
    return Picture(images, trained.encoder.grid, pca=pca, **found)


@torch.no_grad()
def _show(
    trained: Trained,
    images: Tensor,
    sample_ids: Tensor,
    wanted: set[Panel],
    masks: MaskSettings,
) -> dict[str, Tensor]:
    """The panels of one batch by name, on the CPU. For `pca`, the features."""
    device = _device(trained.encoder)
    normalized = normalize(images, torch.tensor(trained.mean), torch.tensor(trained.std))
    normalized, sample_ids = normalized.to(device), sample_ids.to(device)
    found: dict[str, Tensor] = {}
    if wanted & set(MASKED):
        found |= _masked(trained, normalized, sample_ids, wanted, masks)
    if "reconstruction" in found:
        found["reconstruction"] = _as_loaded(found["reconstruction"].cpu(), trained, images)
    if "attention" in wanted:
        features, found["attention"] = trained.encoder.with_attention(normalized)
    elif "pca" in wanted:
        features = trained.encoder(normalized)
    if "pca" in wanted:
        found["features"] = features[:, trained.encoder.num_prefix_tokens :].float()
    return {name: values.cpu() for name, values in found.items()}


def _masked(
    trained: Trained,
    images: Tensor,
    sample_ids: Tensor,
    wanted: set[Panel],
    masks: MaskSettings,
) -> dict[str, Tensor]:
    """The panels that involve hidden patches."""
    model, teacher, config = trained.model, trained.teacher, trained.config
    assert model is not None and teacher is not None and config is not None
    ratio = config.mask_ratio if masks.mask_ratio is None else masks.mask_ratio
    found: dict[str, Tensor] = {}
    predicted = None
    miner, draw = trained.find_miner(), Draw(masks.seed, 1, sample_ids)
    # The memory covers training images only; use losses measured now instead.
    by_losses = config.mines_by_memory and bool(wanted & {"mask", "reconstruction"})
    if "actual" in wanted or by_losses:
        target = trained.find_target(images.device)
        maps = loss_maps(model, miner, images, draw, target, ratio, masks.num_masks)
        found["actual"], predicted = maps.actual, maps.predicted
    elif teacher.predictor is not None:
        predicted = miner.predicted_loss(images, draw)[1]
    if predicted is not None and "predicted" in wanted:
        found["predicted"] = predicted
    if wanted & {"mask", "reconstruction"}:
        signal = found["actual"].nan_to_num(nan=-torch.inf) if by_losses else predicted
        if config.mask == "attention":
            signal = miner.signal(images, draw)[1]
        num_patches = model.encoder.num_patches
        num_hidden = miner.count_hidden(ratio)
        visible_ids, hidden_ids = miner.hide(
            draw, signal, int(num_hidden * masks.hard_share), num_hidden
        )
        found["mask"] = to_mask(hidden_ids, num_patches)
        if "reconstruction" in wanted:
            target = trained.find_target(images.device)
            assert isinstance(target, PixelTarget)
            found["reconstruction"] = reconstruct(model, images, visible_ids, hidden_ids, target)
    return {name: values for name, values in found.items() if name in wanted}


def reconstruct(
    model: MaskedImageModel,
    images: Float[Tensor, "batch channels *size"],
    visible_ids: Int[Tensor, "batch visible"],
    hidden_ids: Int[Tensor, "batch hidden"],
    target: PixelTarget,
) -> Float[Tensor, "batch channels *size"]:
    """Replace the hidden patches of images by their predictions.

    Predictions of normalised patches are given the mean and standard deviation of the true patch:
    the picture shows the predicted structure, with the true brightness and contrast.
    """
    prediction = model(images, visible_ids, hidden_ids)[0].float()
    patches = patchify(images, model.encoder.patch_size)
    prediction = target.to_pixels(prediction, gather_patches(patches, hidden_ids))
    index = hidden_ids[..., None].expand_as(prediction)
    patches = patches.scatter(1, index, prediction)
    return unpatchify(patches, model.encoder.grid, model.encoder.patch_size)


def _as_loaded(normalized: Tensor, trained: Trained, like: Tensor) -> Tensor:
    """Undo the normalisation, to the units and dtype of `like`."""
    mean, std = torch.tensor(trained.mean), torch.tensor(trained.std)
    by_channel = (-1,) + (1,) * (normalized.ndim - 2)
    pixels = (normalized * std.view(by_channel) + mean.view(by_channel)) * 255
    if like.dtype == torch.uint8:
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return pixels


def principal_colours(
    features: Float[Tensor, "batch patches dim"],
) -> Float[Tensor, "batch patches 3"]:
    """The first three principal components of all patches as red, green and blue in [0, 1].

    Each is stretched from its 1st to its 99th percentile. The sign of a component is chosen such
    that its largest loading is positive, so that the colours are reproducible. A constant component
    becomes 0.5.
    """
    rows = features.flatten(0, 1)
    # In float64, of a part at a time: all features at once would take gigabytes.
    parts = rows.split(ROWS)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(rows)
    scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in parts:
        centred = part.double() - mean
        scatter += centred.T @ centred
    variances, vectors = torch.linalg.eigh(scatter)
    directions = vectors[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    values = torch.cat([(part.double() - mean) @ directions for part in parts])
    low, high = torch.from_numpy(np.quantile(values.numpy(), (0.01, 0.99), axis=0))
    varies = variances[-3:].flip(0) > 1e-10 * variances[-1].clamp(min=1e-30)
    stretched = (values - low) / (high - low).clamp(min=1e-30)
    components = torch.where(varies, stretched.clamp(0, 1), 0.5)
    return components.view(*features.shape[:2], 3).float()


def pixels(shown: Picture, row: int) -> dict[Panel, Pixels]:
    """The panels of one image as RGB: images at full size, maps with one pixel per patch."""
    image = as_rgb(shown.images[row], shown.images[row])
    found: dict[Panel, Pixels] = {"image": image}
    for name, values in shown.losses(row).items():
        found[name] = colours(values, *(shown.scale or ()))
    if shown.mask is not None:
        found["mask"] = _grey_out(image, shown.mask[row].view(shown.grid).numpy())
    if shown.reconstruction is not None:
        found["reconstruction"] = as_rgb(shown.reconstruction[row], shown.images[row])
    if shown.pca is not None:
        components = shown.pca[row].view(*shown.grid, 3)
        found["pca"] = (components * 255).round().to(torch.uint8).numpy()
    if shown.attention is not None:
        found["attention"] = colours(shown.attention[row].mean(0).view(shown.grid).numpy())
    return found


def head_pixels(shown: Picture, row: int) -> list[Pixels]:
    """The attention of each head, one pixel per patch; empty without attention."""
    if shown.attention is None:
        return []
    return [colours(head.view(shown.grid).numpy()) for head in shown.attention[row]]


def as_rgb(image: Tensor, like: Tensor) -> Pixels:
    """Convert [C H W] to uint8 [H W 3] for display.

    Repeats grey and drops alpha. Shows the first three of many channels, and the mean of two.
    Channels other than 8-bit grey and RGB are stretched from the 1st to the 99th percentile of
    `like`.
    """
    if image.dtype != torch.uint8 or len(image) not in (1, 3, 4):
        values, like = image[:3].float(), like[:3].float()
        low, high = np.quantile(like.flatten(1).numpy(), (0.01, 0.99), axis=1)
        low, high = (torch.from_numpy(side).float().view(-1, 1, 1) for side in (low, high))
        image = ((values - low) / (high - low).clamp(min=1e-30) * 255).round().clamp(0, 255)
        image = (image.mean(0, keepdim=True) if len(image) == 2 else image).to(torch.uint8)
    rgb = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return np.ascontiguousarray(rgb.permute(1, 2, 0).numpy())


def _grey_out(image: Pixels, hidden: Bool[np.ndarray, "rows columns"]) -> Pixels:
    """Paint the hidden patches grey."""
    patch = np.ones((image.shape[0] // hidden.shape[0], image.shape[1] // hidden.shape[1]))
    covered = np.kron(hidden, patch)[..., None].astype(bool)
    return np.where(covered, np.uint8(GREY), image)


def _device(encoder: Encoder) -> torch.device:
    return next(encoder.parameters()).device

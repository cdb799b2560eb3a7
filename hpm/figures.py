"""The figure of hard patches: image, actual loss, predicted loss, mask, reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpm.checkpoint import write_atomically
from hpm.data.loader import normalize
from hpm.evals.hardness import LossMaps, loss_maps
from hpm.masking import make_mask, num_hidden_patches, to_mask
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import gather_patches, patchify, unpatchify
from hpm.run import Trained
from hpm.targets import PixelTarget, patch_statistics
from hpm.teacher import attention


@dataclass
class Picture:
    """What the figure shows of a batch of images."""

    images: Tensor  # [B C H W], as in a batch
    maps: LossMaps  # [B N] each
    mask: Bool[Tensor, "batch patches"]  # True where hidden
    # As the images, hidden patches predicted, visible ones as they are; None where the target is
    # nothing that can be shown.
    reconstruction: Tensor | None
    grid: tuple[int, ...]


@torch.no_grad()
def picture(
    trained: Trained, images: Tensor, sample_ids: Int[Tensor, " batch"], hard_share: float,
    num_masks: int = 10, seed: int = 0,
) -> Picture:  # fmt: skip
    """Run a model and its teacher on a batch's images [B C H W] for the figure.

    The mask is one that training would draw at this hard share.
    """
    model, teacher, config = trained.model, trained.teacher, trained.config
    assert model is not None and teacher is not None and config is not None
    device = next(model.parameters()).device
    mean, std = torch.tensor(trained.mean), torch.tensor(trained.std)
    normalized = normalize(images, mean, std).to(device)
    sample_ids = sample_ids.to(device)
    target = trained.find_target(device)
    maps = loss_maps(
        model, teacher, normalized, sample_ids, target, config.mask_ratio, num_masks, seed
    )
    num_patches = model.encoder.num_patches
    num_hidden = num_hidden_patches(num_patches, config.mask_ratio)
    signal = maps.predicted
    if config.mask == "attention":
        signal = attention(teacher, normalized)[1]
    visible_ids, hidden_ids = make_mask(
        config.mask, sample_ids, model.encoder.grid, num_hidden, seed, 1, signal,
        int(num_hidden * hard_share),
    )  # fmt: skip
    pixels = None
    if isinstance(target, PixelTarget):
        filled = reconstruct(model, normalized, visible_ids, hidden_ids, target).cpu()
        pixels = (filled * std.view(-1, 1, 1) + mean.view(-1, 1, 1)) * 255
        if images.dtype == torch.uint8:
            pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    mask = to_mask(hidden_ids, num_patches).cpu()
    return Picture(images, maps, mask, pixels, model.encoder.grid)


def reconstruct(
    model: MaskedImageModel,
    images: Float[Tensor, "batch channels height width"],
    visible_ids: Int[Tensor, "batch visible"],
    hidden_ids: Int[Tensor, "batch hidden"],
    target: PixelTarget,
) -> Float[Tensor, "batch channels height width"]:
    """The images with their hidden patches predicted.

    A normalised patch does not tell its own mean and deviation, so those of the true patch are
    put back: the picture then shows the structure that was predicted, not its brightness.
    """
    prediction = model(images, visible_ids, hidden_ids)[0].float()
    patches = patchify(images, model.encoder.patch_size)
    if target.normalized:
        mean, std = patch_statistics(gather_patches(patches, hidden_ids))
        prediction = prediction * std + mean
    index = hidden_ids[..., None].expand_as(prediction)
    patches = patches.scatter(1, index, prediction)
    return unpatchify(patches, model.encoder.grid, model.encoder.patch_size)


def draw(shown: Picture, path: Path, title: str) -> None:
    """Write the figure, a row per image, as PNG (or what the suffix says)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ["image", "actual loss"]
    columns += ["predicted loss"] if shown.maps.predicted is not None else []
    columns += ["mask"] + (["reconstruction"] if shown.reconstruction is not None else [])
    rows = len(shown.images)
    figure = Figure(figsize=(1.7 * len(columns), 1.7 * rows + 0.7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row in range(rows):
        image = _displayable(shown.images[row], shown.images[row])
        hidden = shown.mask[row].reshape(shown.grid)
        panels: dict[str, np.ndarray] = {
            "image": image,
            "actual loss": shown.maps.actual[row].reshape(shown.grid).float().cpu().numpy(),
            "mask": _grey_out(image, hidden.numpy()),
        }
        if shown.reconstruction is not None:
            panels["reconstruction"] = _displayable(shown.reconstruction[row], shown.images[row])
        if shown.maps.predicted is not None:
            predicted = shown.maps.predicted[row].reshape(shown.grid)
            panels["predicted loss"] = predicted.float().cpu().numpy()
        for axis, name in zip(axes[row], columns, strict=True):
            extent = (0, image.shape[1], image.shape[0], 0)
            axis.imshow(panels[name], cmap="magma", extent=extent, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=10)
    kind = path.suffix.lstrip(".") or "png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))


def _displayable(image: Tensor, like: Tensor) -> np.ndarray:
    """[C H W] -> uint8 [H W 3]: grey is repeated, alpha left out; of many channels the first three
    are shown, of two their mean.

    But for pictures in 8 bits each channel is stretched to what `like` has of it, less the extreme
    hundredths: other values have no brightness of their own.
    """
    if image.dtype != torch.uint8 or len(image) not in (1, 3, 4):
        values, like = image[:3].float(), like[:3].float()
        low, high = np.quantile(like.flatten(1).numpy(), (0.01, 0.99), axis=1)
        low, high = (torch.from_numpy(side).float().view(-1, 1, 1) for side in (low, high))
        image = ((values - low) / (high - low).clamp(min=1e-30) * 255).round().clamp(0, 255)
        image = (image.mean(0, keepdim=True) if len(image) == 2 else image).to(torch.uint8)
    rgb = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return rgb.permute(1, 2, 0).numpy()


def _grey_out(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The image with hidden patches [rows columns] in grey."""
    patch = np.ones((image.shape[0] // hidden.shape[0], image.shape[1] // hidden.shape[1]))
    covered = np.kron(hidden, patch)[..., None].astype(bool)
    return np.where(covered, np.uint8(128), image)

"""Compare predicted and actual losses of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hpm.data.loader import evaluation_batches, normalize
from hpm.data.sources import Source, clip_mask, object_mask
from hpm.data.transforms import evaluation_view
from hpm.data.video.sampling import ClipSampling
from hpm.mining.draw import Draw
from hpm.mining.losses import ranking_accuracy
from hpm.mining.masking import random_mask
from hpm.mining.miner import Miner
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import gather_patches, patchify
from hpm.targets.base import Target
from hpm.weights.resolve import Trained

Coverage = Float[Tensor, "batch *size"]
CLIPS_AT_ONCE = 8  # in evaluation: each has as many patches as several images

Map = Float[Tensor, "batch patches"]


@dataclass
class LossMaps:
    """Losses of each patch.

    actual: the student's loss when the patch is hidden (NaN if no mask hid it). predicted_hidden:
    the loss that the student predicts for it then. predicted: the loss that the teacher predicts
    from the full image.
    """

    actual: Map
    predicted_hidden: Map | None
    predicted: Map | None


@torch.no_grad()
def loss_maps(
    model: MaskedImageModel,
    miner: Miner,
    images: Float[Tensor, "batch channels *size"],
    draw: Draw,
    target: Target,
    mask_ratio: float,
    num_masks: int = 10,
) -> LossMaps:
    """Compute loss maps. The student's losses are means over random masks, of tubes if the miner
    hides tubes; the teacher's are those that mining uses."""
    teacher, num_patches = miner.teacher, model.encoder.num_patches
    features = teacher.encoder(images) if target.needs_teacher else None
    targets = target(images, features)
    total = torch.zeros(len(images), num_patches, device=images.device)
    predicted_total, count = torch.zeros_like(total), torch.zeros_like(total)
    for number in range(num_masks):
        visible_ids, hidden_ids = random_mask(
            replace(draw, epoch=0), model.encoder.grid, mask_ratio, miner.tubes, number
        )
        hidden_ids = miner.decode(replace(draw, epoch=number), hidden_ids)
        prediction, predicted_loss = model(images, visible_ids, hidden_ids)
        patch_loss = target.patch_loss(prediction, gather_patches(targets, hidden_ids))
        patch_loss = target.ranked_by(patch_loss, images, hidden_ids)
        total.scatter_add_(1, hidden_ids, patch_loss)
        count.scatter_add_(1, hidden_ids, torch.ones_like(patch_loss))
        if predicted_loss is not None:
            predicted_total.scatter_add_(1, hidden_ids, predicted_loss.float())
    if teacher.predictor is None:
        return LossMaps(total / count, None, None)
    predicted = miner.predicted_loss(images, draw)[1]
    return LossMaps(total / count, predicted_total / count, predicted)


def evaluate_losses(
    trained: Trained,
    source: Source,
    device: torch.device,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    crop_share: float = 1.0,
    frame_stride: int | None = None,
) -> dict[str, float]:
    """Means over all readable images of a source: reconstruction_loss (the student's, with random
    masks, and thus independent of mining) and the measures of `hardness`.

    report: called with a line for each unreadable image. frame_stride: of clips; default: as
    trained.
    """
    model, config = trained.model, trained.config
    assert model is not None and config is not None
    height, width = model.encoder.image_size[-2:]
    sampling = trained.sampling(frame_stride=frame_stride)
    mean, std = torch.tensor(trained.mean), torch.tensor(trained.std)
    totals: dict[str, float] = {}
    count = 0
    for batch in evaluation_batches(
        source,
        (height, width),
        config.channels,
        batch_size=64 if sampling is None else CLIPS_AT_ONCE,
        crop_share=crop_share,
        sampling=sampling,
    ):
        if report:
            for index, problem in batch.unreadable:
                report(f"cannot read {source.path(index)} ({problem}), passed over")
        if not len(batch.images):
            continue
        images = normalize(batch.images, mean, std).to(device)
        maps = loss_maps(
            model,
            trained.find_miner(),
            images,
            Draw(seed, 0, batch.indices.to(device)),
            trained.find_target(device),
            config.mask_ratio,
        )
        objects = object_views(source, batch.indices, (height, width), crop_share, sampling)
        values = {"reconstruction_loss": maps.actual.nanmean().item()}
        values |= hardness(maps, objects, model.encoder.patch_size)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value * len(images)
        count += len(images)
    return {name: total / count for name, total in totals.items()}


def object_views(
    source: Source,
    indices: Int[Tensor, " batch"],
    size: tuple[int, int],
    crop_share: float = 1.0,
    sampling: ClipSampling | None = None,
) -> Coverage | None:
    """Coverage of each pixel by objects, 0 to 1, in evaluation views; None without masks."""

    def view(mask: np.ndarray) -> np.ndarray:
        return evaluation_view(Image.fromarray(mask), size, 1, crop_share=crop_share)[0]

    views = []
    for index in indices:
        if sampling is None:
            mask = object_mask(source, int(index))
            found = None if mask is None else view(mask)
        else:
            masks = clip_mask(source, int(index), sampling)
            found = (
                None if masks is None else np.stack([view(255 * m.astype(np.uint8)) for m in masks])
            )
        if found is None:
            return None
        views.append(found)
    return torch.from_numpy(np.stack(views)) / 255


def hardness(
    maps: LossMaps, objects: Coverage | None, patch_size: tuple[int, ...]
) -> Iterator[tuple[str, float]]:
    """Yield the measures of a predictor; nothing without a predictor.

    ranking_accuracy: share of pairs of hidden patches that the student's predictor puts in the
    right order; 0.5 is chance.
    rank_correlation: Spearman's correlation of the same two maps, mean over the images.
    mining_accuracy, mining_correlation: the same for the teacher's prediction from the full image,
    which mining uses.
    hard_on_objects, chance_on_objects: share of patches on objects (covered by at least half),
    among the quarter that the teacher predicts to be hardest, and among all patches. Only with
    `objects`.
    """
    if maps.predicted is None or maps.predicted_hidden is None:
        return
    for name, predicted in (("rank", maps.predicted_hidden), ("mining", maps.predicted)):
        accuracies, correlations = [], []
        for p, actual in zip(predicted, maps.actual, strict=True):
            known = ~actual.isnan()
            accuracies.append(ranking_accuracy(p[known][None], actual[known][None]))
            correlations.append(spearman(p[known], actual[known]))
        accuracy_name = "ranking_accuracy" if name == "rank" else "mining_accuracy"
        yield accuracy_name, torch.stack(accuracies).nanmean().item()
        yield f"{name}_correlation", torch.stack(correlations).nanmean().item()
    if objects is not None:
        on_object = patchify(objects[:, None], patch_size).mean(-1) >= 0.5
        on_object = on_object.to(maps.predicted.device)
        quarter = max(1, maps.predicted.shape[1] // 4)
        hardest = maps.predicted.topk(quarter, dim=1).indices
        yield "hard_on_objects", on_object.gather(1, hardest).float().mean().item()
        yield "chance_on_objects", on_object.float().mean().item()


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Spearman's rank correlation; ties get their mean rank. NaN if x or y is constant."""
    if x.device.type == "mps":  # has no float64
        return spearman(x.cpu(), y.cpu()).to(x.device)
    ranks = torch.stack([mean_ranks(x), mean_ranks(y)])
    return torch.corrcoef(ranks)[0, 1].float()


def mean_ranks(x: Float[Tensor, " n"]) -> Tensor:
    """0-based ranks in float64; ties get their mean rank."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[inverse]

"""A memory of the hardness of each region of each training image: mining without a teacher pass."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.core import distributed

Crops = Float[Tensor, "batch 4"]  # see data.transforms.Crop
Times = Float[Tensor, "batch 2"]  # start and end of each clip, as fractions of its video
Averages = Float[Tensor, "batch 2 *grid"]  # sum of weight * value, sum of weights

# Decay of earlier visits whenever an image is seen again: horizons of 5 and 20 visits.
DECAY, SLOW_DECAY = 0.8, 0.95
PRIOR_WEIGHT = 0.25  # weight of the prior that a region is neither hard nor easy
LARGEST_LOSS = 1000.0  # so that a weighted sum of 20 fits into half precision


class HardnessMemory(nn.Module):
    """A map of hardness in image coordinates for each training image, averaged over its visits.

    The map of a video has a third axis, its time from beginning to end. Reading and writing then
    take the times of each clip.

    Each cell of `grid` holds a weighted sum of values and the sum of the weights in half precision:
    4 bytes per cell, or 1 GB for 1.28 million images of 14 x 14 cells, and 1.5 GB for 240,000
    videos of 8 x 14 x 14. A patch of a view overlaps
    several cells: its value is written and read in proportion to the overlap. Earlier visits decay
    exponentially; a region that has not been seen for long becomes neutral again. Each process
    holds a copy of the whole memory.

    With `progress`, each cell holds a fast and a slow average of the loss (8 bytes per cell), and
    reading returns how far the fast one is below the slow one; see `loss_progress`.

    Args:
        num_images: number of training images.
        grid: number of cells along each axis, equal to the patches of a view.
        progress: store averages for the progress of the loss instead of the loss.
    """

    found: Tensor  # [images 2 *grid], see `Averages`
    slow: Tensor | None  # the same with a longer horizon

    def __init__(
        self,
        num_images: int,
        grid: tuple[int, ...],
        device: torch.device | None = None,
        progress: bool = False,
    ):
        super().__init__()
        self.grid = grid
        found = torch.zeros(num_images, 2, *grid, dtype=torch.float16, device=device)
        self.register_buffer("found", found)
        self.register_buffer("slow", torch.zeros_like(found) if progress else None)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def read(
        self, sample_ids: Int[Tensor, " batch"], crops: Crops, times: Times | None = None
    ) -> Float[Tensor, "batch patches"]:
        """Hardness of each patch of these views, in standard deviations from the mean; with
        `progress`, the decrease of its loss, in units of the loss. 0 if nothing is known."""
        shares = [w / w.sum(2, keepdim=True).clamp(min=1e-12) for w in self._overlaps(crops, times)]
        found = self.found[sample_ids].float()
        if self.slow is not None:
            found = loss_progress(found, self.slow[sample_ids].float())
        total, weight = along_axes(found, shares).unbind(1)
        return (total / (weight + PRIOR_WEIGHT)).flatten(1)

    @torch.no_grad()
    def write(
        self,
        sample_ids: Int[Tensor, " batch"],
        crops: Crops,
        patch_ids: Int[Tensor, "batch known"],
        hardness: Float[Tensor, "batch known"],
        times: Times | None = None,
        per_image: bool = False,
    ) -> None:
        """Write the hardness of some patches of each view.

        Values are standardised over the batch, because losses fall during training, or within each
        image (`per_image`), for predictions that are comparable only within an image. With
        `progress`, losses are stored without standardisation.
        """
        sample_ids, crops, patch_ids, hardness = (
            distributed.concatenate(t) for t in (sample_ids, crops, patch_ids, hardness.float())
        )
        times = None if times is None else distributed.concatenate(times)
        if self.slow is None:
            std, mean = torch.std_mean(
                hardness, dim=1 if per_image else None, correction=0, keepdim=True
            )
            hardness = (hardness - mean) / (std + 1e-6)
        else:
            hardness = hardness.clamp(max=LARGEST_LOSS)
        cells = math.prod(self.grid)
        maps = hardness.new_zeros(len(crops), 2, cells)
        maps[:, 0].scatter_(1, patch_ids, hardness)
        maps[:, 1].scatter_(1, patch_ids, 1.0)
        shares = [w.mT for w in self._overlaps(crops, times)]
        added = along_axes(maps.view(-1, 2, *self.grid), shares)
        added *= cells  # from image areas to fractions of a cell
        _update(self.found, sample_ids, added, DECAY)
        if self.slow is not None:
            _update(self.slow, sample_ids, added, SLOW_DECAY)

    def _overlaps(self, crops: Crops, times: Times | None) -> list[Float[Tensor, "batch _ _"]]:
        """Overlaps of patches with cells along each axis."""
        edges = crops if times is None else torch.cat([times, crops], dim=1)
        pairs = edges.unflatten(1, (-1, 2)).unbind(1)
        return [
            overlaps((pair[:, 0], pair[:, 1]), count)
            for pair, count in zip(pairs, self.grid, strict=True)
        ]


def along_axes(
    maps: Float[Tensor, "batch 2 *grid"], matrices: list[Float[Tensor, "batch _ _"]]
) -> Float[Tensor, "batch 2 *new_grid"]:
    """Multiply each map by one matrix along each axis; the first axes are optional."""
    *before, rows, columns = matrices
    for time in before:
        maps = (time[:, None] @ maps.flatten(3)).unflatten(3, maps.shape[3:])
    ones = (1,) * (maps.ndim - 3)
    rows, columns = (m.unflatten(0, (-1, *ones)) for m in (rows, columns))
    return rows @ maps @ columns.mT


def _update(
    averages: Tensor, sample_ids: Int[Tensor, " batch"], added: Averages, decay: float
) -> None:
    """Decay the images that were seen, and add the new values. An image that occurs twice in the
    batch decays once and receives both."""
    averages[sample_ids] = decay * averages[sample_ids]
    averages.index_add_(0, sample_ids, added.to(averages.dtype))


def loss_progress(fast: Averages, slow: Averages) -> Averages:
    """The decrease of each cell's loss: slow average minus fast average, with the weights of the
    fast one.

        progress = sum(0.95^age w L) / sum(0.95^age w) - sum(0.8^age w L) / sum(0.8^age w)

    summed over the visits of the image, where age is the number of later visits, L the loss of the
    cell, and w the share of the cell that was seen. Progress is 0 for a constant loss, high (noise)
    or low (learned), positive for a falling one, and negative for a rising one.

    Losses are not standardised over the batch, unlike in mining by loss: as the mean of the batch
    falls, the standardised loss of a region that stays hard rises, and would count as negative
    progress. The difference is taken per cell, before averaging cells to patches: the two averages
    weight a region that was not seen for long differently, so that a hard cell beside an easy one
    would look like progress. After one visit both averages are equal, so that new images are mined
    at random. The loss of a patch also depends on which other patches are hidden, so the difference
    is noisy after few visits.
    """
    (fast_total, weight), (slow_total, slow_weight) = fast.unbind(1), slow.unbind(1)
    slow_mean = slow_total / slow_weight.clamp(min=1e-8)
    return torch.stack([weight * slow_mean - fast_total, weight], dim=1)


def overlaps(
    edges: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]], count: int
) -> Float[Tensor, "batch patches cells"]:
    """Overlap of each of `count` patches of a view, between two edges, with each of `count` cells
    of the image, along an axis of length 1. For a flipped view the first edge is the larger."""
    start, end = (edge[:, None] for edge in edges)
    steps = torch.linspace(0, 1, count + 1, device=start.device)
    bounds = start + (end - start) * steps
    low = torch.minimum(bounds[:, :-1], bounds[:, 1:])[..., None]
    high = torch.maximum(bounds[:, :-1], bounds[:, 1:])[..., None]
    return (torch.minimum(high, steps[1:]) - torch.maximum(low, steps[:-1])).clamp(min=0)

"""A memory of how hard each place of each image has been: mining without a teacher pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.core import distributed

Crops = Float[Tensor, "batch 4"]  # see data.transforms.Crop
Averages = Float[Tensor, "batch 2 rows columns"]  # sum of weight * value, sum of weights

# What is left of earlier visits each time that an image is seen again: horizons of 5 and 20 visits.
DECAY, SLOW_DECAY = 0.8, 0.95
PRIOR_WEIGHT = 0.25  # weight of the assumption that a place is neither hard nor easy
LARGEST_LOSS = 1000.0  # so that half precision holds a sum of 20


class HardnessMemory(nn.Module):
    """Per training image a map in image coordinates, averaged over the visits of that image.

    Each of `grid` cells holds a weighted sum of what was found there, and the sum of the weights,
    in half precision: 4 bytes a cell, so that 1.28 million images of 14 x 14 take 1 GB. A view's
    patches lie somewhere among the cells: what is found of a patch is shared out by area, and read
    back by area. Earlier visits count ever less, and a place that nobody has looked at for long
    becomes neutral again. Of several processes each holds the same.

    With `progress`, each cell holds two averages of the loss itself, a fast one and a slow one (8
    bytes a cell), and what is read is how far the fast one has fallen below the slow one; see
    `loss_progress`.

    Args:
        num_images: of the training set.
        grid: cells, as many as a view has patches.
        progress: remember for the progress of the loss instead of for the loss.
    """

    found: Tensor  # [images 2 rows columns], see `Averages`
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
        """Size of the memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def read(
        self, sample_ids: Int[Tensor, " batch"], crops: Crops
    ) -> Float[Tensor, "batch patches"]:
        """How hard each patch of these views was found, in standard deviations from the mean; with
        `progress`, how far its loss has fallen, in units of the loss. 0 where nothing is known."""
        rows, columns = self._overlaps(crops)
        rows, columns = (w / w.sum(2, keepdim=True).clamp(min=1e-12) for w in (rows, columns))
        found = self.found[sample_ids].float()
        if self.slow is not None:
            found = loss_progress(found, self.slow[sample_ids].float())
        total, weight = (rows[:, None] @ found @ columns[:, None].mT).unbind(1)
        return (total / (weight + PRIOR_WEIGHT)).flatten(1)

    @torch.no_grad()
    def write(
        self,
        sample_ids: Int[Tensor, " batch"],
        crops: Crops,
        patch_ids: Int[Tensor, "batch known"],
        hardness: Float[Tensor, "batch known"],
        per_image: bool = False,
    ) -> None:
        """Remember what was found of some patches of each view.

        It is standardised over the batch, since losses fall as training goes on; or within each
        image, where only the order within an image means anything (`per_image`). With `progress`,
        losses are remembered as they are: what falls, and how far, is what is asked.
        """
        sample_ids, crops, patch_ids, hardness = (
            distributed.concatenate(t) for t in (sample_ids, crops, patch_ids, hardness.float())
        )
        if self.slow is None:
            std, mean = torch.std_mean(
                hardness, dim=1 if per_image else None, correction=0, keepdim=True
            )
            hardness = (hardness - mean) / (std + 1e-6)
        else:
            hardness = hardness.clamp(max=LARGEST_LOSS)
        maps = hardness.new_zeros(len(crops), 2, self.grid[0] * self.grid[1])
        maps[:, 0].scatter_(1, patch_ids, hardness)
        maps[:, 1].scatter_(1, patch_ids, 1.0)
        rows, columns = self._overlaps(crops)
        added = rows[:, None].mT @ maps.view(-1, 2, *self.grid) @ columns[:, None]
        added *= self.grid[0] * self.grid[1]  # as shares of a cell
        _update(self.found, sample_ids, added, DECAY)
        if self.slow is not None:
            _update(self.slow, sample_ids, added, SLOW_DECAY)

    def _overlaps(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """Along rows and along columns."""
        top, bottom, left, right = crops.unbind(1)
        return overlaps((top, bottom), self.grid[0]), overlaps((left, right), self.grid[1])


def _update(
    averages: Tensor, sample_ids: Int[Tensor, " batch"], added: Averages, decay: float
) -> None:
    """Age the images that were seen, and add what was found of them. An image that is twice in the
    batch ages once and learns from both."""
    averages[sample_ids] = decay * averages[sample_ids]
    averages.index_add_(0, sample_ids, added.to(averages.dtype))


def loss_progress(fast: Averages, slow: Averages) -> Averages:
    """How far the loss of each cell has fallen: its slow average less its fast average, with the
    weights of the fast one.

        progress = sum(0.95^age w L) / sum(0.95^age w) - sum(0.8^age w L) / sum(0.8^age w)

    over the visits of the image, where age counts the visits since, L is the loss found in the cell
    and w the share of the cell that was seen. A loss that stays as it is, high (noise) or low
    (learned), gives 0; one that still falls gives more than 0; one that rises, less.

    Losses are taken as they are, not standardised over the batch as for mining by loss: as the mean
    of the batch falls, the standardised loss of a place that stays hard rises, and would count as
    negative progress. The difference is taken per cell, before cells are averaged to patches: the
    two averages give an area that was not seen for long different weights, so that a hard cell
    beside an easy one would pass for progress. After one visit both averages are equal: a new image
    has no progress yet and is mined at random. The loss of a patch also depends on what else is
    hidden, so the difference is noisy after few visits.
    """
    (fast_total, weight), (slow_total, slow_weight) = fast.unbind(1), slow.unbind(1)
    slow_mean = slow_total / slow_weight.clamp(min=1e-8)
    return torch.stack([weight * slow_mean - fast_total, weight], dim=1)


def overlaps(
    edges: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]], count: int
) -> Float[Tensor, "batch patches cells"]:
    """Length that each of `count` patches of a view, which lie between two edges, shares with each
    of as many cells of the image, whose length is 1. A flipped view runs from the larger edge."""
    start, end = (edge[:, None] for edge in edges)
    steps = torch.linspace(0, 1, count + 1, device=start.device)
    bounds = start + (end - start) * steps
    low = torch.minimum(bounds[:, :-1], bounds[:, 1:])[..., None]
    high = torch.maximum(bounds[:, :-1], bounds[:, 1:])[..., None]
    return (torch.minimum(high, steps[1:]) - torch.maximum(low, steps[:-1])).clamp(min=0)

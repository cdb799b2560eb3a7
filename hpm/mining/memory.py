"""A memory of how hard each place of each image has been: mining without a teacher pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.core import distributed

Crops = Float[Tensor, "batch 4"]  # see data.transforms.Crop

KEPT = 0.8  # of what is known of an image, each time that it is seen again
DOUBT = 0.25  # weight of the assumption that a place is neither hard nor easy


class HardnessMemory(nn.Module):
    """Per training image a map in image coordinates, averaged over the visits of that image.

    Each of `grid` cells holds a weighted sum of what was found there, and the sum of the weights,
    in half precision: 4 bytes a cell, so that 1.28 million images of 14 x 14 take 1 GB. A view's
    patches lie somewhere among the cells: what is found of a patch is shared out by area, and read
    back by area. Earlier visits count ever less, and a place that nobody has looked at for long
    becomes neutral again. Of several processes each holds the same.

    Args:
        num_images: of the training set.
        grid: cells, as many as a view has patches.
    """

    found: Tensor  # [images 2 rows columns]: sum of weight * hardness, sum of weights

    def __init__(self, num_images: int, grid: tuple[int, ...], device: torch.device | None = None):
        super().__init__()
        self.grid = grid
        found = torch.zeros(num_images, 2, *grid, dtype=torch.float16, device=device)
        self.register_buffer("found", found)

    @torch.no_grad()
    def read(
        self, sample_ids: Int[Tensor, " batch"], crops: Crops
    ) -> Float[Tensor, "batch patches"]:
        """How hard each patch of these views was found, in standard deviations from the mean; 0
        where nothing is known."""
        rows, columns = self._overlaps(crops)
        rows, columns = (w / w.sum(2, keepdim=True).clamp(min=1e-12) for w in (rows, columns))
        found = self.found[sample_ids].float()
        total, weight = (rows[:, None] @ found @ columns[:, None].mT).unbind(1)
        return (total / (weight + DOUBT)).flatten(1)

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
        image, where only the order within an image means anything (`per_image`).
        """
        sample_ids, crops, patch_ids, hardness = (
            distributed.concatenate(t) for t in (sample_ids, crops, patch_ids, hardness.float())
        )
        std, mean = torch.std_mean(
            hardness, dim=1 if per_image else None, correction=0, keepdim=True
        )
        hardness = (hardness - mean) / (std + 1e-6)
        maps = hardness.new_zeros(len(crops), 2, self.grid[0] * self.grid[1])
        maps[:, 0].scatter_(1, patch_ids, hardness)
        maps[:, 1].scatter_(1, patch_ids, 1.0)
        rows, columns = self._overlaps(crops)
        added = rows[:, None].mT @ maps.view(-1, 2, *self.grid) @ columns[:, None]
        added *= self.grid[0] * self.grid[1]  # as shares of a cell
        # An image that is twice in the batch ages once and learns from both.
        self.found[sample_ids] = KEPT * self.found[sample_ids]
        self.found.index_add_(0, sample_ids, added.to(self.found.dtype))

    def _overlaps(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """Along rows and along columns."""
        top, bottom, left, right = crops.unbind(1)
        return overlaps((top, bottom), self.grid[0]), overlaps((left, right), self.grid[1])


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

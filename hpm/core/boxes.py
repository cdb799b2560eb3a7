"""Box operators in plain PyTorch, used if torchvision's compiled ones are missing."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024  # boxes compared at a time; bounds the memory


def nms(
    boxes: Float[Tensor, "boxes 4"], scores: Float[Tensor, " boxes"], iou_threshold: float
) -> Int[Tensor, " kept"]:
    """Non-maximum suppression: indices of the boxes (x0 y0 x1 y1) that do not overlap a better box
    that is kept, best first."""
    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for block in order.split(BLOCK):
        if len(kept):
            hidden = (_iou(boxes[kept], boxes[block]) > iou_threshold).any(0)
            block = block[~hidden]
        hides = (_iou(boxes[block], boxes[block]) > iou_threshold).triu(1)
        # Each round decides at least the best undecided box; a few rounds usually suffice.
        alive = torch.ones_like(block, dtype=torch.bool)
        while True:
            survivors = ~(hides & alive[:, None]).any(0)
            if torch.equal(survivors, alive):
                break
            alive = survivors
        kept = torch.cat([kept, block[alive]])
    return kept


def _iou(
    a: Float[Tensor, "first 4"], b: Float[Tensor, "second 4"]
) -> Float[Tensor, "first second"]:
    """Intersection over union of each pair; NaN if both boxes are empty."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a[..., None].unbind(1), b.unbind(1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_(min=0)
    overlap = width.mul_(height)
    areas = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
    return overlap / areas.sub_(overlap)


def roi_align(
    maps: Float[Tensor, "batch channels height width"],
    rois: Float[Tensor, "boxes 5"],
    spatial_scale: float,
    rows: int,
    columns: int,
    sampling_ratio: int,
    aligned: bool,
) -> Float[Tensor, "boxes channels {rows} {columns}"]:
    """The region of each box, averaged into cells (Mask R-CNN, He et al. 2017, section 3).

    Arguments as of torchvision's operator: `rois` are (index of the map, x0 y0 x1 y1), and each
    cell is the mean of `sampling_ratio` squared points, or, if that is below 1, of about one point
    for each place of the map, but at least one.
    """
    start, end = (rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).split(2, dim=1)
    sides = end - start if aligned else (end - start).clamp(min=1)
    cells = rois.new_tensor([columns, rows])
    points = (sides / cells).ceil().clamp(min=1).long()  # along x and y
    if sampling_ratio > 0:
        points = torch.full_like(points, sampling_ratio)
    # Boxes of the same map with the same number of points are sampled together.
    kinds, kind_of_box = torch.cat([rois[:, :1].long(), points], 1).unique(
        dim=0, return_inverse=True
    )
    found, order = [maps.new_zeros(0, maps.shape[1], rows, columns)], []
    for kind, (index, across, down) in enumerate(kinds.tolist()):
        chosen = torch.where(kind_of_box == kind)[0]
        x = _points(start[chosen, 0], sides[chosen, 0], columns * across)
        y = _points(start[chosen, 1], sides[chosen, 1], rows * down)
        values = _sample(maps[index], x, y)
        found.append(F.avg_pool2d(values, (down, across)))
        order.append(chosen)
    return torch.cat(found)[torch.cat(order).argsort()] if order else found[0]


def _points(
    start: Float[Tensor, " boxes"], side: Float[Tensor, " boxes"], count: int
) -> Float[Tensor, "boxes {count}"]:
    """The centres of `count` equal parts of each side."""
    centres = (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5) / count
    return start[:, None] + side[:, None] * centres


def _sample(
    image: Float[Tensor, "channels height width"],
    x: Float[Tensor, "boxes columns"],
    y: Float[Tensor, "boxes rows"],
) -> Float[Tensor, "boxes channels rows columns"]:
    """Bilinear values at x, y in pixels from the centre of the first; those of the border up to a
    pixel beyond it, 0 further out."""
    height, width = image.shape[1:]
    inside_x, inside_y = (x >= -1) & (x <= width), (y >= -1) & (y <= height)
    # grid_sample's convention: the centres of the first and last pixel are at -1 and 1.
    x, y = 2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1
    grid = torch.stack(
        [x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=-1
    )
    # Stack all boxes into one grid: [1, boxes * rows, columns, 2].
    values = F.grid_sample(
        image[None],
        grid.flatten(0, 1)[None].to(image.dtype),
        padding_mode="border",
        align_corners=True,
    )
    values = values[0].unflatten(1, (len(x), -1)).transpose(0, 1)
    return values * (inside_y[:, None, :, None] & inside_x[:, None, None, :])

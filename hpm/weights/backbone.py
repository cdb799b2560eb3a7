"""The backbone: a trained encoder with its own normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn

from hpm.core.errors import UserError, one_line
from hpm.data.arrays import ArrayImage, Opened, UnreadableImage
from hpm.data.loader import normalize
from hpm.data.opening import open_image
from hpm.data.transforms import evaluation_view
from hpm.models.encoder import Encoder

PIXELS = (torch.uint8, torch.uint16)
Normalized = Float[Tensor, "batch channels *size"]


class Backbone(nn.Module):
    """A trained encoder with its own normalisation.

    forward: images [B C H W], or clips [B C T H W] -> pooled [B D], the mean of the patches (or the
    class token with pool="cls"), and patches [B N D], both after the final norm. The dtype
    determines how images are treated:

    - uint8, uint16: pixels, normalised here;
    - floating point: already normalised, by `preprocess` (pictures), `normalize` (pixels) or with
      `mean` and `std`, which are on a scale of 0 to 1.

    Raises UserError if images do not fit the encoder, or if floating-point images are evidently not
    normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, mean: list[float], std: list[float], pool: str = "mean"):
        super().__init__()
        if pool == "cls" and not encoder.has_class_token:
            raise UserError("this encoder has no class token: take pool='mean'")
        self.encoder = encoder
        self.pool = pool
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        # Largest normalised value; 0 if unknown, for data in other units.
        in_units = all(0 <= m <= 1 for m in mean)
        self._brightest = max((1 - m) / s for m, s in zip(mean, std, strict=True)) * in_units

    def forward(
        self, images: Any
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch patches dim"]]:
        cls_token, patches = self.tokens(self._normalized(images))
        if self.pool == "mean" or cls_token is None:
            return patches.mean(1), patches
        return cls_token, patches

    def tokens(
        self, images: Normalized
    ) -> tuple[Float[Tensor, "batch dim"] | None, Float[Tensor, "batch patches dim"]]:
        """Class token (the mean of several, None without) and patches of normalised images."""
        tokens = self.encoder(images)
        return self.encoder.pooled_class_token(tokens), tokens[:, self.encoder.num_prefix_tokens :]

    def normalize(
        self, pixels: Shaped[Tensor, "batch channels *size"], full_scale: float | None = None
    ) -> Normalized:
        """Normalise pixels to float32 on the encoder's device.

        full_scale: largest pixel value. Default: that of the dtype for uint8 and uint16, and 255
        for floating point, like batches of deep images.
        """
        return normalize(pixels.to(self.mean.device), self.mean, self.std, full_scale)

    def preprocess(self, pictures: Any, crop_share: float = 1.0) -> Normalized:
        """Turn one or several pictures into normalised images, as in evaluation.

        Each is cropped to the largest centred box of the encoder's aspect ratio and resized
        (bicubic, antialiased).

        Args:
            pictures: Pillow image, path of an image file, or uint8 or uint16 array [H W C] or
                [H W]; or a list of these.
            crop_share: as in `hpm eval`.

        Raises:
            UserError: if a picture cannot be read, or its channels are not those of the encoder.
        """
        if len(self.encoder.image_size) == 3:
            raise UserError("preprocess takes pictures, but this encoder takes clips [B C T H W]")
        several = isinstance(pictures, (list, tuple))
        views = []
        for number, picture in enumerate(pictures if several else [pictures]):
            name = str(picture) if isinstance(picture, (str, Path)) else f"picture {number}"
            try:
                image = opened(picture)
                view = evaluation_view(
                    image, self._size, self.encoder.channels, crop_share=crop_share
                )
            except (UnreadableImage, OSError) as error:
                hint = "; arrays are [H W C]" if isinstance(picture, np.ndarray) else ""
                raise UserError(f"{name} cannot be used: {one_line(error)}{hint}") from None
            views.append(self.normalize(torch.from_numpy(view)[None]))
        if not views:
            raise UserError("preprocess: there are no pictures in the list")
        return torch.cat(views)

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self.encoder.image_size[-2:]
        return height, width

    def _normalized(self, images: Any) -> Normalized:
        """Check images, normalise pixels, and convert to the dtype of the weights."""
        if not isinstance(images, Tensor):
            raise UserError(
                f"images are of type {_kind(images)}, not a tensor [B C H W]: pass "
                "encoder.preprocess(images) of pictures, paths or arrays"
            )
        expected = (self.encoder.channels, *self.encoder.image_size)
        found = tuple(images.shape)
        if len(found) != len(expected) + 1 or found[1] != expected[0]:
            wanted = f"[B {' '.join(map(str, expected))}]"
            batch = ", one image as images[None]" if found == expected else ""
            raise UserError(f"images are {list(found)}, but this encoder takes {wanted}{batch}")
        if found[2:-2] != expected[1:-2]:
            raise UserError(
                f"clips are of {found[2]} frames, but this encoder takes {expected[1]}: cut them"
            )
        if found[2:] != expected[1:]:
            raise UserError(
                f"images are of {found[-2]} x {found[-1]} pixels, but this encoder is of "
                f"{expected[-2]} x {expected[-1]}: resize them (encoder.preprocess does), or load "
                f"it with load_encoder(..., image_size=({found[-2]}, {found[-1]}))"
            )
        if images.dtype in PIXELS:
            images = self.normalize(images)
        elif images.is_floating_point():
            full_scale = self._full_scale(images)
            if full_scale:
                raise UserError(
                    f"images are floating point from 0 to {full_scale}, but such images have to be "
                    f"normalised: pass encoder.normalize(images, full_scale={full_scale}), or "
                    "uint8 pixels as they are"
                )
        else:
            kind = str(images.dtype).removeprefix("torch.")
            raise UserError(
                f"images are {kind}: pass uint8 or uint16 pixels, or normalised floating point"
            )
        weight = next(self.encoder.parameters())
        return images.to(weight.device, weight.dtype)

    def _full_scale(self, images: Tensor) -> int | None:
        """1 or 255 if floating-point images are evidently pixels of that scale, else None.

        Normalised images have negative values, unless every pixel is brighter than the mean.
        Images without negative values count as pixels if their maximum is far above the largest
        normalised value, or if it is typical of pixels in [0, 1]. The latter may also be bright
        images, normalised: those of 8 bits are recognised by their levels, and others count as
        normalised unless white is well above 1 after normalisation.
        """
        if torch.compiler.is_compiling() or not images.numel():
            return None
        low, high = (float(side) for side in images.detach().aminmax())
        if 0 <= low <= 0.1 and 0.75 <= high <= 1:
            images = images.detach().float().to(self.mean.device)
            by_channel = (-1, *(1 for _ in self.encoder.image_size))
            pixels = images * self.std.view(by_channel) + self.mean.view(by_channel)
            if _has_8_bits(pixels):
                return None
            return 1 if self._brightest > 1.5 or _has_8_bits(images) else None
        return 255 if low >= 0 and 2 * self._brightest < high <= 255 and self._brightest else None


def _has_8_bits(pixels: Tensor) -> bool:
    """Whether pixels in [0, 1] are multiples of 1/255, as precisely as float16 has them."""
    levels = 255 * pixels
    return bool((levels - levels.round()).abs().max() < 0.1)


def opened(picture: Any) -> Opened:
    """A path, a Pillow image or an array, as the data sources give images."""
    if isinstance(picture, (str, Path)):
        return open_image(picture)
    if isinstance(picture, Image.Image):
        return picture.copy()  # decoding may rotate or shrink it in place
    if not isinstance(picture, np.ndarray):
        raise UserError(
            f"preprocess takes paths, Pillow images and arrays, but got {_kind(picture)}; "
            "encoder.normalize is for tensors of pixels"
        )
    if picture.dtype not in (np.uint8, np.uint16):
        raise UnreadableImage(f"it is {picture.dtype}, not uint8 or uint16")
    axes = {2: "YX", 3: "YXC"}.get(picture.ndim, "?")
    colours = axes == "YX" or picture.shape[-1] in (1, 3, 4)
    return ArrayImage(lambda: picture, picture.shape, picture.dtype, axes, colours)


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"

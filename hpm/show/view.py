"""`hpm view`: a local web page to try a model on images.

The page sends an image (or the number of an example) with settings, and receives panels.
"""

from __future__ import annotations

import io
import math
import threading
import webbrowser
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpm.core.errors import UserError, one_line, size_text
from hpm.data.arrays import UnreadableImage, at_depth, is_deep
from hpm.data.loader import evaluation_batches
from hpm.data.opening import open_image
from hpm.data.sources import Subset, open_source
from hpm.data.transforms import evaluation_view
from hpm.data.video.clips import ClipEvaluationViews
from hpm.data.video.decoding import VideoFile
from hpm.data.video.opening import open_video
from hpm.show.command import (
    check_shares,
    describe_unavailable,
    hard_share,
    mined_patches,
    mines,
    open_trained,
)
from hpm.show.drawing import LOSSES
from hpm.show.figures import (
    MASKED,
    as_rgb,
    head_pixels,
    panel_title,
    picture,
    pixels,
    unavailable_panels,
)
from hpm.show.gallery import OVERLAID, SHARP
from hpm.show.options import PANELS, ViewConfig
from hpm.show.page import image_uri
from hpm.show.strips import all_frames, count_frames, cut
from hpm.show.view_page import view_page
from hpm.show.view_server import ADDRESS, MAX_BYTES, make_server
from hpm.weights.resolve import Trained

EXAMPLES = 6


@dataclass
class UploadedVideo:
    """The bytes of a video, as a source of one."""

    body: bytes

    def open_video(self, index: int) -> VideoFile:
        return open_video(io.BytesIO(self.body))


@dataclass
class Viewer:
    """A model in eval mode and example images. Handles one request at a time."""

    trained: Trained
    examples: Tensor  # [examples C H W], or of clips [examples C T H W], as in a batch
    example_names: list[str]
    num_masks: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def page(self) -> str:
        reasons, config = unavailable_panels(self.trained), self.trained.config
        size = self.trained.encoder.image_size
        channels = self.trained.encoder.channels
        clips = self.trained.sampling() is not None
        about = {
            "title": self.trained.name,
            "kind": "video" if clips else "image",
            "input": f"{'clips of ' * clips}{size_text(size)} pixels, "
            f"{channels} channel{'s' * (channels > 1)}",
            "not_shown": describe_unavailable(reasons) if reasons else "",
            "panels": [panel for panel in PANELS if panel not in reasons],
            "features_only": all(panel in reasons for panel in MASKED),
            "mined": mined_patches(config) if config and mines(self.trained) else None,
            "mask_ratio": config.mask_ratio if config else 0.75,
            # Leaves one patch visible.
            "most_hidden": math.floor(100 * (1 - 1 / self.trained.encoder.num_patches)) / 100,
            "hard_share": hard_share(None, self.trained),
            "num_masks": self.num_masks,
            "limit": MAX_BYTES,
            "examples": [
                {"name": name, "src": image_uri(as_rgb(image, image))}
                for name, image in zip(self.example_names, self._thumbnails(), strict=True)
            ],
        }
        return view_page(about)

    def _thumbnails(self) -> Tensor:
        """The examples; of clips, the frames in the middle."""
        clips = self.examples.ndim == 5
        return self.examples[:, :, self.examples.shape[2] // 2] if clips else self.examples

    def answer(self, settings: dict[str, str], body: bytes) -> dict[str, Any]:
        """The panels of an image with these settings, or {"error": message}."""
        try:
            with self.lock:
                return self._show(settings, body)
        except (UserError, UnreadableImage, OSError) as error:
            return {"error": one_line(error)}

    def _show(self, settings: dict[str, str], body: bytes) -> dict[str, Any]:
        ratio = share = None
        if self.trained.config is not None:
            ratio = _number(settings, "mask_ratio", self.trained.config.mask_ratio)
            share = _number(settings, "hard_share", 0.0) if mines(self.trained) else None
        seed = _number(settings, "seed", 0)
        check_shares(self.trained, share, ratio)
        if not 0 <= seed < 2**31:
            raise UserError(f"seed is {seed:g}; it must lie between 0 and {2**31 - 1}")
        image = self._image(settings, body)
        shown = picture(
            self.trained,
            image,
            torch.zeros(1, dtype=torch.int64),
            share or 0.0,
            self.num_masks,
            int(seed),
            ratio,
            PANELS,
        )
        frames, shown = count_frames(shown), all_frames(shown)
        found = {name: cut(panel, frames) for name, panel in pixels(shown, 0).items()}
        return {
            "panels": [
                {
                    "name": name,
                    "title": panel_title(name, frames is not None),
                    "scale": list(shown.scale.words)
                    if name in LOSSES and shown.scale is not None
                    else [],
                    "overlaid": name in OVERLAID,
                    "src": image_uri(panel),
                    "sharp": panel.shape[-2] < SHARP,
                }
                for name, panel in found.items()
            ],
            "heads": [image_uri(cut(head, frames)) for head in head_pixels(shown, 0)],
        }

    def _image(self, settings: dict[str, str], body: bytes) -> Tensor:
        """The example or the uploaded image, [1 C H W], or clip, [1 C T H W]."""
        if "example" in settings:
            number = _number(settings, "example", 0)
            if number not in range(len(self.examples)):
                raise UserError(f"there is no example {number:g}")
            return self.examples[int(number)][None]
        height, width = self.trained.encoder.image_size[-2:]
        sampling = self.trained.sampling()
        if sampling is not None:
            views = ClipEvaluationViews((height, width), self.trained.encoder.channels, sampling)
            return torch.from_numpy(views(UploadedVideo(body), (0, 0))[0])[None]
        try:
            image = open_image(io.BytesIO(body))
            deep = is_deep(image)
            view = evaluation_view(image, (height, width), self.trained.encoder.channels)
        except (UnreadableImage, OSError, MemoryError) as error:
            # Hide a message of Pillow that names only the buffer.
            text = one_line(error)
            reason = "" if "BytesIO" in text else f" ({text})"
            raise UserError(f"this file cannot be read as an image{reason}") from None
        return torch.from_numpy(at_depth(view, deep).copy())[None]


def view(config: ViewConfig) -> None:
    """Serve the page until Ctrl-C. Raises UserError on bad input."""
    if config.num_masks < 1:
        raise UserError(f"num_masks is {config.num_masks}; it must be at least 1")
    trained = open_trained(config.run, config.device)
    viewer = Viewer(trained, *_examples(config.data, trained), config.num_masks)
    reasons = unavailable_panels(trained)
    if reasons:
        print(describe_unavailable(reasons))
    server = make_server(viewer, config.port)
    address = f"http://{ADDRESS}:{server.server_port}/"
    print(f"{config.run} can be tried at {address} (Ctrl-C stops it)", flush=True)
    if config.open:
        webbrowser.open(address)
    # In another thread, so that Ctrl-C does not interrupt the server while it accepts a connection.
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        while serving.is_alive():
            serving.join(timeout=0.5)  # a signal may reach another thread, and interrupt no wait
    except KeyboardInterrupt:
        print("\nstopped")
    finally:
        server.shutdown()
        server.server_close()


def _examples(data: str | None, trained: Trained) -> tuple[Tensor, list[str]]:
    """Example images from `data`, by default from the run's data, else the built-in ones.

    The run's data is used only for a run folder: a checkpoint alone may come from anyone, and its
    config may name any folder.
    """
    height, width = trained.encoder.image_size[-2:]
    sampling = trained.sampling()
    of_run = trained.config.data if trained.config and trained.folder else ""
    built_in = "demo" if sampling is None else "demo-video"
    for candidate in [data] if data is not None else [of_run, built_in]:
        if not candidate:
            continue
        try:
            splits = open_source(candidate, data is not None, clips=sampling is not None)
        except UserError:
            if data is not None:
                raise
            continue
        source = splits.test_or_all
        some = Subset(source, np.unique(np.linspace(0, len(source) - 1, EXAMPLES).astype(int)))
        size, channels = (height, width), trained.encoder.channels
        (batch,) = evaluation_batches(some, size, channels, EXAMPLES, sampling=sampling)
        if len(batch.images):
            return batch.images, [some.path(int(index)) for index in batch.indices]
        if data is not None:
            raise UserError(
                f"data: no image of {source.name} can be read: {batch.unreadable[0][1]}"
            )
    shape = (0, trained.encoder.channels, *trained.encoder.image_size)
    return torch.empty(shape, dtype=torch.uint8), []


def _number(settings: dict[str, str], name: str, default: float) -> float:
    text = settings.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise UserError(f"{name} is '{text}', which is not a number") from None

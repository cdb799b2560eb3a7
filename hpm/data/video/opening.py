"""Open video files with the decoder for this machine."""

from __future__ import annotations

import io

from hpm.core.errors import UserError
from hpm.data.arrays import UnreadableImage
from hpm.data.video.decoding import VideoFile, pyav
from hpm.data.video.torchcodec import TorchCodecFile, decoding_device


def open_video(file: str | io.BytesIO) -> VideoFile:
    """Open a video file or its bytes. Raises UnreadableImage."""
    try:
        av, device = pyav(), decoding_device()
    except UserError as error:
        raise UnreadableImage(str(error)) from None
    return VideoFile(file, av) if device is None else TorchCodecFile(file, av, device)

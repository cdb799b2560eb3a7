"""Decode video files by TorchCodec, on a GPU where there is one.

PyAV opens each file first: it accepts containers only, and gives the timing by which frames are
numbered, so that both decoders return the same frames. What TorchCodec cannot read, PyAV does.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Sequence
from functools import cache
from multiprocessing import parent_process
from types import ModuleType
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F

from hpm.core.errors import UserError, one_line
from hpm.data.jpeg import reduction
from hpm.data.notes import say_once
from hpm.data.video.decoding import VideoFile

Choice = Literal["auto", "pyav", "torchcodec"]
VARIABLE = "HPM_VIDEO_DECODER"
# Of TorchCodec, for files that it does not read; for anything else, PyAV finds the same error.
ERRORS = (RuntimeError, ValueError, IndexError, OSError)


def chosen_decoder() -> Choice:
    """The decoder that the environment asks for. Raises UserError if there is none of that name."""
    name = os.environ.get(VARIABLE, "auto")
    if name not in get_args(Choice):
        raise UserError(f"{VARIABLE} is '{name}': write {', '.join(get_args(Choice))}")
    return cast(Choice, name)


def decoding_device() -> torch.device | None:
    """Where TorchCodec decodes; None if PyAV does.

    By default, on the GPU of the main process: processes that load images cannot share it, so that
    this needs --workers 0. If TorchCodec is asked for, in those processes on the CPU. Raises
    UserError if it is asked for and does not load.
    """
    choice = chosen_decoder()
    if choice == "pyav":
        return None
    gpu = parent_process() is None and torch.cuda.is_available()
    if choice == "auto" and not (gpu and loads()):
        return None
    need_torchcodec()
    return torch.device("cuda" if gpu else "cpu")


@cache
def loads() -> bool:
    """Whether TorchCodec is installed and finds FFmpeg and PyTorch's libraries."""
    try:
        need_torchcodec()
    except UserError:
        return False
    return True


def need_torchcodec() -> ModuleType:
    """TorchCodec's decoders. Raises UserError with the reason if they do not load."""
    try:
        return importlib.import_module("torchcodec.decoders")
    except ImportError:
        reason = "it is not installed: pip install torchcodec"
    except (OSError, RuntimeError) as error:
        reason = one_line(error, 160)
    raise UserError(f"{VARIABLE} is torchcodec, which does not load ({reason})")


class TorchCodecFile(VideoFile):
    """A video whose frames TorchCodec decodes; see hpm.data.video.clip.Video."""

    def __init__(self, file: str | io.BytesIO, av: ModuleType, device: torch.device):
        super().__init__(file, av)
        self._device = device

    def _read(self, numbers: Sequence[int], least: tuple[int, int] | None) -> np.ndarray:
        context = self._stream.codec_context
        self._check_size(context.width, context.height, len(set(numbers)))
        try:
            frames = self._by_torchcodec(numbers) if self.timing.stamped else None
        except ERRORS:
            say_once("TorchCodec does not decode some of these videos: PyAV does")
            frames = None
        return super()._read(numbers, least) if frames is None else _reduced(frames, least)

    def _by_torchcodec(self, numbers: Sequence[int]) -> torch.Tensor | None:
        """uint8 [frames 3 H W], upright; None if the video ends before the clip."""
        file = self._file
        decoder = need_torchcodec().VideoDecoder(
            file.getvalue() if isinstance(file, io.BytesIO) else file,
            stream_index=self._stream.index,
            device=str(self._device),
        )
        about, base = decoder.metadata, float(self._stream.time_base)
        # The middle of each period; the last frame stays.
        middles = [self.timing.stamp(min(number, self.length - 1) + 1) for number in numbers]
        if middles[-1] * base >= about.end_stream_seconds:
            return None
        first: float = about.begin_stream_seconds
        return decoder.get_frames_played_at([max(first, each * base) for each in middles]).data


def _reduced(frames: torch.Tensor, least: tuple[int, int] | None) -> np.ndarray:
    """[frames 3 H W] -> [frames h w 3]; frames much larger than `least` are reduced."""
    height, width = frames.shape[-2:]
    scale = reduction((width, height), least)
    if scale > 1:
        size = -(-height // scale), -(-width // scale)
        frames = F.interpolate(frames.float(), size, mode="area").round().to(torch.uint8)
    pixels: Any = frames.permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(pixels)

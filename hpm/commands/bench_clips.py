"""The bare libraries for `hpm bench data` on videos: PyAV, and PyTorch's resize of a whole clip."""

from __future__ import annotations

import io
from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F

from hpm.data.sources import Source
from hpm.data.video.clip import Video
from hpm.data.video.clips import ClipViews
from hpm.data.video.decoding import Timing, VideoFile, pyav


class BareClips:
    """Decodes and resizes the clips that `views` decodes in the first epoch."""

    def __init__(self, source: Source, views: ClipViews):
        self.source, self.views = source, views
        self._plans: dict[int, tuple[list[int], Timing | None]] = {}

    def decode(self, index: int, data: bytes | None) -> np.ndarray:
        """A clip [T C H W], uint8 or float32."""
        numbers, timing = self.plan(index)
        if data is None or timing is None:
            with closing(self._open(index)) as video:
                clip = video.read(numbers, self.views.channels).transpose(0, 3, 1, 2)
                return clip if clip.dtype == np.uint8 else clip.astype(np.float32)
        wanted = [number + 0.5 for number in numbers]
        frames: list[np.ndarray] = []
        av = pyav()
        reformatter = av.video.reformatter.VideoReformatter()
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            if timing.stamped:
                container.seek(int(timing.stamp(numbers[0])), stream=stream)
            for counted, frame in enumerate(container.decode(stream)):
                place = (frame.pts - timing.start) / timing.period if timing.stamped else counted
                if place + 1 > wanted[len(frames)]:
                    # By default, each frame starts threads, which is slower in one process of many.
                    picture = reformatter.reformat(frame, format="rgb24", threads=1)
                    frames.append(picture.to_ndarray())
                    if len(frames) == len(wanted):
                        break
        return np.stack(frames).transpose(0, 3, 1, 2)

    def plan(self, index: int) -> tuple[list[int], Timing | None]:
        """(numbers of the clip's frames, timing of the file), found once, as they are no decoding;
        no timing of what is not a video file."""
        if index not in self._plans:
            sampling, share = self.views.sampling, np.random.default_rng(index).random()
            with closing(self._open(index)) as video:
                numbers = sampling.numbers(sampling.drawn_start(video.length, share))
                timing = video.timing if isinstance(video, VideoFile) else None
            self._plans[index] = numbers, timing
        return self._plans[index]

    def _open(self, index: int) -> Video:
        return self.source.open_video(index)  # type: ignore[attr-defined]

    def resize(self, part: np.ndarray) -> None:
        """Resize [T C H W] to the size of views."""
        F.interpolate(torch.from_numpy(part), self.views.size, mode="bicubic", antialias=True)

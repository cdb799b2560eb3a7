"""Which frames of a video make a clip."""

from __future__ import annotations

from dataclasses import dataclass

from hpm.core.config import PretrainConfig

# Start and end of a clip, as shares of its video's duration.
Times = tuple[float, float]


@dataclass(frozen=True)
class ClipSampling:
    """A clip of `frames` frames, one of every `stride` frames of the video.

    Frames are numbered at the rate that the video's header names: number k is the frame shown in
    the middle of the k-th period. In a video of constant rate that is its k-th frame; in one of
    variable rate, equal numbers are equal times. A video shorter than the clip repeats its last
    frame. A stride of 0 repeats one frame: what is left of a clip without its motion.
    """

    frames: int = 16
    stride: int = 4

    @property
    def span(self) -> int:
        """Frames of the video from the first to the last of the clip."""
        return (self.frames - 1) * self.stride + 1

    def numbers(self, start: int) -> list[int]:
        """The numbers of the clip's frames."""
        return [start + number * self.stride for number in range(self.frames)]

    def room(self, length: int) -> int:
        """The last start of a clip in a video of `length` frames."""
        return max(0, length - self.span)

    def drawn_start(self, length: int, share: float) -> int:
        """A start from a random number `share` in [0, 1)."""
        return int(share * (self.room(length) + 1))

    def segment_start(self, length: int, segment: int, segments: int) -> int:
        """Start of one of `segments` clips, evenly spaced from the first possible to the last; of a
        single one, the clip in the middle."""
        room = self.room(length)
        return room // 2 if segments == 1 else round(segment * room / (segments - 1))

    def times(self, start: int, length: int) -> Times:
        """Start and end of a clip as shares of the duration of the video, which is as long as the
        clip where the last frame is repeated."""
        whole = max(length, self.span)
        return start / whole, (start + self.span) / whole


@dataclass(frozen=True)
class ViewGrid:
    """The views of a test video whose scores are averaged: `segments` clips, evenly spaced in time,
    of `crops` crops each, evenly spaced along the longer side of the frames."""

    segments: int = 1
    crops: int = 1

    @property
    def count(self) -> int:
        """Views of each video."""
        return self.segments * self.crops


ONE_VIEW = ViewGrid()


def clip_sampling(config: PretrainConfig) -> ClipSampling | None:
    """Which frames make a clip of a run; None if it is of images."""
    return ClipSampling(config.frames, config.frame_stride) if config.frames > 1 else None

"""Decode video files by PyAV: seek to the key frame before the clip, choose frames by time stamps.

Headers are wrong often enough: no duration, one of another rate, or time stamps that all are zero.
Where a header cannot be true, packets are counted instead, without decoding them. Where FFmpeg has
to make up time stamps, frames are counted from the start of the file.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from hpm.core.errors import one_line
from hpm.core.extras import need
from hpm.data.arrays import UnreadableImage
from hpm.data.jpeg import reduction
from hpm.data.video.clip import EndsEarly

# FFmpeg guesses a format from the content, whatever the name. Of its formats, some are scripts that
# name other files or addresses (playlists, concat): only containers are opened.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,asf,flv,ogg,m4v"
RATES = (0.1, 240.0)  # frames per second that a header is believed
LARGEST_CLIP = 1 << 30  # pixels of its frames, which are in memory together: 1.5 bytes each or more
# Codecs whose decoders can leave out frames that no others depend on, by PyAV's `skip_frame`.
SKIPPING = ("h264", "hevc")
MOST_PACKETS = 4096  # that are held in memory to find out what to leave out
PROGRAM_STREAMS = ("mpeg", "mpegvideo")  # FFmpeg's names for .mpg, .vob and what is within
TURNS = {0: 0, 90: 1, 180: 2, -180: 2, -90: 3, 270: 3, -270: 1}  # degrees, counterclockwise


def pyav() -> ModuleType:
    """Raises UserError if PyAV is not installed."""
    return need("av", "video", "decoding videos")


@dataclass(frozen=True)
class Timing:
    """Where the frames of a stream lie.

    start: time stamp of the first frame. period: of a frame at the mean rate; both in units of the
    stream. length: number of periods. stamped: whether frames have usable time stamps; if not, they
    are counted.
    """

    start: float
    period: float
    length: int
    stamped: bool = True

    def stamp(self, number: int) -> float:
        """The time stamp to seek to. Half a period early: some containers round time stamps."""
        return self.start + (number - 0.5) * self.period


class VideoFile:
    """A video opened by PyAV; see hpm.data.video.clip.Video."""

    def __init__(self, file: str | io.BytesIO, av: ModuleType):
        self._file, self._av = file, av
        self._open()
        try:
            self._check()
            header = self._by_header()
            self._scanned = header is None
            self.timing = header or self._by_packets()
        except BaseException as error:
            self._container.close()
            if isinstance(error, av.FFmpegError):  # also of memory, for a size that is damaged
                raise self._unreadable(error) from error
            raise

    def close(self) -> None:
        self._container.close()

    @property
    def length(self) -> int:
        return self.timing.length

    def read(
        self, numbers: Sequence[int], channels: int = 3, least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """uint8 [frames H W 3]; see Video."""
        if channels not in (1, 3, 4):
            raise UnreadableImage(f"3 channels instead of {channels}")
        try:
            return self._read(numbers, least)
        except (self._av.FFmpegError, ValueError) as error:
            raise self._unreadable(error) from error

    def _read(self, numbers: Sequence[int], least: tuple[int, int] | None) -> np.ndarray:
        timing = self.timing
        found: list[Any] | None = None
        if timing.stamped and numbers[0] > 0:
            self._seek(timing.stamp(numbers[0]))
            found = self._shown(numbers, timing, from_start=False)
        if found is None:  # an index that leads past the clip
            self._rewind()
            found = self._shown(numbers, timing, from_start=True)
        assert found is not None
        if len(found) < len(numbers) and not self._scanned:
            self._rewind()
            self.timing, self._scanned = self._by_packets(), True
            if self.length < timing.length:
                raise EndsEarly
            return self._read(numbers, least)
        if not found:
            raise UnreadableImage("no frame can be decoded")
        return np.stack(self._pictures(found, least))

    def _shown(self, numbers: Sequence[int], timing: Timing, from_start: bool) -> list[Any] | None:
        """The frame shown in the middle of each numbered period, fewer if the video ends early;
        None if decoding started behind the first of them, or behind all frames."""
        shown: list[Any] = []
        last, position = None, 0.0
        for counted, frame in enumerate(self._decoded(numbers, timing)):
            self._check_size(frame.width, frame.height, len(set(numbers)))
            if timing.stamped and frame.pts is not None:
                position = (frame.pts - timing.start) / timing.period
            else:
                position = float(counted)
            while position > numbers[len(shown)] + 0.5:
                if last is None:
                    if not from_start:
                        return None
                    last = frame  # the first frame starts late
                shown.append(last)
                if len(shown) == len(numbers):
                    return shown
            last = frame
        if last is None and not from_start:
            return None
        # The last frame stays, if this is where the video should end.
        if last is not None and (self._scanned or position >= timing.length - 1.5):
            shown += [last] * (len(numbers) - len(shown))
        return shown

    def _decoded(self, numbers: Sequence[int], timing: Timing) -> Iterator[Any]:
        """Frames from the current position; ends where the file is cut off. Frames that are not
        shown in the middle of a numbered period may be missing, if no others depend on them."""
        packets, context = self._packets(), self._stream.codec_context
        window, shown = self._window(packets, numbers, timing)
        for packet in window:
            if packet.is_corrupt:
                return
            if shown:
                context.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
            yield from packet.decode()
        context.skip_frame = "DEFAULT"
        for packet in packets:
            if packet.is_corrupt:
                return
            yield from packet.decode()

    def _window(
        self, packets: Iterator[Any], numbers: Sequence[int], timing: Timing
    ) -> tuple[list[Any], set[int]]:
        """(the packets up to the last numbered period, the time stamps of the frames that are shown
        and of the one after them); no stamps where they cannot be told before decoding."""
        window: list[Any] = []
        if not timing.stamped or self._stream.codec_context.name not in SKIPPING:
            return window, set()
        middles = [timing.stamp(number + 1) for number in numbers]
        for packet in packets:
            window.append(packet)
            if packet.is_corrupt or not packet.size:  # cut off; the end
                break
            if packet.pts is None or packet.dts is None or len(window) > MOST_PACKETS:
                return window, set()
            if packet.dts > middles[-1]:  # all others are shown later
                break
        stamps = sorted(p.pts for p in window if p.pts is not None and not p.is_corrupt)
        after = [bisect_right(stamps, middle) for middle in middles]
        return window, {stamps[place - 1] for place in after if place} | set(
            stamps[after[-1] : after[-1] + 1]
        )

    def _pictures(self, frames: list[Any], least: tuple[int, int] | None) -> list[np.ndarray]:
        """RGB pictures of frames, of one size and upright. A frame shown for longer is converted
        once."""
        turns = TURNS.get(int(frames[0].rotation), 0)
        size = frames[0].width, frames[0].height
        scale = reduction(size[::-1] if turns % 2 else size, least)
        width, height = (-(-side // scale) for side in size)
        smaller = self._av.video.reformatter.Interpolation.AREA if scale > 1 else None
        pictures: list[np.ndarray] = []
        for number, frame in enumerate(frames):
            if number and frame is frames[number - 1]:
                pictures.append(pictures[-1])
                continue
            picture = self._reformatter.reformat(
                frame, width, height, "rgb24", interpolation=smaller, threads=1
            )
            pictures.append(np.rot90(picture.to_ndarray(), turns))
        return pictures

    def _open(self) -> None:
        av = self._av
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        source = self._file if isinstance(self._file, io.BytesIO) else f"file:{self._file}"
        try:
            self._container = av.open(
                source,
                options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
                metadata_errors="replace",
            )
        except (av.FFmpegError, ValueError) as error:
            raise self._unreadable(error) from error
        self._untouched = True  # since it was opened
        self._reformatter = av.video.reformatter.VideoReformatter()

    def _check(self) -> None:
        streams = [s for s in self._container.streams.video if not self._is_cover(s)]
        if not streams:
            raise UnreadableImage("no video in this file, only sound or a cover")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise UnreadableImage("its codec is unknown")
        context.thread_count = 1  # workers decode in parallel
        self._check_size(context.width, context.height)

    def _check_size(self, width: int, height: int, frames: int = 1) -> None:
        """The same limit as Pillow's, and one of a clip, so that a hostile header cannot fill the
        memory."""
        limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
        if limit and width * height > limit:
            raise UnreadableImage(f"{width}x{height} pixels, more than {limit} in a frame")
        if frames * width * height > LARGEST_CLIP:
            raise UnreadableImage(
                f"{frames} frames of {width}x{height} pixels, more than {LARGEST_CLIP} in a clip"
            )

    def _is_cover(self, stream: Any) -> bool:
        return bool(stream.disposition & self._av.stream.Disposition.attached_pic)

    def _by_header(self) -> Timing | None:
        """The timing that the header gives; None if it gives none, or one that cannot be."""
        if self._has_made_up_stamps():
            return None
        stream = self._stream
        rate = float(stream.average_rate or 0)
        duration = stream.duration
        if duration is None and len(self._container.streams) == 1:
            whole = self._container.duration  # in microseconds
            duration = whole / 1e6 / stream.time_base if whole else None
        if not duration or not RATES[0] <= rate <= RATES[1]:
            return None
        period = 1 / (rate * float(stream.time_base))
        length = round(float(duration) / period)
        return Timing(float(stream.start_time or 0), period, length) if length else None

    def _has_made_up_stamps(self) -> bool:
        """AVI has no time stamps, and those of FFmpeg are wrong where frames are not stored in the
        order in which they are shown. A program stream has some, and behind a seek, those of FFmpeg
        are wrong up to the first of them."""
        name, context = self._container.format.name, self._stream.codec_context
        if name == "avi":
            return context.name in SKIPPING and context.has_b_frames
        return name in PROGRAM_STREAMS

    def _by_packets(self) -> Timing:
        """The timing of the packets, read without decoding them."""
        packets = [(p.pts, p.duration) for p in self._packets() if p.size and not p.is_corrupt]
        self._rewind()
        stamps = sorted({stamp for stamp, _ in packets if stamp is not None})
        if len(stamps) > max(1, 0.5 * len(packets)) and not self._has_made_up_stamps():
            # The mean rate. The last frame lasts as long as its packet says, or as the others.
            period = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
            last = dict(packets)[stamps[-1]] or period
            length = max(1, round((stamps[-1] + last - stamps[0]) / period))
            return Timing(float(stamps[0]), period, length)
        return Timing(0.0, 1.0, len(packets), stamped=False)

    def _seek(self, stamp: float) -> None:
        self._untouched = False
        try:
            self._container.seek(int(stamp), stream=self._stream)
        except (self._av.FFmpegError, OSError):
            self._rewind()  # a container without an index

    def _packets(self) -> Iterator[Any]:
        self._untouched = False
        yield from self._container.demux(self._stream)

    def _rewind(self) -> None:
        """Back to the start, with a decoder that remembers nothing."""
        if not self._untouched:
            self._container.close()
            self._open()
            self._check()

    def _unreadable(self, error: Exception) -> UnreadableImage:
        if isinstance(error, UnreadableImage):
            return error
        text = getattr(error, "strerror", None) or one_line(error)
        return UnreadableImage(text or type(error).__name__)

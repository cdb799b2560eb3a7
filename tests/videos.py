"""Tiny videos whose frames show their number."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
SIDE = 16  # of the square of each bit, in pixels; codecs keep it
CODECS = {".webm": "libvpx", ".avi": "mpeg4", ".gif": "gif"}


def numbered(number: int, repeats: int = 2) -> np.ndarray:
    """uint8 [32 128 3]: a square per bit, white where it is set; the first row dimmer."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8)
    row = np.kron(bits * 200 + 20, np.ones((SIDE, SIDE), np.uint8))
    return np.repeat(np.concatenate([row] * repeats)[..., None], 3, 2)


def number_of(frame: np.ndarray) -> int:
    """The number that a frame [H W 3] of `numbered` shows."""
    row = frame[: frame.shape[0] // 2, :, 0].astype(float)
    means = row.reshape(row.shape[0], BITS, -1).mean((0, 2))
    return int(sum(1 << bit for bit, mean in enumerate(means) if mean > 120))


def write_video(
    file: Path,
    frames: int = 40,
    rate: int | Fraction = 25,
    codec: str | None = None,
    times: list[int] | None = None,
    gop: int = 12,
    sound: float = 0.0,
    b_frames: int = 0,
    **options: str,
) -> Path:
    """Write numbered frames. times: time stamps in milliseconds (default: of a constant rate).
    sound: its duration in seconds. b_frames: the most between two frames that others depend on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    container = av.open(str(file), "w", options=options)
    if frames:
        codec = codec or CODECS.get(file.suffix, "libx264")
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 128, 32
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.gop_size = gop
        if b_frames:
            stream.options = (
                {"x264-params": f"bframes={b_frames}:b-adapt=0"}
                if codec == "libx264"
                else {"bf": str(b_frames)}
            )
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    if sound:
        audio = container.add_stream("aac", rate=16000)
    for number in range(frames):
        frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
        if times:
            frame.pts, frame.time_base = times[number], Fraction(1, 1000)
        container.mux(stream.encode(frame))
    if frames:
        container.mux(stream.encode(None))
    for start in range(0, int(sound * 16000), 1024):
        samples = np.zeros((1, 1024), np.float32)
        packet = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        packet.sample_rate, packet.pts = 16000, start
        container.mux(audio.encode(packet))
    if sound:
        container.mux(audio.encode(None))
    container.close()
    return file

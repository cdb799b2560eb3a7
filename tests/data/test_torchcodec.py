"""Decoding by TorchCodec: the frames that PyAV gives, and PyAV where TorchCodec does not read."""

import io
import sys
from contextlib import closing
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import av
import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from videos import number_of, write_video

from hpm.core.errors import UserError
from hpm.data.arrays import UnreadableImage
from hpm.data.video import torchcodec as ours
from hpm.data.video.decoding import VideoFile
from hpm.data.video.opening import open_video
from hpm.data.video.torchcodec import VARIABLE, TorchCodecFile


class FakeDecoder:
    """What we use of torchcodec.decoders.VideoDecoder, as it is documented, by PyAV: the frame
    played at a time is the last that starts at or before it."""

    opened: ClassVar[list] = []

    def __init__(self, source, *, stream_index=None, device=None):
        self.opened.append(device)
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
            stream = container.streams[stream_index]
            frames = [
                (float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(stream)
            ]
            last = 1 / float(stream.average_rate)
        if not frames:
            raise RuntimeError("no frames")
        self.times = torch.tensor([time for time, _ in frames], dtype=torch.float64)
        self.frames = torch.from_numpy(np.stack([pixels for _, pixels in frames]))
        self.metadata = SimpleNamespace(
            begin_stream_seconds=frames[0][0], end_stream_seconds=frames[-1][0] + last
        )

    def get_frames_played_at(self, seconds):
        about = self.metadata
        if not all(about.begin_stream_seconds <= s < about.end_stream_seconds for s in seconds):
            raise RuntimeError("Invalid pts in seconds")
        index = [int((self.times <= second + 1e-9).sum()) - 1 for second in seconds]
        return SimpleNamespace(data=self.frames[index].permute(0, 3, 1, 2))


@pytest.fixture
def fake(monkeypatch):
    """TorchCodec as it is asked for: on the CPU."""
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder, package.decoders = FakeDecoder, decoders
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setenv(VARIABLE, "torchcodec")
    monkeypatch.setattr(FakeDecoder, "opened", [])
    ours.loads.cache_clear()
    yield FakeDecoder
    ours.loads.cache_clear()


def shown(file, numbers, **options):
    with closing(open_video(file)) as video:
        return [number_of(frame) for frame in video.read(numbers, **options)]


def test_frames_are_those_of_pyav(fake, tmp_path, monkeypatch):
    file = str(write_video(tmp_path / "a.mp4"))
    times = [50 * i for i in range(20)] + [1000 + 200 * i for i in range(10)]
    variable = str(write_video(tmp_path / "v.mkv", frames=30, times=times))
    late = str(write_video(tmp_path / "l.mp4", frames=5, times=[80 + 40 * i for i in range(5)]))
    wanted = {file: [[0], [3, 17, 39], [38, 40, 50]], variable: [range(0, 70, 3)], late: [[0, 2]]}
    assert isinstance(open_video(file), TorchCodecFile)
    found = [shown(video, numbers) for video, several in wanted.items() for numbers in several]
    assert len(fake.opened) == len(found) and set(fake.opened) == {"cpu"}
    with open(file, "rb") as data:
        assert shown(io.BytesIO(data.read()), [7, 31]) == [7, 31]
    monkeypatch.setenv(VARIABLE, "pyav")
    assert type(open_video(file)) is VideoFile
    assert found == [shown(v, numbers) for v, several in wanted.items() for numbers in several]


def test_large_frames_are_reduced(fake, tmp_path):
    file = str(write_video(tmp_path / "a.mp4"))
    with closing(open_video(file)) as video:
        frames = video.read([5, 9], least=(10, 30))
    assert frames.shape == (2, 16, 64, 3) and frames.dtype == np.uint8


def test_what_it_cannot_read_pyav_does(fake, tmp_path, monkeypatch, capsys):
    """That is said, and what neither reads is unreadable."""
    file = write_video(tmp_path / "a.mp4", frames=20)

    def refuse(self, seconds):
        raise RuntimeError("no")

    monkeypatch.setattr(fake, "get_frames_played_at", refuse)
    assert shown(str(file), [2, 9]) == [2, 9]
    assert "TorchCodec does not decode some of these videos" in capsys.readouterr().err
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(UnreadableImage):
        open_video(str(tmp_path / "b.mp4"))


def test_which_decoder(fake, tmp_path, monkeypatch):
    """By default the GPU's, in the main process alone; on the CPU only where it is asked for."""
    monkeypatch.setenv(VARIABLE, "auto")
    assert ours.decoding_device() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ours.decoding_device() == torch.device("cuda")
    monkeypatch.setattr(ours, "parent_process", lambda: object())
    assert ours.decoding_device() is None
    monkeypatch.setenv(VARIABLE, "torchcodec")
    assert ours.decoding_device() == torch.device("cpu")
    monkeypatch.setenv(VARIABLE, "opencv")
    with pytest.raises(UserError, match="write auto, pyav, torchcodec"):
        ours.decoding_device()


def test_it_does_not_load(tmp_path, monkeypatch):
    write_video(tmp_path / "v" / "a.mp4")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setenv(VARIABLE, "torchcodec")
    out = str(tmp_path / "run")
    refused = run_here("pretrain", tmp_path / "v", "--frames", 4, "--out", out)
    assert_refused(refused, "HPM_VIDEO_DECODER is torchcodec, which does not load")


def test_the_real_one(tmp_path, monkeypatch):
    ours.loads.cache_clear()
    if not ours.loads():
        pytest.skip("TorchCodec does not load here")
    monkeypatch.setenv(VARIABLE, "torchcodec")
    file = str(write_video(tmp_path / "a.mp4"))
    assert isinstance(open_video(file), TorchCodecFile)
    for numbers in ([0], [3, 17, 39], [38, 40, 50]):
        assert shown(file, numbers) == [min(number, 39) for number in numbers]

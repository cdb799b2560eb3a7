"""Each kind of video file gives the frames that its time stamps say."""

import io
from contextlib import closing
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from videos import number_of, numbered, write_video

from hpm.data.arrays import UnreadableImage
from hpm.data.video import decoding
from hpm.data.video.clip import read_clip
from hpm.data.video.decoding import VideoFile
from hpm.data.video.frames import FrameFolder
from hpm.data.video.opening import open_video
from hpm.data.video.sampling import ClipSampling


def shown(video, numbers, **options):
    """The numbers that the frames of a video show."""
    with closing(video):
        return [number_of(frame) for frame in video.read(numbers, **options)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".webm", ".gif"])
def test_frames_are_those_asked_for(tmp_path, suffix):
    rate = 25 if suffix == ".gif" else Fraction(30000, 1001)
    file = str(write_video(tmp_path / f"a{suffix}", frames=40, rate=rate))
    assert open_video(file).length == 40
    for numbers in ([0], [1, 5, 9], [13, 14, 15], [24, 30, 39], [39]):
        assert shown(open_video(file), numbers) == numbers
    with open(file, "rb") as data:
        assert shown(open_video(io.BytesIO(data.read())), [7, 31]) == [7, 31]


def test_clips_near_the_end_of_a_transport_stream(tmp_path):
    """It has no index: to seek there may lead behind its last packet."""
    file = str(write_video(tmp_path / "a.ts", frames=60, rate=30, b_frames=2))
    for start in range(45, 60):
        numbers = range(start, start + 4)
        assert shown(open_video(file), numbers) == [min(number, 59) for number in numbers]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".avi", "libx264"), (".mpg", "mpeg2video"), (".mpeg", "mpeg1video"), (".vob", "mpeg2video")],
)
def test_formats_without_the_time_stamps_of_all_frames(tmp_path, suffix, codec):
    """FFmpeg makes them up from the order in which frames are stored, not that in which they are
    shown."""
    file = str(write_video(tmp_path / f"a{suffix}", frames=60, codec=codec, b_frames=2))
    assert open_video(file).length == 60
    for start in range(0, 56, 5):
        numbers = range(start, start + 4)
        assert shown(open_video(file), numbers) == list(numbers)


def test_past_the_end_the_last_frame_stays(tmp_path):
    one = str(write_video(tmp_path / "one.mp4", frames=1))
    assert open_video(one).length == 1
    assert shown(open_video(one), [0, 4, 8]) == [0, 0, 0]
    five = str(write_video(tmp_path / "five.mp4", frames=5))
    assert shown(open_video(five), [0, 2, 4, 6, 8]) == [0, 2, 4, 4, 4]
    sampling = ClipSampling(5, 2)
    with closing(open_video(five)) as video:
        _, times = read_clip(video, sampling, lambda n: sampling.drawn_start(n, 0.99), 3)
    assert times == (0, 1)


def test_variable_rates_are_read_by_time(tmp_path):
    # 20 frames in the first second, 10 in the two seconds after it; the header says 25 per second.
    times = [50 * i for i in range(20)] + [1000 + 200 * i for i in range(10)]
    file = str(write_video(tmp_path / "v.mkv", frames=30, rate=25, times=times))
    numbers = range(0, 70, 3)
    expected = [max(i for i, time in enumerate(times) if time <= 40 * (n + 0.5)) for n in numbers]
    assert shown(open_video(file), numbers) == expected
    assert shown(open_video(file), [40, 44]) == [23, 23]


def test_frames_that_are_not_shown_are_left_out(tmp_path, monkeypatch):
    """Of B-frames on which no other frame depends; those that are shown are the same."""
    regular = str(write_video(tmp_path / "a.mp4", frames=60, gop=30, b_frames=3))
    times = [20 * i + 9 * (i % 3) for i in range(60)]
    variable = str(
        write_video(tmp_path / "v.mkv", frames=60, rate=50, times=times, gop=30, b_frames=3)
    )
    decoded = []

    def count(frames):
        for frame in frames:
            decoded[-1] += 1
            yield frame

    original = VideoFile._decoded
    monkeypatch.setattr(VideoFile, "_decoded", lambda *arguments: count(original(*arguments)))
    found = {}
    for codecs in (decoding.SKIPPING, ()):
        monkeypatch.setattr(decoding, "SKIPPING", codecs)
        decoded.append(0)
        for file in (regular, variable):
            for stride in (1, 4):
                for start in range(0, 60, 6):
                    numbers = range(start, start + 8 * stride, stride)
                    found.setdefault((file, stride, start), []).append(
                        shown(open_video(file), numbers)
                    )
    assert all(one == other for one, other in found.values())
    assert found[regular, 4, 6][0] == list(range(6, 38, 4))
    assert decoded[0] < 0.9 * decoded[1]


def test_a_missing_duration_is_counted(tmp_path):
    # Fragments, and a Matroska stream to a pipe: neither header knows how long the video is.
    parts = write_video(tmp_path / "f.mp4", movflags="frag_keyframe+empty_moov+default_base_moof")
    stream = write_video(tmp_path / "s.mkv", live="1")
    for file in (parts, stream):
        with closing(open_video(str(file))) as video:
            assert video.length == 40
            assert [number_of(frame) for frame in video.read([20, 39])] == [20, 39]


def test_time_stamps_that_are_all_zero(tmp_path):
    plain, file = write_video(tmp_path / "a.mp4", frames=20, codec="mpeg4"), tmp_path / "zero.mp4"
    with av.open(str(plain)) as source, av.open(str(file), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.pts, packet.dts = stream, 0, 0
                target.mux(packet)
    with av.open(str(file)) as container:
        assert {packet.pts for packet in container.demux(video=0) if packet.size} == {0}
    assert shown(open_video(str(file)), [0, 7, 19, 25]) == [0, 7, 19, 19]


@pytest.mark.parametrize("degrees, turns", [(90, 1), (180, 2), (270, 3)])
def test_rotated_videos_are_upright(tmp_path, degrees, turns):
    plain, turned = write_video(tmp_path / "a.mp4", frames=3), tmp_path / "b.mp4"
    data = bytearray(plain.read_bytes())
    # The matrix of the track's header (tkhd) turns the picture counterclockwise.
    cos, sin = {90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]
    matrix = [cos, sin, 0, -sin, cos, 0]
    at = data.index(b"tkhd") + 4 + 40
    for place, value in zip((0, 4, 8, 12, 16, 20), matrix):
        data[at + place : at + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    turned.write_bytes(data)
    with closing(open_video(str(plain))) as video:
        straight = video.read([1])[0]
    with closing(open_video(str(turned))) as video:
        found = video.read([1])[0]
    assert np.array_equal(found, np.rot90(straight, turns))


def test_what_holds_no_video_is_unreadable(tmp_path):
    sound = write_video(tmp_path / "sound.mp4", frames=0, sound=0.5)
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{write_video(tmp_path / 'a.mp4')}\n")
    (tmp_path / "empty.mp4").touch()
    without_index = tmp_path / "cut.mp4"
    whole = (tmp_path / "a.mp4").read_bytes()
    without_index.write_bytes(whole[: len(whole) // 2])
    for file in (sound, text, playlist, tmp_path / "empty.mp4", without_index, tmp_path / "none"):
        with pytest.raises(UnreadableImage):
            open_video(str(file)).read([0])
    with pytest.raises(UnreadableImage, match="only sound"):
        open_video(str(sound))


def test_a_size_that_is_damaged_asks_for_more_memory_than_there_is(tmp_path, monkeypatch):
    file = write_video(tmp_path / "a.mp4", frames=4)
    monkeypatch.setattr(VideoFile, "_by_header", lambda self: None)
    monkeypatch.setattr(VideoFile, "_packets", lambda self: av.error.err_check(-12, "a"))
    with pytest.raises(UnreadableImage, match="Cannot allocate memory"):
        open_video(str(file))


@pytest.mark.parametrize("suffix, options", [(".mp4", {"movflags": "faststart"}), (".avi", {})])
def test_of_a_file_cut_off_the_rest_is_used(tmp_path, suffix, options):
    file = write_video(tmp_path / f"a{suffix}", frames=100, **options)
    data = file.read_bytes()
    file.write_bytes(data[: int(0.7 * len(data))])
    sampling = ClipSampling(4, 2)
    with closing(open_video(str(file))) as video:
        clip, times = read_clip(video, sampling, lambda n: sampling.drawn_start(n, 0.999), 3)
        length = video.length
    assert 40 < length < 90 and times[1] == 1
    numbers = [number_of(frame) for frame in clip.frames]
    assert numbers[0] == length - sampling.span and np.all(np.diff(numbers[:3]) == 2)


def test_sound_that_is_longer_than_the_video(tmp_path):
    file = str(write_video(tmp_path / "a.mkv", frames=25, sound=4.0))
    sampling = ClipSampling(3, 1)
    with closing(open_video(file)) as video:
        clip, _ = read_clip(video, sampling, lambda n: sampling.drawn_start(n, 0.999), 3)
    assert [number_of(frame) for frame in clip.frames] == [22, 23, 24]


def test_a_long_video_is_not_decoded_from_its_start(tmp_path, monkeypatch):
    file = str(write_video(tmp_path / "long.mp4", frames=250, gop=10))

    decoded = []

    def counting(video, *arguments, decode=VideoFile._decoded):
        for frame in decode(video, *arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(VideoFile, "_decoded", counting)
    assert shown(open_video(file), [203, 205, 207]) == [203, 205, 207]
    assert len(decoded) < 25


def test_frames_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    file = str(write_video(tmp_path / "a.mp4", frames=2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="128x32 pixels"):
        open_video(file)


def test_clips_too_large_are_refused_before_they_are_held(tmp_path, monkeypatch):
    """Frames that are repeated count once."""
    file = str(write_video(tmp_path / "a.mp4", frames=8))
    monkeypatch.setattr(decoding, "LARGEST_CLIP", 3 * 128 * 32)
    with closing(open_video(file)) as video:
        assert len(video.read([0, 2, 4])) == 3 and len(video.read([1, 1, 1, 1])) == 4
        with pytest.raises(UnreadableImage, match="4 frames of 128x32 pixels, more than 12288"):
            video.read([0, 1, 2, 3])


def test_large_frames_are_reduced(tmp_path):
    file = str(write_video(tmp_path / "a.mp4", frames=8))
    with closing(open_video(file)) as video:
        frames = video.read([0, 5], least=(16, 16))
    assert frames.shape == (2, 16, 64, 3)
    assert [number_of(frame) for frame in frames] == [0, 5]


def test_folders_of_frames_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(12):
        Image.fromarray(numbered(number)).save(tmp_path / f"frame_{number}.png")
    video = FrameFolder(str(tmp_path))
    assert video.length == 12
    assert shown(video, [2, 9, 10, 11, 12]) == [2, 9, 10, 11, 11]
    Image.new("RGB", (8, 8)).save(tmp_path / "frame_12.png")
    with pytest.raises(UnreadableImage, match="frame_12.png is 8x8"):
        FrameFolder(str(tmp_path)).read([11, 12])

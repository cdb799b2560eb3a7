"""Videos are found where people keep them, with their splits and labels."""

import json
import os
import sys
from contextlib import closing

import numpy as np
import pytest
from helpers import write_images
from PIL import Image
from videos import number_of, numbered, write_video

from hpm.core.errors import UserError
from hpm.data import notes
from hpm.data.fingerprint import differing, fingerprint
from hpm.data.sources import Subset, clip_mask, hold_out, object_mask, open_source
from hpm.data.unreadable import UnreadableImages
from hpm.data.video import lists
from hpm.data.video.sampling import ClipSampling


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a video of 12 frames."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames=12).read_bytes()


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("hpm.data.video.sources.say_once", lines.append)
    monkeypatch.setattr("hpm.data.video.lists.say_once", lines.append)
    monkeypatch.setattr("hpm.data.sources.say_once", lines.append)
    monkeypatch.setattr(notes, "_said", set())
    return lines


def put(folder, clip, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(clip)
    return folder


def write_frames(folder, count=5):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(numbered(number)).save(folder / f"img_{number:05d}.png")


def fifth_of(source, index):
    with closing(source.open_video(index)) as video:
        return number_of(video.read([4])[0])


def test_folders_with_splits_and_classes(tmp_path, clip):
    put(tmp_path, clip, "train/b/1.mp4", "train/a/2.mkv", "train/a/sub/3.MOV", "val/a/1.mp4")
    splits = open_source(str(tmp_path), clips=True)
    assert splits.train.classes == ["a", "b"] and splits.train.labels.tolist() == [0, 0, 1]
    assert splits.test is not None and len(splits.test) == 1
    rest, held_out = hold_out(splits.train, 1, seed=0)
    assert [fifth_of(source, 0) for source in (splits.train, splits.test, rest, held_out)] == [
        4
    ] * 4
    # The same name elsewhere is the same data, another size is not.
    before = fingerprint(splits.train)
    put(tmp_path, clip + b"0", "train/b/1.mp4")
    assert differing(before, fingerprint(open_source(str(tmp_path), clips=True).train)) == ["sizes"]


def test_without_classes_and_single_files(tmp_path, clip):
    put(tmp_path, clip, "1.mp4", "more/2.avi")
    source = open_source(str(tmp_path), clips=True).train
    assert source.labels is None and len(source) == 2
    assert fifth_of(open_source(str(tmp_path / "1.mp4"), clips=True).train, 0) == 4


def test_single_frames_of_videos_are_images(tmp_path, clip):
    source = open_source(str(put(tmp_path, clip, "a/1.mp4", "b/2.mp4"))).train
    assert source.classes == ["a", "b"] and not source.is_deep()
    image = source.open(1)
    assert isinstance(image, Image.Image) and image.size == (128, 32)


def test_folders_of_frames(tmp_path, said):
    for name in ("walk/x", "walk/y", "run/z"):
        write_frames(tmp_path / name)
    source = open_source(str(tmp_path), clips=True).train
    assert source.classes == ["run", "walk"] and source.labels.tolist() == [0, 1, 1]
    assert fifth_of(source, 2) == 4 and "3 folders of numbered images" in said[0]
    assert number_of(_rgb(source.open(0))) == 2
    # Without clips, they are images as ever.
    assert len(open_source(str(tmp_path)).train) == 15


def _rgb(image):
    return np.asarray(image.convert("RGB"))


def test_images_are_no_videos(tmp_path):
    images = write_images(tmp_path, classes=1, per_class=2)
    (images / "class_0" / "cover.png").write_bytes((images / "class_0" / "000.png").read_bytes())
    for data in (str(images), str(images / "class_0"), "demo"):
        with pytest.raises(
            UserError, match="images, not videos: name videos.*, or pre-train on images"
        ):
            open_source(data, clips=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no videos in this folder"):
        open_source(str(tmp_path / "empty"), clips=True)


def test_images_beside_videos_are_passed_over(tmp_path, clip, said):
    put(tmp_path, clip, "1.mp4", "2.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    assert len(open_source(str(tmp_path), clips=True).train) == 2
    assert "passed over: 1 .png" in said[0]
    said.clear()
    assert len(open_source(str(tmp_path)).train) == 1
    assert "passed over: 2 .mp4" in said[0]


def test_gifs_are_videos_where_clips_are_wanted(tmp_path):
    write_video(tmp_path / "a.gif", frames=6)
    assert fifth_of(open_source(str(tmp_path), clips=True).train, 0) == 4
    assert len(open_source(str(tmp_path)).train) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a.mp4 10\nmy b.mp4 9\n",
        "a.mp4,10\nmy b.mp4,9\n",
        '"path","label"\n"a.mp4","10"\n"my b.mp4","9"\n',
        "a.mp4;10\nmy b.mp4;9\n",
        "a.mp4\t10\nmy b.mp4\t9\n",
        "a.mp4 12 10\nmy b.mp4 12 9\n",
        "path,label,split\na.mp4,10,train\nmy b.mp4,9,test\n",
        "label;start;video_path\n10;0;a.mp4\n9;1;my b.mp4\n",
    ],
)
def test_lists(tmp_path, clip, text):
    put(tmp_path, clip, "a.mp4", "my b.mp4")
    (tmp_path / "list.csv").write_text(text)
    for clips in (True, False):
        source = open_source(str(tmp_path / "list.csv"), clips=clips).train
        assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0]
    assert fifth_of(open_source(str(tmp_path / "list.csv"), clips=True).train, 1) == 4


def test_lists_of_folders_of_frames(tmp_path):
    write_frames(tmp_path / "100218")
    (tmp_path / "list.txt").write_text("100218 5 Pushing something\n")
    with pytest.raises(UserError, match="line 1: no such video"):  # a label of two words needs ;
        open_source(str(tmp_path / "list.txt"), clips=True)
    (tmp_path / "list.txt").write_text("100218;Pushing something\n")
    source = open_source(str(tmp_path / "list.txt"), clips=True).train
    assert source.classes == ["Pushing something"] and fifth_of(source, 0) == 4


def test_annotations_of_kinetics_and_something_something(tmp_path, clip, said):
    put(tmp_path, clip, "train/-ab_000007_000017.mp4", "20bn/78687.webm")
    (tmp_path / "k.csv").write_text(
        'label,youtube_id,time_start,time_end,split\n"playing, chess",-ab,7,17,train\n'
        "gone,xyz,1,11,train\n"
    )
    source = open_source(str(tmp_path / "k.csv"), clips=True).train
    assert source.classes == ["playing, chess"] and fifth_of(source, 0) == 4
    assert "1 of 2 videos are missing" in said[0]
    entry = {"id": "78687", "label": "holding a cup", "template": "Holding [something]"}
    (tmp_path / "s.json").write_text(json.dumps([entry]))
    assert open_source(str(tmp_path / "s.json"), clips=True).train.classes == ["Holding something"]
    for text in ("{}", "[1]", "nonsense"):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(UserError, match="s.json"):
            open_source(str(tmp_path / "s.json"), clips=True)


def test_tables(tmp_path, clip):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"video": {"bytes": clip, "path": "a.mp4"}, "label": i} for i in (1, 0)]
    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), str(file))
    for clips in (True, False):
        source = open_source(str(tmp_path), clips=clips).train
        assert source.labels.tolist() == [1, 0] and fifth_of(source, 0) == 4
        assert source.open(0).size == (128, 32)
    rows = [{"image": {"bytes": b"", "path": "a.png"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), str(file))
    with pytest.raises(UserError, match="images, not videos"):
        open_source(str(file), clips=True)


def test_broken_videos_are_named_and_counted(tmp_path, clip):
    from hpm.data.loader import evaluation_batches

    put(tmp_path, clip, "1.mp4", "3.mp4")
    (tmp_path / "2.mp4").write_bytes(clip[: len(clip) // 2])
    source = open_source(str(tmp_path), clips=True).train
    (batch,) = evaluation_batches(source, (16, 16), 3, 4, sampling=ClipSampling(2, 2))
    assert batch.indices.tolist() == [0, 2] and batch.images.shape == (2, 3, 2, 16, 16)
    said = []
    unreadable = UnreadableImages(source, share=0.5)
    unreadable.add(batch.unreadable)
    unreadable.check(said.append)
    assert len(said) == 1 and "2.mp4" in said[0]


def test_a_missing_library_is_named(tmp_path, clip, monkeypatch):
    put(tmp_path, clip, "1.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs av: pip install 'hpm-vision\[video\]'"):
        open_source(str(tmp_path), clips=True)


def test_the_masks_of_demo_video_are_those_of_its_frames():
    source = open_source("demo-video", clips=True).test
    sampling = ClipSampling(3, 5)
    masks = clip_mask(Subset(source, np.array([7])), 0, sampling)
    assert masks.shape == (3, 64, 64) and masks.any((1, 2)).all()
    assert (object_mask(source, 7) == clip_mask(source, 7, ClipSampling(1, 1))[0]).all()
    assert clip_mask(open_source("demo").train, 0, sampling) is None


def test_videos_of_a_long_list_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "MOST_CHECKED", 10)
    for number in range(50):
        (tmp_path / f"a video {number}.mp4").touch()
    (tmp_path / "frames").mkdir()
    rows = [f"a video {number}.mp4 {number % 3}" for number in range(50)]
    (tmp_path / "list.txt").write_text("\n".join([*rows, "frames 12 2"]))
    asked, exists = [], os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or exists(path))
    files, labels = lists.read_video_list(tmp_path / "list.txt")
    assert len(asked) < 20
    assert files == [str(tmp_path / row[: row.rindex(" ")]) for row in rows] + [
        str(tmp_path / "frames")
    ]
    assert labels == [str(number % 3) for number in range(50)] + ["2"]
    (tmp_path / "list.txt").write_text("\n".join(f"gone_{number}.mp4" for number in range(50)))
    with pytest.raises(UserError, match="no such video: gone_0.mp4"):
        lists.read_video_list(tmp_path / "list.txt")

"""Sources of images: folder, list file, parquet, Arrow, the built-in demo, or the user's own. Those
of videos are in `data/video/sources.py`."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import UserError, one_line
from hpm.core.plugins import find_plugin, installed_plugins
from hpm.data.arrays import Opened
from hpm.data.contract import SOURCE_MEMBERS, Source, Splits
from hpm.data.demo_sources import DemoSource, DemoVideos
from hpm.data.folders import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    described,
    files_below,
    find_images,
    images_of,
    labels_by_folder,
    subfolders,
)
from hpm.data.given import given
from hpm.data.hugging_face import is_hub, open_hub
from hpm.data.inspection import any_deep
from hpm.data.joined import join, several
from hpm.data.lists import read_list
from hpm.data.litdata import LitDataSource, is_litdata
from hpm.data.notes import say_once
from hpm.data.opening import open_image
from hpm.data.paths import Files
from hpm.data.split_names import (
    TEST_NAMES,
    TRAIN_NAMES,
    test_files,
    train_and_test,
    training_files,
)
from hpm.data.streams.archives import Archives
from hpm.data.streams.opening import open_stream
from hpm.data.streams.stream import STREAM_MEMBERS, Stream
from hpm.data.streams.transport import is_remote
from hpm.data.tables import ArrowSource, ParquetSource, saved_splits
from hpm.data.tars import TarSource
from hpm.data.video.clip import Video
from hpm.data.video.lists import is_video_list
from hpm.data.video.sampling import ClipSampling
from hpm.data.video.sources import (
    CLIP_SUFFIXES,
    VideoFiles,
    holds_videos,
    video_folder,
    video_list,
)

PREPARING = "prepare.json"  # of `hpm prepare`: what it makes, and of what
ENTRY_POINTS = "hpm.sources"  # functions without arguments that return a Source or Splits


def open_source(data: str, trusted: bool = True, clips: bool = False) -> Splits:
    """Open a data set.

    Args:
        data: a folder, list file, parquet file or folder, Arrow or LitData folder, one image or
            video, `hf://user/name`, `demo` or `demo-video`; otherwise the name of an entry point of
            the group `hpm.sources`, or `module:function`. Several, separated by commas, are read
            as one.
        trusted: whether the user gave the name. If it comes from a file, no code that it names is
            imported, and nothing is downloaded.
        clips: whether clips are wanted, so that a GIF and a folder of numbered images are videos.
            Otherwise they are images, and of videos one frame at a time is used.

    Raises UserError if there are no images, or no videos where clips are wanted, or if it is a
    stream.
    """
    opened = open_data(data, trusted, clips)
    if isinstance(opened, Archives) and not any(map(is_remote, opened.shards)):
        return Splits(TarSource(data, opened.shards))
    if not isinstance(opened, Splits):
        raise UserError(
            f"{data} is a stream, which only hpm pretrain reads: pass images that are read in any "
            "order, such as a folder or parquet"
        )
    return opened


def open_data(
    data: str, trusted: bool = True, clips: bool = False, in_order: bool = False
) -> Splits | Stream:
    """`open_source` for who also takes a stream. in_order: read what can be read in any order as a
    stream, too."""
    splits = _open(data, trusted, clips, in_order)
    if not isinstance(splits, Splits):
        if clips:
            raise UserError(f"{data}: streams are of images, not of videos: pass --frames 1")
        return splits
    if clips and not holds_videos(splits.train):
        such = ", such as demo-video" if data == "demo" else ""
        raise UserError(
            f"{data}: images, not videos: name videos{such}, or pre-train on images with --frames 1"
        )
    return splits


def _open(data: str, trusted: bool, clips: bool, in_order: bool) -> Splits | Stream:
    if len(names := several(data)) > 1:
        return join({name: _open(name, trusted, clips, in_order) for name in names})
    if own := given(data):
        return Splits(own)
    if stream := open_stream(data, trusted, in_order):
        return stream
    if is_hub(data):
        return Splits(*open_hub(data, trusted))
    if data == "demo":
        return Splits(DemoSource("train"), DemoSource("test"))
    if data == "demo-video":
        return Splits(DemoVideos("train"), DemoVideos("test"))
    path = Path(data).expanduser()
    if path.is_dir():
        return _open_folder(path, clips)
    if not path.exists():
        dotted = re.fullmatch(r"[\w.]+:[\w.]+", data)
        if trusted and (dotted or data in installed_plugins(ENTRY_POINTS)):
            return _open_own(data)
        raise UserError(
            f"{data}: no such folder or file; name a folder of images or videos, a list file, "
            "parquet, archives such as 'shards/*.tar', hf://user/name, demo or demo-video"
        )
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Splits(ParquetSource(str(path), [path]))
    if suffix in (CLIP_SUFFIXES if clips else VIDEO_SUFFIXES):
        return Splits(VideoFiles(str(path), [path], root=path.parent))
    if suffix in IMAGE_SUFFIXES:
        return Splits(FileSource(str(path), [path], root=path.parent))
    return Splits(video_list(path) if clips or is_video_list(path) else _open_list(path))


def _open_own(data: str) -> Splits | Stream:
    """Call the user's function. Raises UserError if it fails or returns something else."""
    make = find_plugin("data", data, ENTRY_POINTS, ("demo", "demo-video"))
    if not callable(make):
        raise UserError(f"data is '{data}': it is not a function")
    try:
        made = make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data {data} failed: {type(error).__name__}: {one_line(error)}") from error
    if all(hasattr(made, name) for name in STREAM_MEMBERS):
        if not len(made.shards):
            raise UserError(f"data {data} has no shards")
        return made
    sources: list[Any] = [made.train, made.test] if isinstance(made, Splits) else [made]
    for source in sources:
        missing = [name for name in SOURCE_MEMBERS if not hasattr(source, name)]
        if source is not None and missing:
            raise UserError(
                f"data {data} must return a Source, Splits or a Stream, but "
                f"{type(source).__name__} lacks {', '.join(missing)}"
            )
        if source is not None and len(source) == 0:
            raise UserError(f"data {data} has no images")
    return Splits(*sources)


class FileSource(Files):
    """Image files."""

    def open(self, index: int) -> Opened:
        return open_image(self.paths[index])

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))


class Subset:
    """Some images of another source, in the given order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.name = source.name
        self.holds_videos = holds_videos(source)

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @cached_property  # some sources have to read all images for it
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Opened:
        return self.source.open(int(self.indices[index]))

    def open_video(self, index: int) -> Video:
        return self.source.open_video(int(self.indices[index]))  # type: ignore[attr-defined]

    def read(self, index: int) -> bytes | None:
        return self.source.read(int(self.indices[index]))

    def is_deep(self) -> bool:
        return self.source.is_deep()  # of the whole source, so that all its parts agree

    def path(self, index: int) -> str:
        return self.source.path(int(self.indices[index]))


def object_mask(source: Source, index: int) -> np.ndarray | None:
    """bool [H W], True on the objects of an image; None if the source has no masks."""
    if isinstance(source, Subset):
        return object_mask(source.source, int(source.indices[index]))
    return source.mask(index) if isinstance(source, DemoSource | DemoVideos) else None


def clip_mask(source: Source, index: int, sampling: ClipSampling) -> np.ndarray | None:
    """bool [T H W], True on the objects of the clip in the middle of a video; None if the source
    has no masks."""
    if isinstance(source, Subset):
        return clip_mask(source.source, int(source.indices[index]), sampling)
    return source.clip_mask(index, sampling) if isinstance(source, DemoVideos) else None


def hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Split a source at random: (the rest, `count` images)."""
    order = np.random.default_rng([seed, len(source)]).permutation(len(source))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def _open_folder(path: Path, clips: bool) -> Splits:
    if (path / "dataset_dict.json").exists():
        return _open_saved(path)
    if (path / PREPARING).exists():
        raise UserError(f"{path}: hpm prepare has not finished; run the same command again")
    if (path / "state.json").exists():
        return Splits(ArrowSource(str(path), path))
    if splits := _open_litdata(path):
        return splits
    files = files_below(path, ".parquet")
    if files:
        train, test = training_files(files, path), test_files(files, path)
        if not train:
            return Splits(ParquetSource(str(path), files))
        return Splits(
            ParquetSource(f"{path} (train)", train),
            ParquetSource(f"{path} (test)", test) if test else None,
        )
    path = images_of(path)
    inside = {p.name.lower(): p for p in subfolders(path)}
    if any((path / "annotations").glob("*.json")):  # COCO's names: train2017, val2017
        inside = {name.rstrip("0123456789"): p for name, p in inside.items()}
        inside.pop("annotations")
    train_folder = next((inside[n] for n in TRAIN_NAMES if n in inside), None)
    test_folder = next((inside[n] for n in TEST_NAMES if n in inside), None)
    # A folder `train` beside folders that are no splits may be a class (trains).
    if train_folder and (test_folder or len(inside) == 1):
        return Splits(
            _files_below(train_folder, clips),
            _files_below(test_folder, clips) if test_folder else None,
        )
    return Splits(_files_below(path, clips))


def _open_litdata(path: Path) -> Splits | None:
    """A folder of LitData, or splits of such; None if it is none."""
    if is_litdata(path):
        return Splits(LitDataSource(path))
    below = [p for p in subfolders(path) if is_litdata(p)]
    train, test = train_and_test(p.name for p in below)
    if train is None:
        return None
    return Splits(LitDataSource(path / train), LitDataSource(path / test) if test else None)


def _open_saved(path: Path) -> Splits:
    """Splits saved by Hugging Face's `datasets` or `hpm prepare`."""
    train, test = saved_splits(path)
    return Splits(
        ArrowSource(f"{path} (train)", path / train),
        ArrowSource(f"{path} (test)", path / test) if test else None,
    )


def _files_below(root: Path, clips: bool) -> FileSource | VideoFiles:
    """All images below `root`, or all videos, labelled by first-level folder if every one is in
    one."""
    if clips:
        return video_folder(root, clips)
    root = images_of(root)
    files, others = find_images(root)
    if not files and any(suffix in VIDEO_SUFFIXES for suffix in others):
        return video_folder(root, clips)
    if not files:
        looked_for = f" (looked for {' '.join(IMAGE_SUFFIXES)})"
        passed_over = f", but {described(others)}" if others else looked_for
        raise UserError(f"{root}: no images in this folder or below it{passed_over}")
    if others:
        say_once(f"{root}: passed over: {described(others)}")
    paths = (os.path.join(root, file) for file in files)
    return FileSource(str(root), paths, *labels_by_folder(files), root)


def _open_list(path: Path) -> FileSource:
    return FileSource(str(path), *read_list(path), path.parent)

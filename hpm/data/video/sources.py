"""Sources of videos: files and folders of frames."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, counted
from hpm.data.arrays import Opened
from hpm.data.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_files
from hpm.data.inspection import any_deep
from hpm.data.lists import labels_of
from hpm.data.notes import say_once
from hpm.data.paths import Files
from hpm.data.video.clip import Video, middle_frame
from hpm.data.video.decoding import pyav
from hpm.data.video.frames import FrameFolder, frame_number
from hpm.data.video.lists import read_video_list
from hpm.data.video.opening import open_video
from hpm.data.video.torchcodec import decoding_device

CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".gif")
FEWEST_FRAMES = 2  # numbered images that make a folder a video


class VideoFiles(Files):
    """Video files and folders of frames.

    As a source of images, the frame in the middle of each.
    """

    holds_videos = True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        if any(not os.path.isdir(path) for path in self.paths[:1]):
            pyav()  # a missing library is an error now, and not one of each video
            decoding_device()

    def open_video(self, index: int) -> Video:
        """Raises OSError or UnreadableImage."""
        path = self.paths[index]
        return FrameFolder(path) if os.path.isdir(path) else open_video(path)

    def open(self, index: int) -> Opened:
        path = self.paths[index]
        if os.path.isdir(path):
            frames = FrameFolder(path)
            return frames.open(frames.length // 2)
        return middle_frame(open_video(path))

    def read(self, index: int) -> bytes | None:
        path = Path(self.paths[index])
        return None if path.is_dir() else path.read_bytes()

    def is_deep(self) -> bool:
        return os.path.isdir(self.paths[0]) and any_deep(self.open, len(self))


def holds_videos(source: Any) -> bool:
    """Whether a source (or that of a subset) has `open_video`, which opens the video of an index.
    A source of one's own says so by an attribute `holds_videos`."""
    return bool(getattr(source, "holds_videos", False))


def video_folder(root: Path, clips: bool) -> VideoFiles:
    """All videos below `root`, labelled by first-level folder if every one is in one.

    Where there are no video files, folders of at least two numbered images are videos. Without
    `clips`, frames are wanted: image files are no videos then, nor are GIF. Raises UserError.
    """
    suffixes = CLIP_SUFFIXES if clips else VIDEO_SUFFIXES
    files, images = find_files(root, suffixes, IMAGE_SUFFIXES)
    if files and images:
        say_once(f"{root}: passed over: {_counts(images)}: images beside videos are not used")
    if not files and images:
        files = _frame_folders(root)
    if not files:
        looked_for = " ".join(CLIP_SUFFIXES)
        raise UserError(
            f"{root}: no videos in this folder or below it (looked for {looked_for}, and for "
            "folders of numbered images)"
        )
    paths = [os.path.join(root, file) for file in files]
    tops = [file.split(os.sep)[0] if os.sep in file else None for file in files]
    if None in tops:
        return VideoFiles(str(root), paths, root=root)
    return VideoFiles(str(root), paths, *labels_of(root, tops), root)


def video_list(path: Path) -> VideoFiles:
    """The videos of a list; see read_video_list."""
    paths, names = read_video_list(path)
    return VideoFiles(str(path), paths, *labels_of(path, names), path.parent)


def _frame_folders(root: Path) -> list[str]:
    """Relative paths of the folders that hold numbered images. Raises UserError if images lie
    outside of such folders."""
    images, _ = find_files(root, IMAGE_SUFFIXES, ())
    folders: dict[str, list[str]] = {}
    for image in images:
        folder, name = os.path.split(image)
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        numbers = {frame_number(name) for name in names}
        if not folder or len(names) < FEWEST_FRAMES or None in numbers or len(numbers) < len(names):
            raise UserError(
                f"{root}: images, not videos: name videos (the numbered frames of each may be in a "
                "folder of its own), or pre-train on images with --frames 1"
            )
    say_once(f"{root}: {counted(len(folders), 'folder')} of numbered images, each read as a video")
    return sorted(folders)


def _counts(others: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))

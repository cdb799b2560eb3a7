"""Images in uncompressed tar archives on a disk, read in any order. Streams of archives are in
`data/streams/archives.py`."""

from __future__ import annotations

import io
import posixpath
import tarfile
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from hpm.core.errors import UserError, one_line
from hpm.data.arrays import Opened, UnreadableImage
from hpm.data.folders import IMAGE_SUFFIXES, labels_by_folder
from hpm.data.inspection import any_deep
from hpm.data.opening import open_image
from hpm.data.paths import Paths
from hpm.data.streams.archives import DAMAGED, LARGEST, Member, image_kind


class TarSource:
    """The images of archives, labelled by first-level folder if every one is in one. Raises
    UserError if an archive is damaged or compressed, or if there are no images."""

    def __init__(self, name: str, archives: Sequence[str]):
        self.name = name
        self.archives = list(archives)
        places, names = array("q"), []  # the headers themselves take ten times the memory
        for number, path in enumerate(archives):
            for member in _members(path):
                places.extend((number, member.offset_data, member.size))
                names.append(posixpath.normpath(member.name))
        if not names:
            raise UserError(f"{name}: no images (looked for {' '.join(IMAGE_SUFFIXES)})")
        self._archive, self._start, self._size = np.array(places).reshape(-1, 3).T
        self.members = Paths(names)
        self.labels, self.classes = labels_by_folder(names, "/")

    def __len__(self) -> int:
        return len(self.members)

    def open(self, index: int) -> Opened:
        return open_image(io.BytesIO(self.read(index)))

    def read(self, index: int) -> bytes:
        if self._size[index] > LARGEST:
            raise UnreadableImage(f"{self._size[index]} bytes, more than {LARGEST}")
        with open(self.archives[self._archive[index]], "rb") as file:
            file.seek(int(self._start[index]))
            return file.read(int(self._size[index]))

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        return f"{self.archives[self._archive[index]]}/{self.members[index]}"


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """The headers of the images of an archive, in order."""
    try:
        with tarfile.open(path, "r:", tarinfo=Member) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it keeps all it reads
                if image_kind(path, member) in IMAGE_SUFFIXES and not member.issparse():
                    yield member
    except DAMAGED as error:
        if path.lower().endswith(".tar"):
            raise UserError(f"{path}: not a whole tar archive ({one_line(error, 200)})") from None
        raise UserError(
            f"{path} is compressed, and only hpm pretrain reads such archives: make it a plain .tar"
        ) from None

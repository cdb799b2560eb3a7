"""WebDataset: images in tar archives. Every image file of an archive is a sample; its other files
(labels, captions) are passed over.

The `webdataset` package is not used: it opens addresses by running shell commands, and its loading
cannot be resumed at an image.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hpm.core.errors import UserError, counted, one_line
from hpm.data.folders import IMAGE_SUFFIXES
from hpm.data.streams.shards import find_shards
from hpm.data.streams.stream import Entry
from hpm.data.streams.transport import opened

LARGEST = 1 << 28  # bytes of an image file
LARGEST_HEADER = 1 << 20  # bytes of a long name or of further attributes, which tarfile loads
SKIPPED = 1 << 20  # bytes at once
DAMAGED = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


class Archives:
    """Archives as a stream. Raises UserError if there are none."""

    repeatable = True

    def __init__(self, data: str):
        self.name = data
        self.shards: Sequence[str] = find_shards(data)

    def read(self, shard: int) -> Iterator[Entry]:
        yield from images_of(self.shards[shard])


def images_of(url: str) -> Iterator[Entry]:
    """The images of an archive, in order. Raises UserError if it is damaged or has none."""
    images, others = 0, Counter[str]()
    with opened(url) as file:
        try:
            forward = _uncompressed(Forward(file.read))
            with tarfile.open(fileobj=forward, mode="r:", tarinfo=Member) as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    archive.members = []  # it keeps all that it has read
                    kind = image_kind(url, member)
                    if kind in IMAGE_SUFFIXES:
                        entry = _entry(forward, member)
                        images += 1
                        yield entry
                    elif kind:
                        others[kind] += 1
        except UserError:
            raise
        except DAMAGED as error:
            if not images and not others and "truncated" not in str(error):
                raise UserError(f"{url}: not a tar archive ({one_line(error, 200)})") from None
            raise UserError(
                f"{url}: the archive is damaged or cut off after {counted(images, 'image')} "
                f"({one_line(error, 200)}): write it again, or leave it out"
            ) from None
    if not images:
        found = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        raise UserError(
            f"{url}: the archive has no images (looked for {' '.join(IMAGE_SUFFIXES)})"
            + (f", but {found}" if found else "")
        )


class Forward:
    """A file that is read from beginning to end, as what tarfile and decompressors read. The modes
    of tarfile for streams (`r|`) copy all bytes several times."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read, self._at, self._ahead = read, 0, b""

    def read(self, size: int) -> bytes:
        """`size` bytes, or all that are left."""
        parts, left = [], size
        if self._ahead:
            parts, self._ahead = [self._ahead[:left]], self._ahead[left:]
            left -= len(parts[0])
        while left > 0 and (part := self._read(left)):
            parts.append(part)
            left -= len(part)
        self._at += size - left
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peek(self, size: int) -> bytes:
        """The next bytes, which `read` returns again. Only at the beginning."""
        self._ahead = self.read(size)
        self._at = 0
        return self._ahead

    def tell(self) -> int:
        return self._at

    def seek(self, place: int) -> int:
        """Skip what lies before `place`; what is missing is missed by the next `read`."""
        if place < self._at:
            raise tarfile.ReadError("a member before the last one")
        while self._at < place and self.read(min(place - self._at, SKIPPED)):
            pass
        return self._at


def _uncompressed(file: Forward) -> Forward:
    """The file itself, or what it decompresses to."""
    head = file.peek(6)
    source: Any = file  # the libraries ask for more than they use
    if head.startswith(b"\x1f\x8b"):
        return Forward(gzip.GzipFile(fileobj=source, mode="rb").read)
    if head.startswith(b"BZh"):
        return Forward(bz2.BZ2File(source, "rb").read)
    if head == b"\xfd7zXZ\0":
        return Forward(lzma.LZMAFile(source, "rb").read)
    return file


def image_kind(url: str, member: tarfile.TarInfo) -> str:
    """Suffix of a file; empty for what is no file, or hidden. Raises UserError for a path that
    leads out of the archive. Nothing is ever extracted to a disk, but who makes such a path means
    harm, or has made a mistake that other tools will suffer from."""
    parts = member.name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts:
        raise UserError(f"{url}: the path {member.name[:100]!r} leads out of the archive")
    if not member.isfile() or parts[-1].startswith("."):
        return ""
    return posixpath.splitext(parts[-1])[1].lower() or "without suffix"


def _entry(file: Forward, member: tarfile.TarInfo) -> Entry:
    """The image that a header announces, of which the file is at the first byte."""
    if member.size > LARGEST:
        return Entry(member.name, problem=f"{member.size} bytes, more than {LARGEST}")
    if member.issparse():
        return Entry(member.name, problem="stored as a sparse file")
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return Entry(member.name, data)


class Member(tarfile.TarInfo):
    """A header that must be whole. tarfile takes an archive that breaks off between two files, or
    has a damaged header there, for one that ends."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        member = super().frombuf(buf, encoding, errors)
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        long_names = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if member.type in extended + long_names and member.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("truncated: no end of the archive") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(one_line(error)) from None

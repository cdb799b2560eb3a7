"""Features of images with the paths and labels of the images, and the files that hold them.

The files are parquet, .npy, .safetensors, and folders of parquet files. All record how the features
were made (`Embeddings.about`), and the table of the images: parquet as columns, the others in a CSV
file beside them.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.core.files import read_tensors, write_atomically, write_tensors, write_text
from hpm.evals.image_table import read_images, write_images

KIND = "hpm features"
ABOUT_FILE = "embed.json"  # in a folder of shards


@dataclass
class Embeddings:
    """Features of images: row i of every array belongs to the same image.

    paths: of the images, as text.
    ids: position of each image in the data that was embedded.
    features: pooled features, one row per image.
    labels: class names as text, "" where an image has none; None for data without labels.
    splits: `train` or `test`; None for data without a test split.
    patches: features of the patches, if they were asked for.
    about: how the features were made: weights, pooling, preprocessing, data.
    """

    paths: Sequence[str]
    ids: Int[np.ndarray, " images"]
    features: Float[np.ndarray, "images dim"]
    labels: Shaped[np.ndarray, " images"] | None = None
    splits: Shaped[np.ndarray, " images"] | None = None
    patches: Float[np.ndarray, "images patches dim"] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        patches = "" if self.patches is None else f", patches {list(self.patches.shape)}"
        return (
            f"Embeddings({len(self):,} images, features {list(self.features.shape)} "
            f"{self.features.dtype}{patches}, of {self.about.get('run')} on "
            f"{self.about.get('data')})"
        )

    @staticmethod
    def load(path: str | Path, patches: bool = False) -> Embeddings:
        """Read what `hpm embed` wrote, with the features of patches only if asked for.

        Raises UserError if the path holds no features.
        """
        path = Path(path).expanduser()
        return format_of(path).read(path, patches)

    @staticmethod
    def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
        """The rows of all parts, in order."""
        first = parts[0]

        def joined(name: str) -> Any:
            if getattr(first, name) is None:
                return None
            return np.concatenate([getattr(part, name) for part in parts])

        return Embeddings(
            [path for part in parts for path in part.paths],
            ids=joined("ids"),
            features=joined("features"),
            labels=joined("labels"),
            splits=joined("splits"),
            patches=joined("patches"),
            about=first.about,
        )


class Format(ABC):
    """A kind of file that embeddings are written to and read from."""

    @abstractmethod
    def write(self, file: Path, about: dict[str, Any], parts: Iterable[Embeddings]) -> None:
        """Write all rows, `about["rows"]` in number. The parts may be read several times."""

    @abstractmethod
    def read_about(self, path: Path) -> dict[str, Any]:
        """How the features were made. Raises UserError if the path holds no features."""

    @abstractmethod
    def read(self, path: Path, patches: bool = False) -> Embeddings:
        """Read all rows. Raises UserError if the path holds no features."""

    def files(self, path: Path) -> list[Path]:
        """What is written for a path."""
        return [path]


class Parquet(Format):
    """One parquet file: columns index, path, label, split, features and patches."""

    def write(self, file: Path, about: dict[str, Any], parts: Iterable[Embeddings]) -> None:
        arrow = need("pyarrow", "parquet", "a .parquet file")
        parquet = need("pyarrow.parquet", "parquet", "a .parquet file")

        def write(temporary: Path) -> None:
            writer = None
            for part in parts:
                table = _as_table(arrow, part, about)
                if writer is None:
                    writer = parquet.ParquetWriter(
                        str(temporary), table.schema, use_dictionary=["label", "split"]
                    )
                writer.write_table(table, row_group_size=max(1, len(part)))
            assert writer is not None
            writer.close()

        write_atomically(file, write)

    def read_about(self, path: Path) -> dict[str, Any]:
        arrow = need("pyarrow", "parquet", "a .parquet file")
        parquet = need("pyarrow.parquet", "parquet", "a .parquet file")
        try:
            metadata = parquet.read_schema(path).metadata or {}
            return _checked(path, json.loads(metadata.get(b"hpm", b"{}")))
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise _refused(path, error) from None

    def read(self, path: Path, patches: bool = False) -> Embeddings:
        about = self.read_about(path)
        parquet = need("pyarrow.parquet", "parquet", "a .parquet file")
        has_patches = patches and about.get("patches")
        unwanted = () if has_patches else ("patches",)
        names = [name for name in parquet.read_schema(path).names if name not in unwanted]
        table = parquet.read_table(path, columns=names, memory_map=True, partitioning=None)

        def text(name: str) -> np.ndarray | None:
            if name not in names:
                return None
            return np.array([value or "" for value in table[name].to_pylist()], dtype=str)

        def numbers(name: str) -> np.ndarray:
            chunks = [chunk.flatten().to_numpy() for chunk in table[name].chunks]
            return np.concatenate(chunks).reshape(len(table), *about[name])

        return Embeddings(
            table["path"].to_pylist(),
            table["index"].to_numpy(),
            numbers("features"),
            text("label"),
            text("split"),
            numbers("patches") if has_patches else None,
            about,
        )


class Npy(Format):
    """FILE.npy with the features, FILE.csv with the images, FILE.json, and FILE_patches.npy."""

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".csv"), path.with_suffix(".json"), _patches_file(path)]

    def write(self, file: Path, about: dict[str, Any], parts: Iterable[Embeddings]) -> None:
        if about["patches"]:
            _write_array(_patches_file(file), parts, "patches", about)
        _write_images(file.with_suffix(".csv"), parts)
        write_text(file.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
        _write_array(file, parts, "features", about)  # last: it tells that all is there

    def read_about(self, path: Path) -> dict[str, Any]:
        try:
            return _checked(path, json.loads(path.with_suffix(".json").read_text()))
        except (OSError, ValueError) as error:
            raise _refused(path, error) from None

    def read(self, path: Path, patches: bool = False) -> Embeddings:
        about = self.read_about(path)
        try:
            features = np.load(path, mmap_mode="r", allow_pickle=False)
            found = None
            if patches and about["patches"]:
                found = np.load(_patches_file(path), mmap_mode="r", allow_pickle=False)
            return _with_images(path, about, features, found)
        except (OSError, ValueError) as error:
            raise _refused(path, error) from None


class Safetensors(Format):
    """FILE.safetensors with `features` and `patches`, and FILE.csv with the images."""

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".csv")]

    def write(self, file: Path, about: dict[str, Any], parts: Iterable[Embeddings]) -> None:
        whole = Embeddings.concatenate(list(parts))
        _write_images(file.with_suffix(".csv"), [whole])
        arrays = {"features": whole.features, "patches": whole.patches}
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if a is not None}
        write_tensors(file, tensors, about)

    def read_about(self, path: Path) -> dict[str, Any]:
        try:
            return _checked(path, read_tensors(path, only=())[1])
        except UserError as error:
            raise _refused(path, error) from None

    def read(self, path: Path, patches: bool = False) -> Embeddings:
        about = self.read_about(path)
        wanted = ("features", "patches") if patches else ("features",)
        tensors, _ = read_tensors(path, only=wanted)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return _with_images(path, about, arrays["features"], arrays.get("patches"))


class Folder(Format):
    """A folder of parquet files, written one after the other by `hpm embed`, and embed.json."""

    def write(self, file: Path, about: dict[str, Any], parts: Iterable[Embeddings]) -> None:
        write_text(file / ABOUT_FILE, json.dumps(about, indent=2) + "\n")

    def read_about(self, path: Path) -> dict[str, Any]:
        try:
            return _checked(path, json.loads((path / ABOUT_FILE).read_text()))
        except (OSError, ValueError) as error:
            raise _refused(path, error) from None

    def read(self, path: Path, patches: bool = False) -> Embeddings:
        about = self.read_about(path)
        files = sorted(path.glob("part-*.parquet"))
        if len(files) != about["parts"]:
            raise UserError(f"{path}: hpm embed has not finished; run the same command again")
        parts = [Parquet().read(file, patches) for file in files]
        whole = Embeddings.concatenate(parts)
        whole.about = about
        return whole


FORMATS: dict[str, Format] = {".parquet": Parquet(), ".npy": Npy(), ".safetensors": Safetensors()}
FOLDER = Folder()


def format_to_write(path: Path) -> Format:
    """The format of a path by its suffix; a path without one is a folder of shards."""
    if path.is_dir() or not path.suffix:
        return FOLDER
    if path.suffix not in FORMATS:
        raise UserError(
            f"--out {path}: no format for {path.suffix}; name a {', a '.join(FORMATS)} file, or a "
            "folder"
        )
    return FORMATS[path.suffix]


def format_of(path: Path) -> Format:
    """The format of an existing path. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return FOLDER
    if path.suffix not in FORMATS:
        raise _refused(path, ValueError(f"it is none of {', '.join(FORMATS)}"))
    return FORMATS[path.suffix]


def holds_features(path: Path) -> bool:
    """Whether a path is meant as features; weights are .safetensors files or folders, too."""
    if path.suffix in (".parquet", ".npy"):
        return True
    if path.is_dir():
        return (path / ABOUT_FILE).exists()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return read_tensors(path, only=())[1].get("kind") == KIND
    except UserError:
        return False


def _as_table(arrow: Any, part: Embeddings, about: dict[str, Any]) -> Any:
    """The rows as a table of pyarrow. Patches are flat; `about` has their shape."""

    def vectors(values: np.ndarray) -> Any:
        flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
        return arrow.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))

    paths = arrow.array(list(part.paths), arrow.string())  # no type is inferred for []
    columns = {"index": arrow.array(part.ids), "path": paths}
    for name, values in (("label", part.labels), ("split", part.splits)):
        if values is not None:
            columns[name] = arrow.array([str(value) or None for value in values], arrow.string())
    columns["features"] = vectors(part.features)
    if part.patches is not None:
        columns["patches"] = vectors(part.patches)
    return arrow.table(columns).replace_schema_metadata({"hpm": json.dumps(about)})


def _write_array(file: Path, parts: Iterable[Embeddings], name: str, about: dict[str, Any]) -> None:
    def write(temporary: Path) -> None:
        shape = (about["rows"], *about[name])
        whole = np.lib.format.open_memmap(temporary, "w+", np.dtype(about["dtype"]), shape)
        start = 0
        for part in parts:
            whole[start : start + len(part)] = getattr(part, name)
            start += len(part)
        whole.flush()

    write_atomically(file, write)


def _write_images(file: Path, parts: Iterable[Embeddings]) -> None:
    write_images(file, ((part.ids, part.paths, part.labels, part.splits) for part in parts))


def _with_images(
    path: Path, about: dict[str, Any], features: np.ndarray, patches: np.ndarray | None
) -> Embeddings:
    """Features with the table of images beside them. Raises UserError if it does not fit."""
    table = path.with_suffix(".csv")
    ids, paths, labels, splits = read_images(table, path)
    if len(ids) != len(features):
        raise UserError(f"{table} has {len(ids)} rows, but {path} has {len(features)}")
    return Embeddings(paths, ids, features, labels, splits, patches, about)


def _patches_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_patches.npy")


def _checked(path: Path, about: Any) -> dict[str, Any]:
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise _refused(path, ValueError("nothing in it says how they were made"))
    return about


def _refused(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not features of hpm embed ({one_line(error, 160)})")

"""`hpm predict`: write the predictions of a fine-tuned model for a folder of images or videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hpm.commands.options import PredictConfig
from hpm.commands.predict_classes import write_classes
from hpm.commands.predict_objects import FILE as OBJECTS
from hpm.commands.predict_objects import write_objects
from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.files import new_file, write_atomically, write_text
from hpm.core.options import AnyPath, make_config
from hpm.core.progress import track
from hpm.core.random_state import random_state_kept
from hpm.data.dense import dense_batches
from hpm.data.folders import find_images
from hpm.data.joint import WholeImages
from hpm.data.palette import class_colours
from hpm.data.sources import FileSource, Source
from hpm.data.unreadable import UnreadableImages
from hpm.data.video.sources import VideoFiles, video_folder
from hpm.data.workers import num_workers
from hpm.weights.classification import ClassificationModel
from hpm.weights.detection import DetectionModel
from hpm.weights.finetuned import load_model
from hpm.weights.segmentation import SegmentationModel

Report = Callable[[str], None]


def predict(
    model: AnyPath, images: AnyPath, out: AnyPath, report: Report = print, **options: Any
) -> Path:
    """Write the predictions of a fine-tuned model for images, or for videos.

    A segmenter writes masks: PNG with a palette, each named as its image, at its size, and
    `classes.txt`. A detector writes one file in COCO's JSON (see
    `hpm.commands.predict_objects.write_objects`), a classifier one of CSV (see
    `hpm.commands.predict_classes.write_classes`).

    Args:
        model: what `hpm.load_model` takes.
        images: a folder of images, or one image file; for a classifier of clips, of videos.
        out: the folder, which is made; of a detector, a .json file or the folder of `results.json`;
            of a classifier, a .csv file or the folder of `predictions.csv`.
        options: those of `PredictConfig`.

    Returns the folder or file. Raises UserError where the model or the images are of no use.
    """
    given = {"model": model, "images": images, "out": out} | options
    return run_predict(make_config(PredictConfig, given), report)


def run_predict(config: PredictConfig, report: Report = print) -> Path:
    """Predict as configured."""
    distributed.need_one_process("predict")
    with random_state_kept():
        model = load_model(config.model).to(distributed.pick_device(config.device))
        out = Path(config.out)
        clips = isinstance(model, ClassificationModel) and model.sampling() is not None
        source = open_videos(config.images) if clips else open_images(config.images)
        return WRITERS[type(model)](model, source, out, config, report)


def open_images(images: str) -> FileSource:
    """All images below a folder, or a single image."""
    root = Path(images).expanduser()
    if root.is_file():
        return FileSource(images, [root], root=root.parent)
    if not root.is_dir():
        raise UserError(f"{images}: no such file or folder")
    found, _ = find_images(root)
    if not found:
        raise UserError(f"{images}: no images in this folder")
    return FileSource(images, [root / file for file in found], root=root)


def open_videos(videos: str) -> VideoFiles:
    """All videos below a folder, or a single video."""
    root = Path(videos).expanduser()
    if root.is_file():
        return VideoFiles(videos, [root], root=root.parent)
    if not root.is_dir():
        raise UserError(f"{videos}: no such file or folder")
    return video_folder(root, clips=True)


def write_masks(
    model: SegmentationModel, source: FileSource, out: Path, config: PredictConfig, report: Report
) -> Path:
    """Write a mask for every readable image, and the names of the classes."""
    files = _mask_files(source, out)
    views = WholeImages(model.channels, source.is_deep(), model.image_size)
    for index, image, size in readable(source, views, config, report):
        mask = model.labels(image, size).cpu().numpy()
        write_atomically(files[index], lambda file, mask=mask: write_mask(file, mask))  # type: ignore[misc]
    write_text(out / "classes.txt", "".join(f"{name}\n" for name in model.classes))
    return out


def write_results(
    model: DetectionModel, source: FileSource, out: Path, config: PredictConfig, report: Report
) -> Path:
    """Write the objects in all readable images into one file."""
    file, side = new_file(out, OBJECTS), model.image_size
    views = WholeImages(model.channels, source.is_deep(), side, longest=side)
    write_objects(model, source, readable(source, views, config, report), file)
    return file


def readable(
    source: Source, views: WholeImages, config: PredictConfig, report: Report
) -> Iterator[tuple[int, Any, tuple[int, int]]]:
    """Yield (index, loaded image, its size in the file) of every readable image, and report the
    others."""
    unreadable = UnreadableImages(source, config.max_unreadable)
    batches = dense_batches(source, views, 1, num_workers(config.workers))
    for batch in track(batches, "predicting", total=len(source)):
        unreadable.add(batch.unreadable)
        for index, image, size in zip(batch.indices, batch.images, batch.targets, strict=True):
            yield int(index), image, size
    unreadable.check(report)


def write_mask(file: Path, labels: UInt8[np.ndarray, "height width"]) -> None:
    """Write labels as a PNG with the palette of Pascal VOC."""
    image = Image.fromarray(labels)
    image.putpalette(class_colours(256).tobytes())
    image.save(file, format="PNG")


def _mask_files(source: FileSource, out: Path) -> list[Path]:
    """The mask file of each image. Subfolders of `out` are those of the images."""
    files: dict[Path, str] = {}
    for index in range(len(source)):
        path = Path(source.path(index))
        file = out / path.relative_to(source.root).with_suffix(".png")
        if file in files:
            raise UserError(
                f"{path} and {files[file]} would have one mask, {file}: rename one of them"
            )
        if file.exists():
            raise UserError(f"{file} exists: choose another --out")
        files[file] = str(path)
    return list(files)


WRITERS: dict[type, Callable[..., Path]] = {
    SegmentationModel: write_masks,
    DetectionModel: write_results,
    ClassificationModel: write_classes,
}

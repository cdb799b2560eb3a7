"""`hpm export`: write a backbone for other libraries, and check it with them before publishing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpm.commands.export_segmenter import export_segmenter
from hpm.commands.model_card import add_card, latest_figure
from hpm.commands.options import ExportConfig
from hpm.core import hub
from hpm.core.errors import UserError
from hpm.core.files import disk_error
from hpm.core.options import AnyPath, make_config
from hpm.core.random_state import random_state_kept
from hpm.weights.classification import ClassificationModel
from hpm.weights.export_format import ExportSource, WritableFormat
from hpm.weights.finetuned import is_finetuned, load_model
from hpm.weights.formats import (
    WRITABLE,
    WRITABLE_CLASSIFIERS,
    WRITABLE_OF_CLIPS,
    WRITABLE_OF_CLIPS_WITH_DECODER,
    WRITABLE_WITH_DECODER,
)
from hpm.weights.resolve import Trained, load
from hpm.weights.segmentation import SegmentationModel

# Largest difference between outputs in float32, relative for outputs larger than 1.
TOLERANCE = 1e-5
BATCHES = (2, 1)
# Options that fine-tuned models do not have: their weights and pooling are fixed, and their folder
# has neither decoder nor figures.
OF_BACKBONES = ("teacher", "pool", "with_decoder", "with_figure")

Report = Callable[[str], None]


def export(run: AnyPath, to: str, out: AnyPath, report: Report = print, **options: Any) -> Path:
    """Write a backbone for timm, hf, torchvision, onnx or safetensors, and check it there.

    Args:
        run: run folder, checkpoint, backbone file, another library's weights (see
            `hpm.weights.resolve.resolve`), or a fine-tuned segmenter or classifier (see
            `hpm.load_model`).
        to: the format.
        out: file to write (of hf a folder), which must not be there yet.
        report: is called with the largest difference and with the lines that load it.
        options: those of `hpm.commands.options.ExportConfig`.

    Returns what was written. Raises UserError where it cannot be expressed, or where the other
    library does not give the same outputs; nothing is then left behind.
    """
    given = {"run": run, "to": to, "out": out} | options
    return run_export(make_config(ExportConfig, given), report)


def run_export(config: ExportConfig, report: Report = print) -> Path:
    """Export as configured."""
    with random_state_kept():
        if is_finetuned(config.run):
            return _export_finetuned(config, report)
        _check(config, Path(config.out), _format(config))
        source = _source(config, report)
        return _export(config, source, _format(config, source.of_clips), report)


def _export_finetuned(config: ExportConfig, report: Report) -> Path:
    """A fine-tuned model, as far as it can be expressed."""
    out = Path(config.out)
    model = load_model(config.run)
    if isinstance(model, SegmentationModel) and config.to == "onnx":
        _check_finetuned(config, out, WRITABLE[config.to])
        if config.push:
            raise UserError("push does not take segmenters: leave it out, and upload the file")
        return export_segmenter(model, out, report)
    if isinstance(model, ClassificationModel) and config.to in WRITABLE_CLASSIFIERS:
        written = WRITABLE_CLASSIFIERS[config.to]
        _check_finetuned(config, out, written)
        encoder: Any = model.classifier.encoder
        mean, std = model.mean.tolist(), model.std.tolist()
        stride = model.frame_stride
        trained = Trained(config.run, model.architecture, mean, std, encoder, frame_stride=stride)
        backbone = trained.backbone().eval()
        source = ExportSource(trained, backbone, None, config.crop_share, model)
        return _export(config, source, written, report)
    raise UserError(
        f"{config.run} is a fine-tuned model: of these, segmenters are exported to onnx, "
        "classifiers to onnx and safetensors, those of clips also to hf (hpm.load_model loads any "
        "of them; docs/exporting.md says what stops detectors)"
    )


def _export(
    config: ExportConfig, source: ExportSource, written: WritableFormat, report: Report
) -> Path:
    out = Path(config.out)
    reason = written.unsupported(source)
    if reason:
        raise UserError(f"export to {config.to}: {reason}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            staged = Path(folder) / out.name
            written.write(source, staged)
            difference = check(written, source, staged)
            if config.to == "hf":
                lines = written.code(source, Path(config.push) if config.push else out)
                left_out = add_card(staged, source, config, lines)
                _say_left_out(left_out, config, report)
            _publish(Path(folder), out)
    except OSError as error:
        raise disk_error(out, error) from None
    kind = "clips" if source.of_clips else "images"
    report(f"outputs agree with ours to {difference:.1e} (largest difference on random {kind})")
    report(f"written to {out}; to load it:\n\n{written.code(source, out)}\n")
    if config.push:
        report(f"uploaded to {_push(config, source, out, written, report)}")
    return out


@torch.no_grad()
def check(written: WritableFormat, source: ExportSource, path: Path) -> float:
    """The largest difference between our outputs and the file's. Raises UserError if too large."""
    largest = 0.0
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, source.encoder.channels, *source.encoder.image_size)
        images = torch.randn(shape, generator=generator)
        ours = written.our_outputs(source, images)
        for name, theirs in written.outputs(source, path, images).items():
            if theirs.shape != ours[name].shape:
                raise UserError(f"the exported {name} have another shape: nothing was written")
            difference = (theirs - ours[name]).abs().max().item()
            # Negated, so that NaN is refused.
            if not difference <= TOLERANCE * max(1.0, ours[name].abs().max().item()):
                raise UserError(
                    f"the exported model's {name} differ from ours by {difference:.1e} "
                    f"({TOLERANCE:g} is allowed): nothing was written"
                )
            largest = max(largest, difference)
    return largest


def _format(config: ExportConfig, of_clips: bool = False) -> WritableFormat:
    if not config.with_decoder:
        return (WRITABLE | WRITABLE_OF_CLIPS if of_clips else WRITABLE)[config.to]
    if config.to not in WRITABLE_WITH_DECODER:
        raise UserError(f"with_decoder works only with --to hf, but to is {config.to}")
    return (WRITABLE_OF_CLIPS_WITH_DECODER if of_clips else WRITABLE_WITH_DECODER)[config.to]


def _check(config: ExportConfig, out: Path, written: WritableFormat) -> None:
    if config.push and not config.licence:
        raise UserError("push needs the licence of the weights: pass --licence (apache-2.0, ...)")
    if config.public and not config.push:
        raise UserError("public works only with --push: leave it out, or pass --push USER/NAME")
    if config.with_figure and config.to != "hf" and not config.push:
        raise UserError("with_figure needs a model card: pass --to hf, or --push")
    if not 0 < config.crop_share <= 1:
        raise UserError(f"crop_share is {config.crop_share}; it must be above 0 and at most 1")
    if config.crop_share != 1 and config.to != "hf":
        raise UserError(
            "crop_share works only with --to hf, whose export has preprocessing: leave it out"
        )
    if config.push and config.push.count("/") != 1:
        raise UserError(f"push is '{config.push}': write USER/NAME")
    if written.suffixes and out.suffix not in written.suffixes:
        raise UserError(f"out is '{config.out}': name a {' or '.join(written.suffixes)} file")
    taken = [out, out.with_suffix(".json")] if config.to == "safetensors" else [out]
    for path in taken:
        if path.exists():
            raise UserError(f"{path} exists: choose another --out")


def _check_finetuned(config: ExportConfig, out: Path, written: WritableFormat) -> None:
    for name in OF_BACKBONES:
        if getattr(config, name) != getattr(ExportConfig, name):
            raise UserError(
                f"{name} is for backbones, but {config.run} is a fine-tuned model: leave it out"
            )
    _check(config, out, written)


def _source(config: ExportConfig, report: Report) -> ExportSource:
    trained = load(config.run)
    for note in trained.notes:
        report(note)
    backbone = trained.backbone(config.pool, config.teacher).eval()
    model = (trained.teacher if config.teacher else trained.model) if config.with_decoder else None
    if model is not None:
        model.eval()
    if config.with_figure and not latest_figure(trained.folder):
        raise UserError(f"with_figure: {config.run} has no figures: leave it out")
    return ExportSource(trained, backbone, model, config.crop_share)


def _publish(folder: Path, out: Path) -> None:
    """Move all files to their final place, the requested one last."""
    moved: list[Path] = []
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == out.name):
            os.replace(path, out.parent / path.name)
            moved.append(out.parent / path.name)
    except OSError:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _push(
    config: ExportConfig, source: ExportSource, out: Path, written: WritableFormat, report: Report
) -> str:
    assert config.push is not None
    if out.is_dir():
        return hub.push(out, config.push, config.public)
    with tempfile.TemporaryDirectory() as folder:
        for path in (out, out.with_suffix(".json")):
            if path.exists():
                shutil.copy(path, folder)
        lines = written.code(source, Path(out.name))
        _say_left_out(add_card(Path(folder), source, config, lines), config, report)
        return hub.push(Path(folder), config.push, config.public)


def _say_left_out(count: int, config: ExportConfig, report: Report) -> None:
    if count:
        whose = "teacher" if config.teacher else "student"
        report(
            f"evaluations left out of the model card, because they used other weights than the "
            f"{whose}'s at this step: {count}"
        )

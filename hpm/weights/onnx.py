"""Write a backbone with its normalisation as one ONNX file."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.models.hiera import HieraEncoder
from hpm.weights.backbone import Backbone
from hpm.weights.export_format import ExportSource, Outputs, WritableFormat

JOB = "export to onnx"
Model = TypeVar("Model", bound=nn.Module)
ONNX_LIMIT = 2 * 10**9  # bytes; the limit of protocol buffers


class Onnx(WritableFormat):
    """One ONNX file that maps pixels, normalised inside, to pooled features and patches."""

    suffixes: tuple[str, ...] = (".onnx",)

    def unsupported(self, source: ExportSource) -> str | None:
        size = sum(t.numel() * t.element_size() for t in source.encoder.state_dict().values())
        if size > ONNX_LIMIT:
            return f"an ONNX file holds at most 2 GB, and these weights are {size / 1e9:.1f} GB"
        return None

    def write(self, source: ExportSource, path: Path) -> None:
        # Two images, because the exporter treats a batch of one as fixed.
        images = torch.zeros(2, source.encoder.channels, *source.encoder.image_size)
        model = _FromPixels(expressible(source.backbone))
        write_onnx(model, images, path, ["pooled", "patches"])

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        by_channel = (-1, *(1 for _ in source.encoder.image_size))
        mean, std = source.backbone.mean.view(by_channel), source.backbone.std.view(by_channel)
        return run_onnx(path, images * std + mean)

    def code(self, source: ExportSource, path: Path) -> str:
        encoder = source.encoder
        shape = ", ".join(map(str, ["B", encoder.channels, *encoder.image_size]))
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{path}")\n'
            f"# pixels: float32 [{shape}], full scale 1 (8 bits divided by 255), not normalised\n"
            'pooled, patches = session.run(None, {"images": pixels})'
        )


def write_onnx(model: nn.Module, images: Tensor, path: Path, outputs: list[str]) -> None:
    """Write a module of one input, `images`, for batches of any size.

    images: two or more examples. outputs: their names. Raises UserError where ONNX cannot express
    the module.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(library, "onnx", JOB)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Hide the exporter's internal warnings.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                (images,),
                path,
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = one_line(cause, 160)
        raise UserError(f"{JOB}: the exporter cannot express it: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)


def run_onnx(path: Path, images: Tensor) -> Outputs:
    """The outputs of an ONNX file, by name."""
    runtime = need("onnxruntime", "onnx", JOB)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


class _FromPixels(nn.Module):
    """A backbone that takes pixels in [0, 1]."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(self.backbone.normalize(images, full_scale=1))


def expressible(model: Model) -> Model:
    """A model whose attention ONNX has: Hiera's, within and among units at once, is not a thing
    that the exporter knows in one piece."""
    if not any(isinstance(module, HieraEncoder) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model

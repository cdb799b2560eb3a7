"""ONNX files: written from a module, and run by ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need

JOB = "export to onnx"


def write_onnx(model: nn.Module, images: Tensor, path: Path, outputs: list[str]) -> None:
    """Write a module of one input, `images`, for batches of any size.

    images: two or more examples; of one, the exporter would take the batch for fixed. outputs:
    their names. Raises UserError where ONNX cannot express the module.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(library, "onnx", JOB)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # What the exporter has to say of its own insides helps nobody here.
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


def run_onnx(path: Path, images: Tensor) -> dict[str, Tensor]:
    """The outputs of an ONNX file, by name."""
    runtime = need("onnxruntime", "onnx", JOB)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

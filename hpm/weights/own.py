"""Our own files: checkpoints are read, backbones are read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.files import StateDict, read_tensors, write_tensors, write_text
from hpm.core.options import make_config
from hpm.core.version import __version__
from hpm.models.architecture import Architecture
from hpm.models.vit import LAYER_NORM_EPS
from hpm.weights.checkpoint import parse_checkpoint
from hpm.weights.contents import Contents
from hpm.weights.export_format import ExportSource, Outputs, WritableFormat
from hpm.weights.trained import build

BACKBONE = "hpm encoder"  # the `kind` of a backbone file


def save_backbone(
    path: Path,
    state: StateDict,
    architecture: Architecture,
    mean: list[float],
    std: list[float],
    frame_stride: int | None = None,
) -> None:
    """Write `backbone.safetensors` (timm's names) and the JSON that describes it.

    state: the encoder's. frame_stride: of the clips that it was trained on, if known.
    """
    metadata = architecture.encoder().to_json()
    metadata |= {"mean": mean, "std": std, "kind": BACKBONE, "hpm": __version__}
    if architecture.model is None:
        metadata |= {"layer_norm_eps": LAYER_NORM_EPS}
    if len(architecture.image_size) == 3 and frame_stride is not None:
        metadata |= {"frame_stride": frame_stride}
    write_tensors(path, state, metadata)
    write_text(path.with_suffix(".json"), json.dumps(metadata, indent=2) + "\n")


def read_own(path: Path, tensors: StateDict, metadata: dict[str, Any]) -> Contents | None:
    """The contents of a backbone file or a checkpoint of ours; None for any other file.

    Raises UserError where the file is ours, but holds no pre-trained model.
    """
    if metadata.get("kind") == BACKBONE:
        return Contents(
            str(path),
            path,
            {f"encoder.{name}": tensor for name, tensor in tensors.items()},
            architecture=Architecture.from_json(metadata, path).encoder(),
            mean=metadata["mean"],
            std=metadata["std"],
            frame_stride=metadata.get("frame_stride"),
        )
    if "step" not in metadata:
        return None
    if "architecture" not in metadata:
        raise UserError(f"{path} is of a fine-tuning: name the run that it started from")
    checkpoint = parse_checkpoint(path, tensors, metadata)
    config = make_config(PretrainConfig, metadata["config"])
    return Contents(
        str(path),
        path,
        checkpoint.model,
        checkpoint.teacher,
        Architecture.from_json(metadata["architecture"], path),
        metadata["mean"],
        metadata["std"],
        config,
        metadata["step"],
        config.frame_stride,
    )


class OwnBackbone(WritableFormat):
    """Our own format of backbone files."""

    suffixes = (".safetensors",)

    def write(self, source: ExportSource, path: Path) -> None:
        trained, state = source.trained, source.encoder.state_dict()
        save_backbone(
            path,
            state,
            trained.architecture,
            trained.mean,
            trained.std,
            trained.frame_stride,
        )

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        contents = read_own(path, *read_tensors(path))
        assert contents is not None
        pooled, patches = build(contents).backbone(source.backbone.pool).eval()(images)
        return {"pooled": pooled, "patches": patches}

    def code(self, source: ExportSource, path: Path) -> str:
        pool = "" if source.backbone.pool == "mean" else f', pool="{source.backbone.pool}"'
        return f'import hpm\n\nencoder = hpm.load_encoder("{path}"{pool})\n' + encoder_call(
            source.of_clips, "uint8 or uint16"
        )


def encoder_call(clips: bool, pixels: str = "uint8") -> str:
    """The line of Python that calls a loaded encoder, for logs, reports and exports."""
    shape, name = ("B C T H W", "clips") if clips else ("B C H W", "images")
    return f"pooled, patches = encoder({name})  # {pixels} [{shape}] -> [B D], [B N D]"

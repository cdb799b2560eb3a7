"""timm: read and write its ViT weights, and load its pretrained weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hpm.core.errors import size_text
from hpm.core.extras import need
from hpm.core.files import write_tensors
from hpm.core.hub import fetched
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder
from hpm.models.hiera import HieraEncoder
from hpm.models.timm_encoder import TimmEncoder, pretrained_weights
from hpm.models.timm_models import PREFIX, check_weights, timm_input, timm_shape
from hpm.weights.contents import Contents, ReadableFormat
from hpm.weights.export_format import (
    ExportSource,
    Outputs,
    WritableFormat,
    about_input,
    unless_images,
)
from hpm.weights.renaming import starts


class Timm(ReadableFormat, WritableFormat):
    """Read: a plain ViT under timm's names. Written: a safetensors file for
    `timm.create_model(name, checkpoint_path=...)`."""

    description = "a Vision Transformer under timm's names, without decoders"
    rules = ((r"^(?=cls_token|pos_embed|patch_embed\.|blocks\.|norm\.)", "encoder."),)
    suffixes: tuple[str, ...] = (".safetensors",)

    def matches(self, names: set[str]) -> bool:
        return "patch_embed.proj.weight" in names and starts(names, "blocks.0.")

    def unsupported(self, source: ExportSource) -> str | None:
        name = source.architecture.model
        if source.encoder.num_class_tokens > 1 and source.backbone.pool == "cls":
            return (
                f"timm pools one class token, and this encoder has "
                f"{source.encoder.num_class_tokens}: pass --pool mean, or --to onnx or safetensors"
            )
        if name is None or name.startswith(PREFIX):
            return unless_images(source, "timm")
        return f"timm does not have {name}: pass --to onnx or safetensors"

    def write(self, source: ExportSource, path: Path) -> None:
        need("timm", "timm", "export to timm")
        state = source.encoder.state_dict()
        if isinstance(source.encoder, HieraEncoder):
            state = {_hiera_name(name): tensor for name, tensor in state.items()}
        if source.encoder.num_class_tokens > 1:  # the others are timm's registers
            state["cls_token"], state["reg_token"] = state["cls_token"].tensor_split([1], dim=1)
        write_tensors(path, state, {})

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        timm = need("timm", "timm", "export to timm")
        name, options = self.arguments(source)
        model = timm.create_model(name, checkpoint_path=str(path), **options).eval()
        tokens = model.forward_features(images)
        if isinstance(source.encoder, HieraEncoder):
            patches = model.head.norm(tokens)
            return {"pooled": patches.mean(1), "patches": patches}
        patches = tokens[:, source.encoder.num_prefix_tokens :]
        if _is_distilled(source.encoder):
            return {"patches": patches}
        return {"pooled": model(images), "patches": patches}

    def arguments(self, source: ExportSource) -> tuple[str, dict[str, Any]]:
        """(timm's model name, arguments of `timm.create_model` in which the model differs)."""
        encoder = source.encoder
        options: dict[str, Any] = {
            "img_size": encoder.image_size,
            "in_chans": encoder.channels,
            "num_classes": 0,
        }
        if isinstance(encoder, HieraEncoder):
            return encoder.name, options
        options["patch_size"] = encoder.patch_size
        if not _is_distilled(encoder):
            options["global_pool"] = {"mean": "avg", "cls": "token"}[source.backbone.pool]
            # Otherwise timm would normalise after pooling.
            options["use_fc_norm" if _is_eva(encoder) else "fc_norm"] = False
        if isinstance(encoder, TimmEncoder):
            return encoder.name, options
        sizes = ("embed_dim", "depth", "num_heads")
        options |= {name: getattr(source.architecture, name) for name in sizes}
        if not encoder.has_class_token:
            options["class_token"] = False
        if encoder.num_class_tokens > 1:
            options["reg_tokens"] = encoder.num_class_tokens - 1
        return "vit_base_patch16_224", options

    def code(self, source: ExportSource, path: Path) -> str:
        name, options = self.arguments(source)
        arguments = "".join(f"    {key}={value!r},\n" for key, value in options.items())
        head = (
            "import timm\n\nmodel = timm.create_model(\n"
            f'    "{name}",\n    checkpoint_path="{path}",\n{arguments}).eval()\n'
            f"{about_input(source)}"
        )
        if isinstance(source.encoder, HieraEncoder):
            patches = "patches = model.head.norm(model.forward_features(images))  # [B N D]"
            return f"{head}{patches}\npooled = patches.mean(1)"
        first = source.encoder.num_prefix_tokens
        patches = f"patches = model.forward_features(images)[:, {first}:]  # [B N D]"
        if _is_distilled(source.encoder):
            return f"{head}{patches}\npooled = patches.mean(1)"
        return f"{head}pooled = model(images)  # [B D]\n{patches}"


def pretrained(name: str) -> Contents:
    """timm's pretrained weights of `timm/NAME`, at their own image size. Raises UserError if timm
    has none, or if they are not on disk and cannot be downloaded."""
    model = name.removeprefix(PREFIX)
    shape = {key: value for key, value in timm_shape(model).items() if key != "fixed"}
    check_weights(model)
    trained_on = timm_input(model)
    architecture = Architecture(
        model=name, image_size=trained_on.image_size, channels=trained_on.channels, **shape
    )
    encoder: Any = build_encoder(architecture, seed=0)
    state = fetched(name, "timm", lambda: pretrained_weights(encoder))
    note = (
        f"{name}: timm's pretrained weights, for images of "
        f"{size_text(trained_on.image_size)} pixels "
        f"normalised by mean {trained_on.mean} and deviation {trained_on.std}"
    )
    return Contents(
        name,
        Path(name),
        {f"encoder.{key}": tensor for key, tensor in state.items()},
        architecture=architecture,
        mean=trained_on.mean,
        std=trained_on.std,
        notes=[note],
    )


def _is_distilled(encoder: Any) -> bool:
    """Whether it is a distilled DeiT, whose two tokens timm pools in its own way."""
    return getattr(encoder, "dist_token", None) is not None


def _is_eva(encoder: Any) -> bool:
    return isinstance(encoder, TimmEncoder) and type(encoder.blocks[0]).__module__.endswith(".eva")


def _hiera_name(name: str) -> str:
    """timm's name of a tensor of Hiera, whose final norm is in its head."""
    return f"head.{name}" if name.startswith("norm.") else name

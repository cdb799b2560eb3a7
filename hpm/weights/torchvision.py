"""Write weights for torchvision's VisionTransformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hpm.core.extras import need
from hpm.core.files import StateDict, write_tensors
from hpm.weights.export_format import (
    ExportSource,
    Outputs,
    WritableFormat,
    about_input,
    unless_images,
    unless_plain_vit,
)
from hpm.weights.renaming import Rules, rename

TO_TORCHVISION: Rules = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


class Torchvision(WritableFormat):
    """A state dict for torchvision's VisionTransformer, which outputs the class token."""

    suffixes: tuple[str, ...] = (".safetensors", ".pth")

    def unsupported(self, source: ExportSource) -> str | None:
        reason = unless_images(source, "torchvision's VisionTransformer")
        if reason:
            return reason
        if not source.square:
            return "torchvision's VisionTransformer takes square images and patches alone"
        if source.encoder.channels != 3:
            return (
                "torchvision's VisionTransformer takes 3 channels alone, and this encoder has "
                f"{source.encoder.channels}"
            )
        return unless_plain_vit(source, "torchvision's VisionTransformer")

    def write(self, source: ExportSource, path: Path) -> None:
        need("torchvision", "timm", "export to torchvision")
        state = to_torchvision(source.encoder.state_dict())
        if path.suffix == ".pth":
            torch.save({name: tensor.cpu().clone() for name, tensor in state.items()}, path)
        else:
            write_tensors(path, state, {})

    def options(self, source: ExportSource) -> dict[str, int]:
        shape = source.architecture
        return {
            "image_size": source.encoder.image_size[0],
            "patch_size": source.encoder.patch_size[0],
            "num_layers": shape.depth,
            "num_heads": shape.num_heads,
            "hidden_dim": shape.embed_dim,
            "mlp_dim": 4 * shape.embed_dim,
        }

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        models: Any = need("torchvision.models", "timm", "export to torchvision")
        model = models.VisionTransformer(**self.options(source))
        model.heads = nn.Identity()
        model.load_state_dict(_read(path))
        tokens: list[Tensor] = []
        model.encoder.register_forward_hook(lambda *call: tokens.append(call[-1]))
        return {"class token": model.eval()(images), "patches": tokens[0][:, 1:]}

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        cls_token, patches = source.backbone.tokens(images)
        assert cls_token is not None
        return {"class token": cls_token, "patches": patches}

    def code(self, source: ExportSource, path: Path) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options(source).items())
        load = f'load_file("{path}")'
        imports = "import torch\nfrom safetensors.torch import load_file\n"
        if path.suffix == ".pth":
            load, imports = f'torch.load("{path}", weights_only=True)', "import torch\n"
        return (
            f"{imports}from torchvision.models import VisionTransformer\n\n"
            f"model = VisionTransformer({options})\n"
            "model.heads = torch.nn.Identity()\n"
            f"model.load_state_dict({load})\n{about_input(source)}"
            "cls_token = model.eval()(images)  # [B D]"
        )


def to_torchvision(state: StateDict) -> StateDict:
    """Rename an encoder's tensors (without `encoder.`) to torchvision's names."""
    return {rename(name, TO_TORCHVISION): tensor for name, tensor in state.items()}


def _read(path: Path) -> StateDict:
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    return load_file(path)

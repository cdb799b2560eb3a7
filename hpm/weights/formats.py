"""What other software a backbone can be written for, and what it then makes of the same images.

Each format says what it cannot express, writes, reads the file back with the other library, and
gives the lines that load it. Nothing here knows of places on the disk or of messages.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hpm.core.extras import need
from hpm.core.files import write_tensors, write_text
from hpm.mining.masking import num_hidden_patches
from hpm.models.mim import MaskedImageModel
from hpm.models.timm_encoder import PREFIX, HieraEncoder, TimmEncoder
from hpm.models.vit import LAYER_NORM_EPS, VisionTransformer
from hpm.weights.names import to_hugging_face, to_torchvision
from hpm.weights.onnx_file import run_onnx, write_onnx
from hpm.weights.resolve import Backbone, Trained, load_encoder, save_backbone

Outputs = dict[str, Tensor]
BICUBIC = 3  # as PIL, and with it preprocessor_config.json, numbers it
ONNX_LIMIT = 2 * 10**9  # bytes of a protocol buffer


@dataclass
class Subject:
    """What is exported: a backbone with its normalisation, and the whole model where it is asked
    for with its decoder."""

    trained: Trained
    backbone: Backbone
    model: MaskedImageModel | None = None
    crop_share: float = 1.0  # see transforms.evaluation_view

    @property
    def encoder(self) -> Any:
        return self.backbone.encoder

    @property
    def architecture(self) -> dict[str, Any]:
        return self.trained.architecture

    @property
    def square(self) -> bool:
        (height, width), (rows, columns) = self.encoder.image_size, self.encoder.patch_size
        return height == width and rows == columns


class Format:
    """Written for one library; compared by pooled features [B D] and patches [B N D].

    suffixes: those that the file may have; none for a folder.
    """

    suffixes: tuple[str, ...] = ()

    def unable(self, subject: Subject) -> str | None:
        """Why it cannot be expressed, if so."""
        return None

    def write(self, subject: Subject, path: Path) -> None:
        raise NotImplementedError

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        """What the other library makes of normalised images [B C H W], from the file alone."""
        raise NotImplementedError

    def ours(self, subject: Subject, images: Tensor) -> Outputs:
        """The same from our model."""
        pooled, patches = subject.backbone(images)
        return {"pooled": pooled, "patches": patches}

    def lines(self, subject: Subject, path: Path) -> str:
        """To paste: loads the file and runs it on `images`."""
        raise NotImplementedError


class Timm(Format):
    """A safetensors file for `timm.create_model(name, checkpoint_path=...)`."""

    suffixes: tuple[str, ...] = (".safetensors",)

    def write(self, subject: Subject, path: Path) -> None:
        need("timm", "timm", "export to timm")
        state = subject.encoder.state_dict()
        if isinstance(subject.encoder, HieraEncoder):
            state = {_behind_head(name): tensor for name, tensor in state.items()}
        write_tensors(path, state, {})

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        timm = need("timm", "timm", "export to timm")
        name, options = self.arguments(subject)
        model = timm.create_model(name, checkpoint_path=str(path), **options).eval()
        tokens = model.forward_features(images)
        if isinstance(subject.encoder, HieraEncoder):
            patches = model.head.norm(tokens)
            return {"pooled": patches.mean(1), "patches": patches}
        patches = tokens[:, subject.encoder.num_prefix_tokens :]
        if _is_distilled(subject.encoder):
            return {"patches": patches}
        return {"pooled": model(images), "patches": patches}

    def arguments(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        """timm's name and everything in which the model differs from it."""
        encoder = subject.encoder
        options: dict[str, Any] = {
            "img_size": encoder.image_size, "in_chans": encoder.channels, "num_classes": 0,
        }  # fmt: skip
        if isinstance(encoder, HieraEncoder):
            return encoder.name, options
        options["patch_size"] = encoder.patch_size
        if not _is_distilled(encoder):
            options["global_pool"] = {"mean": "avg", "cls": "token"}[subject.backbone.pool]
            # Or else timm would pool first and norm then.
            options["use_fc_norm" if _is_eva(encoder) else "fc_norm"] = False
        if isinstance(encoder, TimmEncoder):
            return encoder.name, options
        sizes = ("embed_dim", "depth", "num_heads")
        options |= {name: subject.architecture[name] for name in sizes}
        return "vit_base_patch16_224", options

    def lines(self, subject: Subject, path: Path) -> str:
        name, options = self.arguments(subject)
        arguments = "".join(f"    {key}={value!r},\n" for key, value in options.items())
        head = (
            "import timm\n\nmodel = timm.create_model(\n"
            f'    "{name}",\n    checkpoint_path="{path}",\n{arguments}).eval()\n'
        )
        if isinstance(subject.encoder, HieraEncoder):
            patches = "patches = model.head.norm(model.forward_features(images))  # [B N D]"
            return f"{head}{patches}\npooled = patches.mean(1)"
        first = subject.encoder.num_prefix_tokens
        patches = f"patches = model.forward_features(images)[:, {first}:]  # [B N D]"
        if _is_distilled(subject.encoder):
            return f"{head}{patches}\npooled = patches.mean(1)"
        return f"{head}pooled = model(images)  # [B D]\n{patches}"


class HuggingFace(Format):
    """A folder for transformers' ViTModel, with its preprocessing."""

    library = "export to hf"

    def unable(self, subject: Subject) -> str | None:
        oblong = subject.encoder.image_size[0] != subject.encoder.image_size[1]
        if oblong and subject.crop_share != 1:
            return "transformers cuts the centre out for square images alone: leave crop_share out"
        return _only_ours(subject, "transformers' ViT")

    def write(self, subject: Subject, path: Path) -> None:
        need("transformers", "hf", self.library)
        path.mkdir()
        state = {f"encoder.{name}": t for name, t in subject.encoder.state_dict().items()}
        write_tensors(path / "model.safetensors", to_hugging_face(state), {})
        _write_json(path / "config.json", self.config(subject))
        _write_json(path / "preprocessor_config.json", preprocessing(subject))

    def config(self, subject: Subject) -> dict[str, Any]:
        shape = subject.architecture
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": shape["embed_dim"],
            "num_hidden_layers": shape["depth"],
            "num_attention_heads": shape["num_heads"],
            "intermediate_size": 4 * shape["embed_dim"],
            "image_size": _number(subject.encoder.image_size),
            "patch_size": _number(subject.encoder.patch_size),
            "num_channels": subject.encoder.channels,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": LAYER_NORM_EPS,
            "qkv_bias": True,
            "torch_dtype": "float32",
        }

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.library)
        model = transformers.AutoModel.from_pretrained(
            str(path), add_pooling_layer=False, local_files_only=True
        ).eval()
        tokens = model(images).last_hidden_state
        pooled = tokens[:, 0] if subject.backbone.pool == "cls" else tokens[:, 1:].mean(1)
        return {"pooled": pooled, "patches": tokens[:, 1:]}

    def lines(self, subject: Subject, path: Path) -> str:
        return (
            "from transformers import AutoImageProcessor, AutoModel\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{path}")\n'
            f'model = AutoModel.from_pretrained("{path}", add_pooling_layer=False).eval()\n'
            'images = processor(picture, return_tensors="pt").pixel_values\n'
            "tokens = model(images).last_hidden_state  # [B 1+N D], class token first\n"
            "pooled = tokens[:, 1:].mean(1)"
        )


class HuggingFaceMae(HuggingFace):
    """A folder for transformers' ViTMAEForPreTraining: encoder and reconstructor."""

    def unable(self, subject: Subject) -> str | None:
        config = subject.trained.config
        if subject.model is None or config is None:
            return f"{subject.trained.name} holds a backbone only, no decoder"
        if config.target not in ("pixels", "normalized_pixels"):
            return f"ViTMAE reconstructs pixels, but the target of this run is {config.target}"
        if not subject.square:
            return "ViTMAE takes square images and patches alone"
        return super().unable(subject)

    def write(self, subject: Subject, path: Path) -> None:
        super().write(subject, path)
        assert subject.model is not None
        left = ("predictor.", "predictor_embed.", "cover")
        state = {n: t for n, t in subject.model.state_dict().items() if not n.startswith(left)}
        write_tensors(path / "model.safetensors", to_hugging_face(state), {})

    def config(self, subject: Subject) -> dict[str, Any]:
        shape, config = subject.architecture, subject.trained.config
        assert config is not None
        return super().config(subject) | {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": shape["decoder_dim"],
            "decoder_num_hidden_layers": shape["decoder_depth"],
            "decoder_num_attention_heads": shape["decoder_heads"],
            "decoder_intermediate_size": 4 * shape["decoder_dim"],
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": config.target == "normalized_pixels",
        }

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.library)
        model = transformers.ViTMAEForPreTraining.from_pretrained(
            str(path), local_files_only=True
        ).eval()
        noise = self._noise(subject, images)
        hidden = model(images, noise=noise).logits
        index = self._ids(subject, noise)[1][..., None].expand(-1, -1, hidden.shape[-1])
        return {"reconstruction of the hidden patches": hidden.gather(1, index)}

    def ours(self, subject: Subject, images: Tensor) -> Outputs:
        assert subject.model is not None
        prediction = subject.model(images, *self._ids(subject, self._noise(subject, images)))[0]
        return {"reconstruction of the hidden patches": prediction}

    def _noise(self, subject: Subject, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(images))
        return torch.rand(len(images), subject.encoder.num_patches, generator=generator)

    def _ids(self, subject: Subject, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(visible, hidden): ViTMAE hides where the noise is highest."""
        config = subject.trained.config
        assert config is not None
        hidden = num_hidden_patches(subject.encoder.num_patches, config.mask_ratio)
        order = noise.argsort(dim=1)
        return order[:, :-hidden], order[:, -hidden:]

    def lines(self, subject: Subject, path: Path) -> str:
        return (
            "from transformers import AutoImageProcessor, ViTMAEForPreTraining\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{path}")\n'
            f'model = ViTMAEForPreTraining.from_pretrained("{path}").eval()\n'
            'images = processor(picture, return_tensors="pt").pixel_values\n'
            "output = model(images)  # output.logits [B N P], output.mask [B N], 1 where hidden"
        )


class Torchvision(Format):
    """A state dict for torchvision's VisionTransformer, which gives the class token."""

    suffixes: tuple[str, ...] = (".safetensors", ".pth")

    def unable(self, subject: Subject) -> str | None:
        if not subject.square:
            return "torchvision's VisionTransformer takes square images and patches alone"
        if subject.encoder.channels != 3:
            return (
                "torchvision's VisionTransformer takes 3 channels alone, and this encoder has "
                f"{subject.encoder.channels}"
            )
        return _only_ours(subject, "torchvision's VisionTransformer")

    def write(self, subject: Subject, path: Path) -> None:
        need("torchvision", "timm", "export to torchvision")
        state = to_torchvision(subject.encoder.state_dict())
        if path.suffix == ".pth":
            torch.save({name: tensor.cpu().clone() for name, tensor in state.items()}, path)
        else:
            write_tensors(path, state, {})

    def options(self, subject: Subject) -> dict[str, int]:
        shape = subject.architecture
        return {
            "image_size": subject.encoder.image_size[0],
            "patch_size": subject.encoder.patch_size[0],
            "num_layers": shape["depth"],
            "num_heads": shape["num_heads"],
            "hidden_dim": shape["embed_dim"],
            "mlp_dim": 4 * shape["embed_dim"],
        }

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        models: Any = need("torchvision.models", "timm", "export to torchvision")
        model = models.VisionTransformer(**self.options(subject))
        model.heads = nn.Identity()
        model.load_state_dict(_read(path))
        tokens: list[Tensor] = []
        model.encoder.register_forward_hook(lambda *call: tokens.append(call[-1]))
        return {"class token": model.eval()(images), "patches": tokens[0][:, 1:]}

    def ours(self, subject: Subject, images: Tensor) -> Outputs:
        cls_token, patches = subject.backbone.tokens(images)
        assert cls_token is not None
        return {"class token": cls_token, "patches": patches}

    def lines(self, subject: Subject, path: Path) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options(subject).items())
        load = f'load_file("{path}")'
        imports = "import torch\nfrom safetensors.torch import load_file\n"
        if path.suffix == ".pth":
            load, imports = f'torch.load("{path}", weights_only=True)', "import torch\n"
        return (
            f"{imports}from torchvision.models import VisionTransformer\n\n"
            f"model = VisionTransformer({options})\n"
            "model.heads = torch.nn.Identity()\n"
            f"model.load_state_dict({load})\n"
            "cls_token = model.eval()(images)  # [B D]"
        )


class Onnx(Format):
    """One ONNX file: pixels in, normalised inside; pooled features and patches out."""

    suffixes: tuple[str, ...] = (".onnx",)

    def unable(self, subject: Subject) -> str | None:
        size = sum(t.numel() * t.element_size() for t in subject.encoder.state_dict().values())
        if size > ONNX_LIMIT:
            return f"an ONNX file holds at most 2 GB, and these weights are {size / 1e9:.1f} GB"
        return None

    def write(self, subject: Subject, path: Path) -> None:
        height, width = subject.encoder.image_size
        # Two images: of one, the exporter would take the batch for fixed.
        images = torch.zeros(2, subject.encoder.channels, height, width)
        model = _FromPixels(_expressible(subject.backbone))
        write_onnx(model, images, path, ["pooled", "patches"])

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        mean, std = subject.backbone.mean.view(-1, 1, 1), subject.backbone.std.view(-1, 1, 1)
        return run_onnx(path, images * std + mean)

    def lines(self, subject: Subject, path: Path) -> str:
        encoder = subject.encoder
        shape = ", ".join(map(str, ["B", encoder.channels, *encoder.image_size]))
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{path}")\n'
            f"# pixels: float32 [{shape}], full scale 1 (8 bits divided by 255), not normalised\n"
            'pooled, patches = session.run(None, {"images": pixels})'
        )


class Own(Format):
    """Our own backbone file with its JSON."""

    suffixes: tuple[str, ...] = (".safetensors",)

    def write(self, subject: Subject, path: Path) -> None:
        trained = subject.trained
        save_backbone(path, subject.encoder, trained.architecture, trained.mean, trained.std)

    def outputs(self, subject: Subject, path: Path, images: Tensor) -> Outputs:
        pooled, patches = load_encoder(path, subject.backbone.pool)(images)
        return {"pooled": pooled, "patches": patches}

    def lines(self, subject: Subject, path: Path) -> str:
        pool = "" if subject.backbone.pool == "mean" else f', pool="{subject.backbone.pool}"'
        return (
            "import hpm\n\n"
            f'encoder = hpm.load_encoder("{path}"{pool})\n'
            "pooled, patches = encoder(images)  # uint8 or uint16 [B C H W] -> [B D], [B N D]"
        )


FORMATS: dict[str, Format] = {
    "timm": Timm(), "hf": HuggingFace(), "torchvision": Torchvision(), "onnx": Onnx(),
    "safetensors": Own(),
}  # fmt: skip
WITH_DECODER = HuggingFaceMae()


class _FromPixels(nn.Module):
    """A backbone fed with pixels whose full scale is 1."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(self.backbone.normalize(images, full_scale=1))


def _expressible(backbone: Backbone) -> Backbone:
    """A backbone with attention that ONNX has: Hiera's, within and among units at once, is not a
    thing that the exporter knows in one piece."""
    if not isinstance(backbone.encoder, HieraEncoder):
        return backbone
    backbone = copy.deepcopy(backbone)
    modules: Iterator[Any] = backbone.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return backbone


def preprocessing(subject: Subject) -> dict[str, Any]:
    """Contents of preprocessor_config.json: 8-bit images, their shorter side resized and the centre
    cut out, as in our evaluations, and normalised as ours were.

    For oblong images transformers has no such processor: they are resized to the shape.
    """
    height, width = subject.encoder.image_size
    common = {
        "do_resize": True,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": subject.trained.mean,
        "image_std": subject.trained.std,
    }
    if height != width:
        size = {"height": height, "width": width}
        return {"image_processor_type": "ViTImageProcessor", "size": size} | common
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": int(height / subject.crop_share)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": subject.encoder.channels == 3,
    } | common


def _only_ours(subject: Subject, whose: str) -> str | None:
    if isinstance(subject.encoder, VisionTransformer):
        return None
    name = f"{PREFIX}{subject.encoder.name}"
    return f"{whose} has no place for what {name} may differ in: pass --to timm or onnx"


def _is_distilled(encoder: Any) -> bool:
    """DeiT's with two tokens, whose pooling is timm's own."""
    return getattr(encoder, "dist_token", None) is not None


def _is_eva(encoder: Any) -> bool:
    return isinstance(encoder, TimmEncoder) and type(encoder.blocks[0]).__module__.endswith(".eva")


def _behind_head(name: str) -> str:
    """Hiera's last norm is in its head."""
    return f"head.{name}" if name.startswith("norm.") else name


def _number(size: tuple[int, ...]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    return load_file(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")

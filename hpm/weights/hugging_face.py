"""Read Hugging Face's ViT and ViTMAE from files or folders, and write them as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm.core.extras import need
from hpm.core.files import StateDict, write_tensors, write_text
from hpm.core.hub import read_json
from hpm.mining.masking import num_hidden_patches
from hpm.models.vit import LAYER_NORM_EPS
from hpm.weights.contents import ReadableFormat
from hpm.weights.export_format import ExportSource, Outputs, WritableFormat, unless_plain_vit
from hpm.weights.renaming import Rules, rename, split_qkv, starts

BICUBIC = 3  # PIL's number, used in preprocessor_config.json

# Names in files on the hub, and the names that transformers gives since version 5. First those that
# its models of images and of clips share.
SHARED_TO_OURS: Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^(?:encoder\.layer|layers)\.", "encoder.blocks."),
    # The second is what transformers 5 writes for a ViTMAE.
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.", "reconstructor.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
TO_OURS: Rules = (
    (r"^embeddings\.cls_token$", "encoder.cls_token"),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embed"),
    (r"^decoder\.decoder_norm\.", "reconstructor.norm."),
    (r"^decoder\.decoder_pred\.", "reconstructor.head."),
    (r"^decoder\.(?=decoder_embed\.|mask_token$|decoder_pos_embed$)", ""),
    *SHARED_TO_OURS,
)
# Names that every version of transformers reads.
SHARED_TO_HUGGING_FACE: Rules = (
    (r"^encoder\.patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.norm\.", "layernorm."),
    (r"^encoder\.blocks\.", "encoder.layer."),
    (r"^reconstructor\.blocks\.", "decoder.decoder_layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
TO_HUGGING_FACE: Rules = (
    (r"^encoder\.cls_token$", "embeddings.cls_token"),
    (r"^encoder\.pos_embed$", "embeddings.position_embeddings"),
    (r"^reconstructor\.norm\.", "decoder.decoder_norm."),
    (r"^reconstructor\.head\.", "decoder.decoder_pred."),
    (r"^(?=decoder_embed\.|mask_token$|decoder_pos_embed$)", "decoder."),
    *SHARED_TO_HUGGING_FACE,
)


class HuggingFaceViT(ReadableFormat, WritableFormat):
    """transformers' ViT. Written: a folder for ViTModel, with its preprocessing."""

    description = "a ViT of Hugging Face, without decoders"
    rules = TO_OURS
    purpose = "export to hf"

    def matches(self, names: set[str]) -> bool:
        return "embeddings.patch_embeddings.projection.weight" in names

    def unsupported(self, source: ExportSource) -> str | None:
        height, width = source.encoder.image_size[-2:]
        if height != width and source.crop_share != 1:
            return "transformers cuts the centre out for square images alone: leave crop_share out"
        return unless_plain_vit(source, "transformers' ViT", self.class_token)

    def write(self, source: ExportSource, path: Path) -> None:
        need("transformers", "hf", self.purpose)
        path.mkdir()
        write_tensors(path / "model.safetensors", self.tensors(source), {})
        _write_json(path / "config.json", self.config(source))
        _write_json(path / "preprocessor_config.json", preprocessing(source))

    def tensors(self, source: ExportSource) -> StateDict:
        """The weights under transformers' names."""
        return to_hugging_face(encoder_tensors(source))

    def config(self, source: ExportSource) -> dict[str, Any]:
        """Contents of config.json."""
        shape = source.architecture
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": shape.embed_dim,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.num_heads,
            "intermediate_size": 4 * shape.embed_dim,
            "image_size": _number(source.encoder.image_size[-2:]),
            "patch_size": _number(source.encoder.patch_size[-2:]),
            "num_channels": source.encoder.channels,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": LAYER_NORM_EPS,
            "qkv_bias": True,
            "torch_dtype": "float32",
        }

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.purpose)
        model = transformers.AutoModel.from_pretrained(
            str(path), add_pooling_layer=False, local_files_only=True
        ).eval()
        tokens = model(images).last_hidden_state
        pooled = tokens[:, 0] if source.backbone.pool == "cls" else tokens[:, 1:].mean(1)
        return {"pooled": pooled, "patches": tokens[:, 1:]}

    def code(self, source: ExportSource, path: Path) -> str:
        return (
            "from transformers import AutoImageProcessor, AutoModel\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{path}")\n'
            f'model = AutoModel.from_pretrained("{path}", add_pooling_layer=False).eval()\n'
            'images = processor(picture, return_tensors="pt").pixel_values\n'
            "tokens = model(images).last_hidden_state  # [B 1+N D], class token first\n"
            "pooled = tokens[:, 1:].mean(1)"
        )


class HuggingFaceMae(HuggingFaceViT):
    """transformers' ViTMAE. Written: a folder for ViTMAEForPreTraining, with encoder and
    reconstructor."""

    description = "a ViTMAE of Hugging Face with its decoder"
    has_decoder = True

    def matches(self, names: set[str]) -> bool:
        return super().matches(names) and starts(names, "decoder.decoder_norm.")

    def unsupported(self, source: ExportSource) -> str | None:
        config = source.trained.config
        if source.model is None or config is None:
            return f"{source.trained.name} holds a backbone only, no decoder"
        if config.target not in ("pixels", "normalized_pixels"):
            return f"ViTMAE reconstructs pixels, but the target of this run is {config.target}"
        if not source.square:
            return "ViTMAE takes square images and patches alone"
        return super().unsupported(source)

    def tensors(self, source: ExportSource) -> StateDict:
        return to_hugging_face(autoencoder_tensors(source))

    def config(self, source: ExportSource) -> dict[str, Any]:
        decoders, config = source.architecture.need_decoders(), source.trained.config
        assert config is not None
        return super().config(source) | {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": decoders.decoder_dim,
            "decoder_num_hidden_layers": decoders.decoder_depth,
            "decoder_num_attention_heads": decoders.decoder_heads,
            "decoder_intermediate_size": 4 * decoders.decoder_dim,
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": config.target == "normalized_pixels",
        }

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.purpose)
        model = transformers.ViTMAEForPreTraining.from_pretrained(
            str(path), local_files_only=True
        ).eval()
        noise = self._noise(source, images)
        hidden = model(images, noise=noise).logits
        index = self._ids(source, noise)[1][..., None].expand(-1, -1, hidden.shape[-1])
        return {"reconstruction of the hidden patches": hidden.gather(1, index)}

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        assert source.model is not None
        prediction = source.model(images, *self._ids(source, self._noise(source, images)))[0]
        return {"reconstruction of the hidden patches": prediction}

    def _noise(self, source: ExportSource, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(images))
        return torch.rand(len(images), source.encoder.num_patches, generator=generator)

    def _ids(self, source: ExportSource, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(visible, hidden): ViTMAE hides where the noise is highest."""
        config = source.trained.config
        assert config is not None
        hidden = num_hidden_patches(source.encoder.num_patches, config.mask_ratio)
        order = noise.argsort(dim=1)
        return order[:, :-hidden], order[:, -hidden:]

    def code(self, source: ExportSource, path: Path) -> str:
        return (
            "from transformers import AutoImageProcessor, ViTMAEForPreTraining\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{path}")\n'
            f'model = ViTMAEForPreTraining.from_pretrained("{path}").eval()\n'
            'images = processor(picture, return_tensors="pt").pixel_values\n'
            "output = model(images)  # output.logits [B N P], output.mask [B N], 1 where hidden"
        )


def encoder_tensors(source: ExportSource) -> StateDict:
    """The encoder's weights under our names."""
    return {f"encoder.{name}": tensor for name, tensor in source.encoder.state_dict().items()}


def autoencoder_tensors(source: ExportSource) -> StateDict:
    """The weights of encoder and reconstructor under our names."""
    assert source.model is not None
    left = ("predictor.", "predictor_embed.", "cover")
    return {n: t for n, t in source.model.state_dict().items() if not n.startswith(left)}


def to_hugging_face(state: StateDict) -> StateDict:
    """Our encoder (under `encoder.`), and the reconstructor if there is one, under Hugging Face's
    names; with a reconstructor, the encoder is under `vit.`, as in ViTMAEForPreTraining."""
    renamed = {rename(n, TO_HUGGING_FACE): t for n, t in split_qkv(state).items()}
    if not starts(renamed, "decoder."):
        return renamed
    return {n if n.startswith("decoder.") else f"vit.{n}": t for n, t in renamed.items()}


def preprocessing(source: ExportSource) -> dict[str, Any]:
    """Contents of preprocessor_config.json: 8-bit images or frames, their shorter side resized and
    the centre cut out, as in our evaluations, and normalised as ours were.

    For oblong images transformers has no such processor: they are resized to the shape.
    """
    *frames, height, width = source.encoder.image_size
    common = {
        "do_resize": True,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": source.trained.mean,
        "image_std": source.trained.std,
    }
    if height != width:
        size = {"height": height, "width": width}
        kind: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        if frames:
            kind = {"image_processor_type": "VideoMAEImageProcessor", "do_center_crop": False}
        return kind | {"size": size} | common
    return {
        "image_processor_type": "VideoMAEImageProcessor" if frames else "BitImageProcessor",
        "size": {"shortest_edge": int(height / source.crop_share)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": source.encoder.channels == 3,
    } | common


def read_description(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json and preprocessor_config.json say of the model, under our names."""
    names = {
        "num_attention_heads": "num_heads",
        "decoder_num_attention_heads": "decoder_heads",
        "image_size": "image_size",
        "hidden_act": "hidden_act",
        "layer_norm_eps": "layer_norm_eps",
        "norm_pix_loss": "norm_pix_loss",
        "frame_stride": "frame_stride",
    }
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if config.get("model_type") == "videomae" and "num_frames" in config and "image_size" in found:
        size = found["image_size"]
        sides = list(size) if isinstance(size, list) else [size, size]
        found["image_size"] = [config["num_frames"], *sides]
    moments = read_json(folder / "preprocessor_config.json")
    return found | {n: moments[f"image_{n}"] for n in ("mean", "std") if f"image_{n}" in moments}


def _number(size: tuple[int, ...]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")

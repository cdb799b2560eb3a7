"""Read transformers' VideoMAE from files or folders, and write it as folders.

VideoMAE differs from our encoder of clips in what it leaves out: it has no class token, its
positions are a fixed table of sines and cosines by the patch's number (`--positions sincos_1d`),
keys have no bias, and neither has the projection to the decoder. Clips are [B T C H W].
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.core.files import StateDict
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD
from hpm.mining.masking import num_hidden_patches
from hpm.models.patches import grid_size, sincos_1d_positions
from hpm.models.vit import LAYER_NORM_EPS
from hpm.weights.contents import Contents
from hpm.weights.export_format import ExportSource, Outputs, unless_plain_vit
from hpm.weights.hugging_face import (
    SHARED_TO_HUGGING_FACE,
    SHARED_TO_OURS,
    HuggingFaceViT,
    autoencoder_tensors,
    encoder_tensors,
)
from hpm.weights.renaming import Rules, rename, split_qkv, starts
from hpm.weights.shapes import to_add

MAX_PATCHES = 2**16  # of a clip: its size is read from a file, and nothing else bounds it

TO_OURS: Rules = (
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
    (r"^decoder\.norm\.", "reconstructor.norm."),
    (r"^decoder\.head\.", "reconstructor.head."),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^norm\.", "encoder.norm."),  # the norm of a classifier, see `ReadableFormat.to_ours`
    *SHARED_TO_OURS,
)
TO_VIDEO_MAE: Rules = (
    (r"\.attn\.([qv])\.bias$", r".attention.attention.\1_bias"),
    (r"^reconstructor\.norm\.", "decoder.norm."),
    (r"^reconstructor\.head\.", "decoder.head."),
    (r"^decoder_embed\.", "encoder_to_decoder."),
    *SHARED_TO_HUGGING_FACE,
)


class VideoMae(HuggingFaceViT):
    """transformers' VideoMAE. Written: a folder for VideoMAEModel, with its preprocessing."""

    description = "a VideoMAE of Hugging Face, without decoder"
    rules = TO_OURS
    axes, class_token, positions = 3, False, "sincos_1d"
    normalized_target = "normalized_channels"
    may_lack_norm = True

    def matches(self, names: set[str]) -> bool:
        return super().matches(names) and "embeddings.position_embeddings" not in names

    def complete(self, contents: Contents) -> None:
        """Add the fixed positions."""
        projection = contents.student.get("encoder.patch_embed.proj.weight")
        if projection is None or projection.ndim != 5:
            return  # refused when the architecture is derived
        size = contents.metadata.get("image_size")
        if size is None:
            raise UserError(
                f"{contents.path}: the size of its clips is unknown: "
                f"{to_add(contents, 'image_size', '[FRAMES, H, W]')}"
            )
        tables = {"encoder.pos_embed": len(projection)}
        if "decoder_embed.weight" in contents.student:
            tables["decoder_pos_embed"] = len(contents.student["decoder_embed.weight"])
        for name, dim in tables.items():
            table = _fixed_positions(size, projection.shape[2:], dim, contents)
            contents.student[name] = table[:, 1:] if name.startswith("encoder.") else table

    def unsupported(self, source: ExportSource) -> str | None:
        encoder, shape = source.encoder, source.architecture
        reason = unless_plain_vit(source, "transformers' VideoMAE", self.class_token)
        if reason:
            return reason
        if shape.class_token or shape.positions != "sincos_1d":
            return (
                "VideoMAE has no class token, and other positions than this run; train with "
                "--class-token false --positions sincos_1d, or pass --to onnx or safetensors"
            )
        if not torch.equal(encoder.pos_embed, encoder.fixed_positions(encoder.grid)):
            return "VideoMAE's positions are fixed, but those of this model were trained"
        return super().unsupported(source)

    def tensors(self, source: ExportSource) -> StateDict:
        return to_video_mae(encoder_tensors(source))

    def config(self, source: ExportSource) -> dict[str, Any]:
        config = super().config(source)
        del config["qkv_bias"]
        if source.trained.frame_stride is not None:
            config["frame_stride"] = source.trained.frame_stride  # transformers ignores it
        return config | {
            "architectures": ["VideoMAEModel"],
            "model_type": "videomae",
            "num_frames": source.encoder.image_size[0],
            "tubelet_size": source.encoder.patch_size[0],
            "qv_bias": True,
            "use_mean_pooling": not source.architecture.final_norm,  # then without a norm
        }

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.purpose)
        model = transformers.AutoModel.from_pretrained(str(path), local_files_only=True).eval()
        tokens = model(frames_first(images)).last_hidden_state
        return {"pooled": tokens.mean(1), "patches": tokens}

    def code(self, source: ExportSource, path: Path) -> str:
        return self.loading(source, path, "AutoModel") + (
            "tokens = model(clips).last_hidden_state  # [B N D]\npooled = tokens.mean(1)"
        )

    def loading(self, source: ExportSource, path: Path, model: str, after: str = "") -> str:
        """The first lines of `code`, up to the clips."""
        return (
            f"from transformers import AutoImageProcessor, {model}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{path}")\n'
            f'model = {model}.from_pretrained("{path}").eval()\n{after}'
            f"# frames: a list of {source.encoder.image_size[0]} pictures, or a list of such\n"
            'clips = processor(frames, return_tensors="pt").pixel_values  # [B T C H W]\n'
        )


class VideoMaeForPreTraining(VideoMae):
    """transformers' VideoMAE with its decoder. Written: a folder for VideoMAEForPreTraining, with
    encoder and reconstructor."""

    description = "a VideoMAE of Hugging Face with its decoder"
    has_decoder = True

    def matches(self, names: set[str]) -> bool:
        return super().matches(names) and starts(names, "decoder.decoder_layers.")

    def to_ours(self, state: StateDict) -> tuple[StateDict, list[str]]:
        ours, unused = super().to_ours(state)
        weight = ours.get("decoder_embed.weight")
        if weight is not None:
            ours["decoder_embed.bias"] = weight.new_zeros(len(weight))
        return ours, unused

    def complete(self, contents: Contents) -> None:
        super().complete(contents)
        channels = contents.student["encoder.patch_embed.proj.weight"].shape[1]
        has_head = "reconstructor.head.bias" in contents.student
        if contents.metadata.get("norm_pix_loss") is False and channels == 3 and has_head:
            scale, shift = _imagenet_pixels(contents.student)
            _rescale_head(contents.student, 1 / scale, -shift / scale)

    def unsupported(self, source: ExportSource) -> str | None:
        config, model = source.trained.config, source.model
        if model is None or config is None:
            return f"{source.trained.name} holds a backbone only, no decoder"
        if config.target not in ("pixels", "normalized_pixels", "normalized_channels"):
            return f"VideoMAE reconstructs pixels, but the target of this run is {config.target}"
        height, width = source.encoder.patch_size[-2:]
        if height != width:
            return "VideoMAE's decoder takes square patches alone"
        if config.target == "pixels" and source.encoder.channels != 3:
            return "VideoMAE reconstructs raw pixels of 3 channels alone"
        reason = super().unsupported(source)
        if reason is None and _without_embed_bias(autoencoder_tensors(source)) is None:
            reason = "VideoMAE's projection to the decoder has no bias, and this one needs its bias"
        return reason

    def tensors(self, source: ExportSource) -> StateDict:
        state, config = _without_embed_bias(autoencoder_tensors(source)), source.trained.config
        assert state is not None and config is not None
        if config.target == "pixels":
            _rescale_head(state, *_imagenet_pixels(state))
        return to_video_mae(state)

    def config(self, source: ExportSource) -> dict[str, Any]:
        decoders, config = source.architecture.need_decoders(), source.trained.config
        assert config is not None
        return super().config(source) | {
            "architectures": ["VideoMAEForPreTraining"],
            "decoder_hidden_size": decoders.decoder_dim,
            "decoder_num_hidden_layers": decoders.decoder_depth,
            "decoder_num_attention_heads": decoders.decoder_heads,
            "decoder_intermediate_size": 4 * decoders.decoder_dim,
            "norm_pix_loss": config.target != "pixels",
        }

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.purpose)
        model = transformers.VideoMAEForPreTraining.from_pretrained(
            str(path), local_files_only=True
        ).eval()
        model.decoder.norm.eps = LAYER_NORM_EPS
        _, hidden_ids = self._ids(source, images)
        mask = torch.zeros(len(images), source.encoder.num_patches, dtype=torch.bool)
        mask.scatter_(1, hidden_ids, True)
        logits = model(frames_first(images), bool_masked_pos=mask).logits
        return {"reconstruction of the hidden patches": logits}

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        assert source.model is not None and source.trained.config is not None
        prediction = source.model(images, *self._ids(source, images))[0]
        if source.trained.config.target == "pixels":
            pixels = prediction.unflatten(-1, (-1, 3))
            pixels = pixels * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
            prediction = pixels.flatten(-2)
        return {"reconstruction of the hidden patches": prediction}

    def _ids(self, source: ExportSource, images: Tensor) -> tuple[Tensor, Tensor]:
        """(visible, hidden), each in rising order, as boolean masks give them."""
        config = source.trained.config
        assert config is not None
        count = source.encoder.num_patches
        noise = torch.rand(len(images), count, generator=torch.Generator().manual_seed(len(images)))
        order, hidden = noise.argsort(dim=1), num_hidden_patches(count, config.mask_ratio)
        return order[:, :-hidden].sort(1).values, order[:, -hidden:].sort(1).values

    def code(self, source: ExportSource, path: Path) -> str:
        eps = f"model.decoder.norm.eps = {LAYER_NORM_EPS:g}  # no config sets it\n"
        return self.loading(source, path, "VideoMAEForPreTraining", eps) + (
            "# mask [B N]: True where hidden, equally many in each clip\n"
            "output = model(clips, bool_masked_pos=mask)  # output.logits [B M P]"
        )


def to_video_mae(state: StateDict) -> StateDict:
    """Our encoder (under `encoder.`), and the reconstructor if there is one, under VideoMAE's
    names; with a reconstructor, the encoder is under `videomae.`, as in VideoMAEForPreTraining.

    The bias of the keys is left out: it adds the same to a query's product with every key, which
    the softmax takes away.
    """
    left = (".attn.k.bias", "pos_embed")
    kept = {name: t for name, t in split_qkv(state).items() if not name.endswith(left)}
    renamed = {rename(name, TO_VIDEO_MAE): tensor for name, tensor in kept.items()}
    if not starts(renamed, "decoder."):
        return renamed
    decoder = ("decoder.", "encoder_to_decoder.", "mask_token")
    return {n if n.startswith(decoder) else f"videomae.{n}": t for n, t in renamed.items()}


def _fixed_positions(
    size: list[int], patch_size: tuple[int, ...], dim: int, contents: Contents
) -> Tensor:
    """[1 1+N dim] for clips of this size. Raises UserError if the patches do not fill it."""
    try:
        grid = grid_size(size, patch_size)
        if not 0 < prod(grid) <= MAX_PATCHES or min(grid) < 1:
            raise ValueError(f"clips of {size} have {prod(grid)} patches")
    except ValueError as error:
        raise UserError(f"{contents.path}: image_size cannot be {size} ({error})") from None
    return sincos_1d_positions(grid, dim)[None]


def _without_embed_bias(state: StateDict) -> StateDict | None:
    """The weights with the bias of `decoder_embed` in the encoder's last norm, whose tokens are
    then shifted by a vector that the projection maps to this bias. None if there is no such
    vector."""
    bias = state["decoder_embed.bias"].double()
    state = {name: tensor for name, tensor in state.items() if name != "decoder_embed.bias"}
    if not bias.any():
        return state
    weight = state["decoder_embed.weight"].double()
    shift = torch.linalg.pinv(weight) @ bias
    if "encoder.norm.bias" not in state or not torch.allclose(weight @ shift, bias, atol=1e-7):
        return None
    state["encoder.norm.bias"] = (state["encoder.norm.bias"].double() + shift).float()
    return state


def _imagenet_pixels(state: StateDict) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each output of the head, from normalised pixels to those in [0, 1], which
    VideoMAE predicts where it does not normalise patches. It takes ImageNet's moments for them,
    whatever the clips were normalised by."""
    pixels = len(state["reconstructor.head.bias"]) // 3
    return torch.tensor(IMAGENET_STD).repeat(pixels), torch.tensor(IMAGENET_MEAN).repeat(pixels)


def _rescale_head(state: StateDict, scale: Tensor, shift: Tensor) -> None:
    """Let the reconstructor predict `scale` times what it predicts, plus `shift`."""
    weight, bias = (state[f"reconstructor.head.{name}"] for name in ("weight", "bias"))
    state["reconstructor.head.weight"] = weight * scale[:, None]
    state["reconstructor.head.bias"] = bias * scale + shift


def frames_first(clips: Tensor) -> Tensor:
    """Ours [B C T H W] -> VideoMAE's [B T C H W]."""
    return clips.transpose(1, 2)

"""The formats of other software: those that are read, and those that `hpm export` writes."""

from __future__ import annotations

from hpm.weights.export_format import WritableFormat
from hpm.weights.format import ReadableFormat
from hpm.weights.hugging_face import HuggingFaceMae, HuggingFaceViT
from hpm.weights.onnx import Onnx
from hpm.weights.own import OwnBackbone
from hpm.weights.published import PublishedHpm, PublishedMae
from hpm.weights.timm import Timm
from hpm.weights.torchvision import Torchvision

# The first that matches counts: a format with a decoder comes before the one without.
READABLE: tuple[ReadableFormat, ...] = (
    PublishedHpm(),
    PublishedMae(),
    Timm(),
    HuggingFaceMae(),
    HuggingFaceViT(),
)
# By the name that --to takes.
WRITABLE: dict[str, WritableFormat] = {
    "timm": Timm(),
    "hf": HuggingFaceViT(),
    "torchvision": Torchvision(),
    "onnx": Onnx(),
    "safetensors": OwnBackbone(),
}
# With --with-decoder.
WRITABLE_WITH_DECODER: dict[str, WritableFormat] = {"hf": HuggingFaceMae()}

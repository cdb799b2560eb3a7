"""The weight formats that can be read, and those that `hpm export` can write."""

from __future__ import annotations

from hpm.weights.classifier_formats import OnnxClassifier, OwnClassifier
from hpm.weights.contents import ReadableFormat
from hpm.weights.export_format import WritableFormat
from hpm.weights.hugging_face import HuggingFaceMae, HuggingFaceViT
from hpm.weights.onnx import Onnx
from hpm.weights.own import OwnBackbone
from hpm.weights.published import PublishedHpm, PublishedMae
from hpm.weights.timm import Timm
from hpm.weights.torchvision import Torchvision
from hpm.weights.video_mae import VideoMae, VideoMaeForPreTraining
from hpm.weights.video_mae_classifier import VideoMaeForClassification

# The first match is used: formats with a decoder come before those without.
READABLE: tuple[ReadableFormat, ...] = (
    PublishedHpm(),
    PublishedMae(),
    Timm(),
    VideoMaeForPreTraining(),
    VideoMae(),
    HuggingFaceMae(),
    HuggingFaceViT(),
)
# By value of --to.
WRITABLE: dict[str, WritableFormat] = {
    "timm": Timm(),
    "hf": HuggingFaceViT(),
    "torchvision": Torchvision(),
    "onnx": Onnx(),
    "safetensors": OwnBackbone(),
}
# With --with-decoder.
WRITABLE_WITH_DECODER: dict[str, WritableFormat] = {"hf": HuggingFaceMae()}
# In their place for clips, and for fine-tuned classifiers.
WRITABLE_OF_CLIPS: dict[str, WritableFormat] = {"hf": VideoMae()}
WRITABLE_OF_CLIPS_WITH_DECODER: dict[str, WritableFormat] = {"hf": VideoMaeForPreTraining()}
WRITABLE_CLASSIFIERS: dict[str, WritableFormat] = {
    "hf": VideoMaeForClassification(),
    "onnx": OnnxClassifier(),
    "safetensors": OwnClassifier(),
}

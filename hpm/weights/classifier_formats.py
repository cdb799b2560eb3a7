"""Write fine-tuned classifiers, of images or clips, as ONNX and as our own files."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpm.core.files import read_tensors
from hpm.weights.classification import ClassificationModel, write_classifier
from hpm.weights.export_format import ExportSource, Outputs
from hpm.weights.onnx import Onnx, expressible, write_onnx
from hpm.weights.own import OwnBackbone


class LogitsFromPixels(nn.Module):
    """A classifier that takes pixels in [0, 1]: [B C (T) H W] -> logits [B K]."""

    def __init__(self, model: ClassificationModel):
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "batch channels *size"]) -> Tensor:
        return self.model(self.model.normalize(images, full_scale=1))


class OnnxClassifier(Onnx):
    """One ONNX file that maps pixels, normalised inside, to logits."""

    def write(self, source: ExportSource, path: Path) -> None:
        images = torch.zeros(2, source.encoder.channels, *source.encoder.image_size)
        model = LogitsFromPixels(expressible(source.need_classifier()))
        write_onnx(model, images, path, ["logits"])

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        return {"logits": source.need_classifier()(images)}

    def code(self, source: ExportSource, path: Path) -> str:
        start = super().code(source, path).rpartition("\n")[0]
        count = len(source.need_classifier().classes)
        return f"""{start}
(logits,) = session.run(None, {{"images": pixels}})
labels = logits.argmax(1)  # numbers into {count} classes"""


class OwnClassifier(OwnBackbone):
    """The file that `hpm eval finetune` writes."""

    def write(self, source: ExportSource, path: Path) -> None:
        write_classifier(source.need_classifier(), path)

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        return {"logits": ClassificationModel.from_file(path, *read_tensors(path))(images)}

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        return {"logits": source.need_classifier()(images)}

    def code(self, source: ExportSource, path: Path) -> str:
        shape, name = ("B C T H W", "clips") if source.of_clips else ("B C H W", "images")
        return (
            f'import hpm\n\nmodel = hpm.load_model("{path}")\n'
            f"logits = model(model.normalize({name}))  # uint8 or uint16 [{shape}] -> [B K]\n"
            "labels = [model.classes[number] for number in logits.argmax(1)]"
        )

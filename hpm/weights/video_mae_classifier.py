"""Read transformers' VideoMAEForVideoClassification from folders, and write it as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hpm.core.extras import need
from hpm.core.files import StateDict
from hpm.models.build import build_classifier
from hpm.weights.checkpoint import load_exactly
from hpm.weights.classification import ClassificationModel
from hpm.weights.contents import Contents
from hpm.weights.export_format import ExportSource, Outputs
from hpm.weights.hugging_face import encoder_tensors
from hpm.weights.video_mae import VideoMae, frames_first, to_video_mae

HEAD_NORM_EPS = 1e-5  # of the norm before transformers' head, which no config names


class VideoMaeForClassification(VideoMae):
    """A fine-tuned classifier of clips. Written: a folder for VideoMAEForVideoClassification."""

    def unsupported(self, source: ExportSource) -> str | None:
        if not source.of_clips:
            return "this classifier is of images, VideoMAE of clips: pass --to onnx or safetensors"
        return super().unsupported(source)

    def tensors(self, source: ExportSource) -> StateDict:
        state = to_video_mae(encoder_tensors(source))
        ours = source.need_classifier().classifier.state_dict()
        head = {n: t for n, t in ours.items() if not n.startswith("encoder.")}
        head = {name.replace("head.", "classifier."): tensor for name, tensor in head.items()}
        return {f"videomae.{name}": tensor for name, tensor in state.items()} | head

    def config(self, source: ExportSource) -> dict[str, Any]:
        classes = source.need_classifier().classes
        return super().config(source) | {
            "architectures": ["VideoMAEForVideoClassification"],
            "use_mean_pooling": True,
            "id2label": {str(number): name for number, name in enumerate(classes)},
            "label2id": {name: number for number, name in enumerate(classes)},
        }

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        transformers = need("transformers", "hf", self.purpose)
        model = transformers.VideoMAEForVideoClassification.from_pretrained(
            str(path), local_files_only=True
        ).eval()
        model.fc_norm.eps = self._eps(source)
        return {"logits": model(frames_first(images)).logits}

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        return {"logits": source.need_classifier()(images)}

    def code(self, source: ExportSource, path: Path) -> str:
        eps = f"model.fc_norm.eps = {self._eps(source):g}  # no config sets it\n"
        return self.loading(source, path, "VideoMAEForVideoClassification", eps) + (
            "logits = model(clips).logits  # [B K]; model.config.id2label has the names"
        )

    def _eps(self, source: ExportSource) -> float:
        norm: Any = source.need_classifier().classifier.fc_norm
        return norm.eps


def read_classifier(contents: Contents, head: StateDict, classes: list[str]) -> ClassificationModel:
    """A VideoMAEForVideoClassification, in evaluation mode.

    contents: of the folder, with its architecture. head: `weight` and `bias` of the linear layer.
    Raises UserError if the weights do not fit.
    """
    architecture = contents.architecture
    assert architecture and contents.mean and contents.std
    classifier = build_classifier(architecture, None, len(classes))
    # As a backbone is read, the norm after the pooling is the encoder's, see `to_ours`.
    state = {name.replace("encoder.norm.", "fc_norm."): t for name, t in contents.student.items()}
    state |= {f"head.{name}": tensor for name, tensor in head.items()}
    load_exactly(classifier, state, contents.path)
    norm: Any = classifier.fc_norm
    norm.eps = HEAD_NORM_EPS
    return ClassificationModel(
        classifier, architecture, classes, contents.mean, contents.std, contents.frame_stride
    ).eval()

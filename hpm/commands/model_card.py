"""Write the model card of an exported backbone: a README.md for the Hugging Face hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hpm.commands.options import ExportConfig
from hpm.core.config import PretrainConfig
from hpm.core.errors import counted
from hpm.core.files import write_text
from hpm.core.version import __version__
from hpm.data.joined import several
from hpm.evals.saved import saved_evaluations
from hpm.training.checks import MINED_BY_LOSS
from hpm.weights.export_format import ExportSource
from hpm.weights.resolve import Trained

FIGURE = "figure.png"
# What the masks follow from, by `mine_by`.
MINING = {
    "teacher": "a teacher predicts how badly each patch will be reconstructed, and masks follow "
    "from that",
    "memory": "masks follow from the losses of each image's patches in earlier epochs",
    "progress": "masks follow from how much the losses of each image's patches fell in earlier "
    "epochs",
}
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}


def add_card(folder: Path, source: ExportSource, config: ExportConfig, lines: str) -> int:
    """Write README.md and, if configured, copy the run's latest figure.

    Returns how many evaluations of the run were left out because they measured other weights.
    """
    figure = latest_figure(source.trained.folder) if config.with_figure else None
    if figure:
        shutil.copy(figure, folder / FIGURE)
    found = Results.of(source.trained, "teacher" if config.teacher else "student")
    write_text(folder / "README.md", card(source, config, lines, bool(figure), found))
    return found.left_out


@dataclass
class Results:
    """Rows of the results table, and the number of evaluations of other weights."""

    rows: list[list[str]] = field(default_factory=list)
    left_out: int = 0

    @staticmethod
    def of(trained: Trained, weights: str) -> Results:
        """The results of the run's evaluations of these weights at this step."""
        found = Results()
        for saved in saved_evaluations(trained.folder):
            if saved.rows is None or (saved.weights, saved.step) == (weights, trained.step):
                found.rows += saved.words
            else:
                found.left_out += 1
        return found


def card(
    source: ExportSource, config: ExportConfig, lines: str, with_figure: bool, found: Results
) -> str:
    """The text of the card. `lines`: Python code that loads the model."""
    parts = [
        _front_matter(source, config),
        f"# {(config.push or Path(config.out).name).rpartition('/')[2]}",
        _method(source, config),
        f"![image, losses, mask, reconstruction]({FIGURE})" if with_figure else "",
        f"## Use\n\n```python\n{lines}\n```\n\n{_input(source)}",
        f"## Training\n\n{_training(source.trained.config)}",
        f"## Results\n\n{_results(found)}",
        f"## Licence\n\n{config.licence or 'Not stated.'}",
        f"Made by hpm {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def latest_figure(run: Path | None) -> Path | None:
    """The run's latest figure, or None."""
    found = sorted((run / "figures").glob("*.png")) if run else []
    return found[-1] if found else None


def _front_matter(source: ExportSource, config: ExportConfig) -> str:
    library = LIBRARIES.get(config.to)
    tags = ["self-supervised", "masked-image-modelling"]
    tags += ["hard-patches-mining"] if _is_hpm(source.trained.config) else []
    lines = [
        f"license: {config.licence or 'unknown'}",
        *([f"library_name: {library}"] if library else []),
        f"pipeline_tag: {_task(source)}",
        f"tags: [{', '.join(tags)}]",
    ]
    return "\n".join(["---", *lines, "---"])


def _task(source: ExportSource) -> str:
    """The hub's name of what the model does."""
    if source.classifier is not None:
        return "video-classification"
    return "feature-extraction" if source.of_clips else "image-feature-extraction"


def _method(source: ExportSource, config: ExportConfig) -> str:
    """Describe architecture and training as far as they are recorded."""
    shape, encoder, trained = source.architecture, source.encoder, source.trained
    name = shape.model or "Vision Transformer"
    text = (
        f"{name}, width {shape.embed_dim}, {counted(shape.depth, 'block')}, for "
        f"{'clips' if source.of_clips else 'images'} of "
        f"{_by(encoder.image_size)} pixels in patches of {_by(encoder.patch_size)}, "
        f"{counted(encoder.channels, 'channel')}. "
    )
    if source.classifier is not None:
        classes = counted(len(source.classifier.classes), "class", "classes")
        return f"{text}Fine-tuned to classify {classes}."
    if trained.notes:
        # The file name only, because its path may be private.
        found = trained.notes[0].removeprefix(f"{trained.name}: ")
        return f"{text}Not trained by hpm: converted from {Path(trained.name).name}, {found}."
    text += "Pre-trained without labels by masked image modelling"
    if trained.config and _is_hpm(trained.config):
        text += (
            " with Hard Patches Mining ([CVPR 2023](https://arxiv.org/abs/2304.05919)): "
            f"{MINING[trained.config.mine_by]}"
        )
    whose = "teacher's (moving average)" if config.teacher else "student's"
    return f"{text}. These are the {whose} weights."


def _is_hpm(config: PretrainConfig | None) -> bool:
    """Whether the run is known to have used predicted or remembered losses for mining."""
    return bool(config and config.data and config.mask in MINED_BY_LOSS)


def _input(source: ExportSource) -> str:
    mean, std = ([round(v, 5) for v in m] for m in (source.trained.mean, source.trained.std))
    return f"Normalise pixels in [0, 1] with mean {mean} and standard deviation {std}."


def _training(config: PretrainConfig | None) -> str:
    if config is None or not config.data:
        return "Unknown: the file has no training options."
    length = counted(config.steps, "step") if config.steps else counted(config.epochs, "epoch")
    rows = {
        "data": ", ".join(Path(each).name for each in several(config.data)),
        "length": f"{length} of batches of {config.batch_size}",
        "mask": f"{config.mask}, {config.mask_ratio:g} of the patches hidden",
        "target": config.target,
        "predictor's loss": config.predictor_loss,
        "learning rate": f"{config.base_lr:g} per 256 images",
        "seed": str(config.seed),
    }
    return _table(["", ""], [[name, value] for name, value in rows.items()])


def _results(found: Results) -> str:
    if not found.rows:
        return "Not measured."
    header = ["evaluation", "data", "features", "numbers"]
    return _table(header, found.rows) + "\n\nTop-1 in %, with its 95 % bootstrap interval."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))

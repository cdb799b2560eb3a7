"""Draw the curves of finished runs: `python docs/curves.py RUN [RUN ...]`."""

import sys
from pathlib import Path

import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hpm.weights.run_folder import RunFolder

DOCS = Path(__file__).parent
PANELS = {
    "reconstruction_loss": "reconstruction loss",
    "ranking_accuracy": "ranking accuracy\n(dashed: teacher, held-out whole images)",
    "grad_norm": "norm of the gradient",
    "hard_share": "hard share",
    "learning_rate": "learning rate",
}
# Values at chance level.
CHANCE = {"reconstruction_loss": 1.0, "ranking_accuracy": 0.5}
DASHED = {"ranking_accuracy": "held_out/mining_accuracy"}


def draw_curve(panel: Axes, run: RunFolder, name: str, colour: str, dashed: bool = False) -> None:
    """Draw a metric over the progress of training, so that runs of any length can be compared."""
    lines = run.metrics()
    last = lines[-1]["step"]
    points = [(100 * line["step"] / last, line[name]) for line in lines if name in line]
    style = "--." if dashed else "-"
    if points:
        panel.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.2)


def title(run: RunFolder) -> str:
    options = yaml.safe_load(run.config_file.read_text())
    target = options["target"].replace("_", " ").replace("normalized", "normalised")
    steps = run.metrics()[-1]["step"]
    return f"{run.folder.name.split('_')[0]}: {target}, {steps} steps"


folders = sys.argv[1:] or [str(DOCS.parent / "runs" / "demo")]
runs = [RunFolder(Path(folder)) for folder in folders]
figure = Figure(figsize=(11, 5.4), dpi=110, layout="constrained")
FigureCanvasAgg(figure)
*panels, corner = figure.subplots(2, 3).flatten()
for panel, (name, words) in zip(panels, PANELS.items(), strict=True):
    panel.set_title(words, fontsize=9)
    panel.set_xlabel("done, % of the steps", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    if name in CHANCE:
        panel.axhline(CHANCE[name], color="0.4", linewidth=1, linestyle=":")
    for number, run in enumerate(runs):
        draw_curve(panel, run, name, f"C{number}")
        if name in DASHED:
            draw_curve(panel, run, DASHED[name], f"C{number}", dashed=True)
panels[0].set_ylim(0, 1.75)
panels[1].set_ylim(0.35, 0.9)
corner.set_axis_off()
for number, run in enumerate(runs):
    corner.plot([], [], color=f"C{number}", label=title(run))
corner.plot([], [], color="0.4", linestyle=":", label="knows nothing")
corner.legend(loc="center", fontsize=9, frameon=False)
figure.savefig(DOCS / "curves.png")

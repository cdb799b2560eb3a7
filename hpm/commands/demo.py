"""`hpm demo`: pre-train on the built-in images, measure, draw, and say where to look."""

from __future__ import annotations

from rich.console import Console

from hpm.commands.options import DemoConfig
from hpm.core.config import PretrainConfig
from hpm.core.options import make_config, read_preset
from hpm.evals import evaluate
from hpm.evals.result import print_result
from hpm.pretraining import run_pretraining
from hpm.show.command import show
from hpm.show.options import ShowConfig
from hpm.weights.run import Run


def demo(config: DemoConfig) -> Run:
    """Pre-train, evaluate and draw. Run it again to resume; a finished run is only evaluated."""
    options = read_preset("demo") | {"out": config.out}
    if config.steps is not None:
        options["steps"] = config.steps
    run = run_pretraining(make_config(PretrainConfig, options))
    result = evaluate("knn", str(run.folder), "demo")
    figure = show(ShowConfig(str(run.folder), "demo", str(run.folder / "demo.png"), images=6))
    console = Console()
    print_result(result, console)
    console.print(
        f"\nreport:      {run.report}\n"
        f"figures:     {figure}, {run.figures}/ (during training)\n"
        f"curves:      tensorboard --logdir {run.folder}\n"
        f"your images: hpm pretrain FOLDER_OF_IMAGES --out runs/first",
        highlight=False,
    )
    return run

"""The verbs of the command line: their options, what they run and what they print.

Everything else is imported when a verb runs, so that `hpm --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import shlex
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpm.core.errors import UserError, counted
from hpm.core.parser import Command
from hpm.core.signals import Interrupted

if TYPE_CHECKING:
    from hpm.evals.contract import Evaluation


@dataclass(frozen=True)
class Verb:
    """How a verb is typed, and what it runs. `options` is `module:class`, imported when needed."""

    options: str | type
    run: Callable[[Any], None]
    positional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    presets: bool = False
    about: str = ""

    def command(self, prog: str) -> Command:
        options = self.options
        if isinstance(options, str):
            module, _, name = options.partition(":")
            options = getattr(importlib.import_module(module), name)
        return Command(prog, options, self.positional, self.repeated, self.presets)


def _demo(config: Any) -> None:
    from hpm.commands.demo import demo

    demo(config)


def _pretrain(config: Any) -> None:
    from hpm.pretraining import run_pretraining

    run_pretraining(config)


def _report(config: Any) -> None:
    from hpm.show.report import run_report

    print(f"written to {run_report(config)}")


def _compare(config: Any) -> None:
    from hpm.show.comparison import compare

    print(f"written to {compare(config)}")


def _eval(evaluation: Evaluation, options: Any) -> None:
    from hpm.core import distributed
    from hpm.core.progress import result_console
    from hpm.evals.result import print_result
    from hpm.evals.running import run_evaluation

    result = run_evaluation(evaluation, options)
    if distributed.is_main():
        print_result(result, result_console())
        if result.file:
            print(f"written to {result.file}")
        if result.file and result.about.get("training"):
            from hpm.show.evaluation_report import write_evaluation_report

            print(f"report: {write_evaluation_report(result.file)}")
        if result.unwritable:
            raise UserError(result.unwritable)


def _ablation(name: str, config: Any) -> None:
    from hpm.commands.ablation_results import print_results
    from hpm.core import distributed
    from hpm.core.progress import result_console

    module = importlib.import_module(f"hpm.commands.{name}")
    results = getattr(module, name)(config)
    if distributed.is_main():
        print_results(results, result_console())
        print(f"written to {results.file} (with .csv, .png and compare.html beside it)")


def _plan(config: Any) -> None:
    from rich.console import Console

    from hpm.commands.plan import plan
    from hpm.commands.plan_words import print_plan

    made = plan(config)
    print_plan(made, Console(highlight=False))
    _write_json(made.to_json(), config.json)


def _bench(name: str, config: Any) -> None:
    from hpm.core.progress import result_console

    module = importlib.import_module(f"hpm.commands.bench_{name}")
    report = getattr(module, f"bench_{name}")(config)
    module.print_report(report, result_console())
    _write_json(report, config.json)


def _write_json(report: Any, file: str | None) -> None:
    from hpm.core.files import disk_error

    if not file:
        return
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not atomically, because the path may be /dev/stdout or a pipe.
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise disk_error(path, error) from error
    print(f"written to {path}")


def _tokenize(config: Any) -> None:
    from hpm.commands.tokenize import tokenize

    path, distance = tokenize(config)
    print(f"mean squared distance of a patch to its token: {distance:.4g}")
    word = shlex.quote(str(path))
    print(f"written to {path}: hpm pretrain ... --target tokens --codebook {word}")


def _prepare(config: Any) -> None:
    from hpm.commands.prepare import prepare

    with _resumable():
        print(prepare(config).summary(config.out))


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Say on Ctrl-C that the same command resumes: what is finished has been saved."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


def _show(config: Any) -> None:
    from hpm.show.command import show

    print(f"written to {show(config)}")


def _view(config: Any) -> None:
    from hpm.show.view import view

    view(config)


def _predict(config: Any) -> None:
    from hpm.commands.predict import run_predict

    print(f"written to {run_predict(config)}")


def _embed(config: Any) -> None:
    from hpm.commands.embed import run_embed
    from hpm.core import distributed

    with _resumable():
        made = run_embed(config)
    if distributed.is_main():
        print(made.summary())


def _similar(config: Any) -> None:
    from hpm.commands.similar import run_similar

    found = run_similar(config)
    for similarity, *names in found.rows:
        print("  ".join([f"{similarity:.4f}", *filter(None, names)]))
    if config.duplicates is not None:
        print(f"{counted(found.total, 'pair')} of similarity {config.duplicates:g} or more")
    if config.out:
        print(f"written to {config.out}")


def _doctor(config: Any) -> None:
    from hpm.commands.doctor import run_doctor

    _write_json(run_doctor(), config.json)


def _completion(config: Any) -> None:
    from hpm.commands.completion_scripts import SCRIPTS

    print(SCRIPTS[config.shell], end="")


def _run_on(cluster: str, verb: str, config: Any) -> None:
    module = importlib.import_module(f"hpm.commands.on_{cluster}")
    print(getattr(module, f"{verb}_on_{cluster}")(config))


def _export(config: Any) -> None:
    from hpm.commands.export import run_export

    run_export(config)


def _evaluations(name: str | None = None) -> dict[str, Verb]:
    """All installed evaluations, or the one of this name, which may be the user's own module."""
    from hpm.evals.contract import find, installed

    verbs = {}
    for evaluation in map(find, [name] if name else installed()):
        run = functools.partial(_eval, evaluation)
        verbs[evaluation.name] = Verb(
            evaluation.options, run, ("run", "data"), presets=True, about=evaluation.about
        )
    return verbs


def _benchmarks(name: str | None = None) -> dict[str, Verb]:
    options = "hpm.commands.options"
    step, dense, data = (functools.partial(_bench, each) for each in ("step", "dense", "data"))
    return {
        "step": Verb(
            f"{options}:BenchConfig", step, presets=True, about="what a training step costs"
        ),
        "segment": Verb(f"{options}:BenchSegmentConfig", dense, about="speed of UPerNet"),
        "detect": Verb(f"{options}:BenchDetectConfig", dense, about="speed of Mask R-CNN"),
        "data": Verb(
            f"{options}:BenchDataConfig", data, ("data",), about="how fast images are loaded"
        ),
    }


def _on_cluster(cluster: str, verbs: tuple[str, ...], name: str | None = None) -> dict[str, Verb]:
    """Verbs that can run on a cluster, with its options beside their own."""
    options = f"hpm.commands.cluster_options:{cluster.title()}"
    return {
        verb: dataclasses.replace(
            VERBS[verb],
            options=f"{options}{verb.title()}Config",
            run=functools.partial(_run_on, cluster, verb),
            about=ABOUT[verb],
        )
        for verb in verbs
    }


VERBS = {
    "demo": Verb("hpm.commands.options:DemoConfig", _demo),
    "pretrain": Verb("hpm.core.config:PretrainConfig", _pretrain, ("data",), presets=True),
    "plan": Verb("hpm.commands.options:PlanConfig", _plan, ("data",)),
    "report": Verb("hpm.show.options:ReportConfig", _report, ("run",)),
    "compare": Verb("hpm.show.options:CompareConfig", _compare, ("runs",), ("runs",)),
    "ablate": Verb(
        "hpm.commands.options:AblateConfig",
        functools.partial(_ablation, "ablate"),
        ("data",),
        ("arm", "vary"),
        presets=True,
    ),
    "methods": Verb(
        "hpm.commands.options:MethodsConfig",
        functools.partial(_ablation, "methods"),
        ("data",),
        presets=True,
    ),
    "tokenize": Verb("hpm.commands.options:TokenizeConfig", _tokenize, ("data",)),
    "prepare": Verb("hpm.commands.options:PrepareConfig", _prepare, ("data",)),
    "show": Verb("hpm.show.options:ShowConfig", _show, ("run", "data")),
    "view": Verb("hpm.show.options:ViewConfig", _view, ("run",)),
    "predict": Verb("hpm.commands.options:PredictConfig", _predict, ("model", "images")),
    "embed": Verb("hpm.commands.embedding_options:EmbedConfig", _embed, ("run", "images")),
    "similar": Verb(
        "hpm.commands.embedding_options:SimilarConfig", _similar, ("features", "image")
    ),
    "export": Verb("hpm.commands.options:ExportConfig", _export, ("run",)),
    "doctor": Verb("hpm.commands.options:DoctorConfig", _doctor),
    "completion": Verb("hpm.commands.options:CompletionConfig", _completion, ("shell",)),
}

# Verbs of several kinds: what a kind is called, and what finds all of them, or the one of a name.
GROUPS: dict[str, tuple[str, Callable[..., dict[str, Verb]]]] = {
    "eval": ("an evaluation", _evaluations),
    "bench": ("a benchmark", _benchmarks),
    "ray": ("a verb", functools.partial(_on_cluster, "ray", ("pretrain", "prepare", "embed"))),
    "slurm": ("a verb", functools.partial(_on_cluster, "slurm", ("pretrain", "embed"))),
}

ABOUT = {
    "demo": "pre-train on built-in images, evaluate and draw; minutes on a CPU",
    "plan": "examine images and machine, and suggest a command for pretrain",
    "pretrain": "pre-train a backbone on a folder of images",
    "eval": "evaluate: kNN, probes, fine-tuning, segmentation, detection",
    "show": "draw losses, masks, reconstructions, features and attention",
    "view": "try a model on images in the browser",
    "predict": "write the predictions of a fine-tuned model for a folder of images or videos",
    "embed": "write the features of images into a file, one row per image",
    "similar": "list similar images and near-duplicates by their features",
    "export": "export the backbone to timm, Hugging Face, torchvision or ONNX",
    "report": "rewrite a run's report.html",
    "compare": "compare several runs on one page",
    "ablate": "pre-train variants over several seeds and compare them",
    "methods": "test whether mining helps on your images: four methods at equal time",
    "bench": "measure the speed of training, of dense heads, or of data loading",
    "prepare": "shrink images once into large files that are fast to read",
    "ray": "run pretrain, prepare or embed on a Ray cluster",
    "slurm": "submit pretrain or embed to a Slurm cluster",
    "doctor": "show versions, hardware and extras, and what is missing",
    "completion": "print a script that completes commands in bash, zsh or fish",
    "tokenize": "learn a codebook of discrete tokens as a reconstruction target",
}

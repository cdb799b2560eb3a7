"""The verbs of the command line. What a verb needs is imported when it runs."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpm.core.errors import UserError, counted, nearest, why
from hpm.core.parser import Command, HelpWanted
from hpm.core.signals import Interrupted
from hpm.core.version import __version__

if TYPE_CHECKING:
    from hpm.evals.contract import Evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for a mistake of the user, 128 + n on signal n."""
    try:
        run, options = understand(list(sys.argv[1:] if arguments is None else arguments))
        run(options)
        return 0
    except HelpWanted as wanted:
        print(str(wanted), end="")
        return 0
    except UserError as error:
        _complain(str(error))
        return 2
    except PermissionError as error:
        _complain(f"{error.filename}: {why(error)}" if error.filename else why(error))
        return 2
    except Interrupted as stopped:
        if _rank() == 0:
            print(f"hpm: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported here
            _complain(_out_of_memory(error))
            return 2
        if _reports_error():
            raise
        return 1  # another process has failed first and says why


def understand(arguments: Sequence[str]) -> tuple[Callable[[Any], None], Any]:
    """What to run, and its options. Raises UserError, or HelpWanted for --help."""
    arguments = _import_modules(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        raise HelpWanted(_usage())
    name, *rest = arguments
    if name == "--version":
        raise HelpWanted(f"{__version__}\n")
    if name in GROUPS:
        return _understand_kind(name, rest)
    if name not in VERBS:
        known = [*VERBS, *GROUPS]
        raise UserError(f"no verb '{name}'{nearest(name, known)} (hpm --help lists them)")
    verb = VERBS[name]
    return verb.run, verb.command(f"hpm {name}").parse(rest)


def _import_modules(arguments: Sequence[str]) -> Sequence[str]:
    """Import the modules of `hpm --import MODULE VERB ...`. Returns the other arguments."""
    while arguments and arguments[0].split("=")[0] == "--import":
        from hpm.core.plugins import import_plugin

        _, equals, module = arguments[0].partition("=")
        rest = arguments[1:]
        if not equals:
            module, rest = (rest[0], rest[1:]) if rest else ("", [])
        if not module:
            raise UserError("--import needs the name of a module: hpm --import MODULE VERB ...")
        import_plugin(f"--import {module}", module)
        arguments = rest
    return arguments


def _understand_kind(group: str, arguments: Sequence[str]) -> tuple[Callable[[Any], None], Any]:
    """The same for a verb of several kinds: `hpm eval knn`, `hpm bench step`."""
    noun, find = GROUPS[group]
    if not arguments:
        raise UserError(f"name {noun}: hpm {group} {'|'.join(find())} (see hpm {group} --help)")
    name, *rest = arguments
    if name in ("-h", "--help"):
        raise HelpWanted(_group_usage(group, find()))
    kinds = find(name)
    if name not in kinds:
        word = noun.partition(" ")[2]
        known = f"hpm {group} {'|'.join(kinds)}"
        raise UserError(f"no {word} '{name}'{nearest(name, kinds)} ({known})")
    return kinds[name].run, kinds[name].command(f"hpm {group} {name}").parse(rest)


def _group_usage(group: str, kinds: dict[str, Verb]) -> str:
    head = f"usage: hpm {group} KIND ...   (hpm {group} KIND --help for its options)"
    listing = _listing({kind: verb.about for kind, verb in kinds.items()})
    return "\n".join([head, "", *listing, ""])


def _usage() -> str:
    head = "usage: hpm VERB ...   (hpm VERB --help for its options)"
    options = {
        "--import MODULE": "before the verb: import a module of yours that a run needs",
        "--version": "print the version",
    }
    return "\n".join([head, "", *_listing(ABOUT), "", *_listing(options), ""])


def _listing(entries: dict[str, str]) -> list[str]:
    """Names and descriptions in two columns, as wide as the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    indent = max(map(len, entries)) + 4
    lines = []
    for name, about in entries.items():
        first = f"  {name}".ljust(indent)
        lines += textwrap.wrap(about, width, initial_indent=first, subsequent_indent=" " * indent)
    return lines


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


def _eval(evaluation: Evaluation, options: Any) -> None:
    from rich.console import Console

    from hpm.evals.result import print_result
    from hpm.evals.running import run_evaluation

    result = run_evaluation(evaluation, options)
    if _rank() == 0:
        print_result(result, Console())
        if result.file:
            print(f"written to {result.file}")
        if result.file and result.about.get("training"):
            from hpm.show.evaluation_report import write_evaluation_report

            print(f"report: {write_evaluation_report(result.file)}")
        if result.unwritable:
            raise UserError(result.unwritable)


def _ablate(config: Any) -> None:
    from rich.console import Console

    from hpm.commands.ablate import ablate
    from hpm.commands.ablation_results import print_results

    results = ablate(config)
    if _rank() == 0:
        print_results(results, Console())
        print(f"written to {results.file} (with .csv and .png beside it)")


def _bench_step(config: Any) -> None:
    from rich.console import Console

    from hpm.commands import bench_step

    report = bench_step.bench_step(config)
    bench_step.print_report(report, Console())
    _write_json(report, config.json)


def _bench_data(config: Any) -> None:
    from rich.console import Console

    from hpm.commands import bench_data

    report = bench_data.bench_data(config)
    bench_data.print_report(report, Console())
    _write_json(report, config.json)


def _write_json(report: Any, file: str | None) -> None:
    if file:
        Path(file).write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {file}")


def _tokenize(config: Any) -> None:
    from hpm.commands.tokenize import tokenize

    path, distance = tokenize(config)
    print(f"mean squared distance of a patch to its token: {distance:.4g}")
    print(f"written to {path}: hpm pretrain ... --target tokens --codebook {path}")


def _prepare(config: Any) -> None:
    from hpm.commands.prepare import prepare

    made = prepare(config)
    if made.unreadable:
        print(
            f"{counted(len(made.unreadable), 'image')} cannot be read: {config.out}/unreadable.txt"
        )
    print(
        f"{counted(made.images, 'image')}, {made.bytes / 1e9:.3g} GB, in {config.out}: "
        f"hpm pretrain {config.out} --out ..."
    )


def _show(config: Any) -> None:
    from hpm.show.command import show

    print(f"written to {show(config)}")


def _view(config: Any) -> None:
    from hpm.show.view import view

    view(config)


def _predict(config: Any) -> None:
    from hpm.commands.predict import run_predict

    print(f"written to {run_predict(config)}")


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
    return {
        "step": Verb(f"{options}:BenchConfig", _bench_step, about="what a training step costs"),
        "data": Verb(
            f"{options}:BenchDataConfig", _bench_data, ("data",), about="how fast images are loaded"
        ),
    }


VERBS = {
    "demo": Verb("hpm.commands.options:DemoConfig", _demo),
    "pretrain": Verb("hpm.core.config:PretrainConfig", _pretrain, ("data",), presets=True),
    "report": Verb("hpm.show.options:ReportConfig", _report, ("run",)),
    "ablate": Verb(
        "hpm.commands.options:AblateConfig", _ablate, ("data",), ("arm", "vary"), presets=True
    ),
    "tokenize": Verb("hpm.commands.options:TokenizeConfig", _tokenize, ("data",)),
    "prepare": Verb("hpm.commands.options:PrepareConfig", _prepare, ("data",)),
    "show": Verb("hpm.show.options:ShowConfig", _show, ("run", "data")),
    "view": Verb("hpm.show.options:ViewConfig", _view, ("run",)),
    "predict": Verb("hpm.commands.options:PredictConfig", _predict, ("model", "images")),
    "export": Verb("hpm.commands.options:ExportConfig", _export, ("run",)),
}

# Verbs of several kinds: what a kind is called, and what finds all of them, or the one of a name.
GROUPS: dict[str, tuple[str, Callable[..., dict[str, Verb]]]] = {
    "eval": ("an evaluation", _evaluations),
    "bench": ("a benchmark", _benchmarks),
}

ABOUT = {
    "demo": "pre-train on built-in images, evaluate and draw; minutes on a CPU",
    "pretrain": "pre-train a backbone on a folder of images",
    "eval": "evaluate a backbone: kNN, probes, fine-tuning, measures without labels",
    "show": "draw what a model makes of images: losses, mask, features, attention",
    "view": "try a model on images in the browser",
    "predict": "write the predictions of a fine-tuned model for a folder of images",
    "export": "export the backbone to timm, Hugging Face, torchvision or ONNX",
    "report": "rewrite a run's report.html",
    "ablate": "pre-train variants over several seeds and compare them",
    "bench": "measure the speed of a training step or of data loading",
    "prepare": "shrink images once into large files that are fast to read",
    "tokenize": "learn a codebook of discrete tokens as a reconstruction target",
}


def _out_of_memory(error: Exception) -> str:
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f" ({wanted[1]} more were wanted)" if wanted else ""
    return (
        f"the GPU's memory is full{more}: pass --accumulate 2 (4, ...), --checkpoint-activations "
        "or a smaller --batch-size, as far as the verb has them"
    )


def _complain(text: str) -> None:
    """Report an error once, whichever process it happened on."""
    if _reports_error():
        rank = _rank()
        print(f"hpm: error: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr)


def _distributed() -> Any:
    """`hpm.core.distributed`, once PyTorch is imported: before, nothing joins other processes."""
    if "torch" not in sys.modules:
        return None
    from hpm.core import distributed

    return distributed


def _rank() -> int:
    distributed = _distributed()
    return distributed.rank() if distributed else int(os.environ.get("RANK", 0))


def _reports_error() -> bool:
    distributed = _distributed()
    if distributed:
        return distributed.reports_error()
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0

"""The verbs of the command line, nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from argparse import HelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from rich.console import Console

import hpm
from hpm.commands.options import (
    AblateConfig,
    BenchConfig,
    BenchDataConfig,
    DemoConfig,
    ExportConfig,
    PrepareConfig,
    TokenizeConfig,
)
from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted, nearest, why
from hpm.core.options import lay_over, preset_path
from hpm.evals.options import PROTOCOLS, EvalConfig
from hpm.show.options import ReportConfig, ShowConfig, ViewConfig

VERBS: dict[str, tuple[Any, str]] = {
    "demo": (DemoConfig, "the whole tour on built-in images, on a CPU, in minutes"),
    "pretrain": (PretrainConfig, "a folder of images in, a backbone out"),
    "report": (ReportConfig, "write a run's report.html again: curves, pictures, configuration"),
    "eval": (
        EvalConfig,
        f"measure a backbone: hpm eval PROTOCOL RUN DATA ({', '.join(PROTOCOLS)})",
    ),
    "ablate": (AblateConfig, "pre-train with some options changed, over seeds, and compare"),
    "bench": (BenchConfig, "what a training step costs, and loading: hpm bench step|data"),
    "tokenize": (TokenizeConfig, "learn a codebook of discrete tokens, a target of pre-training"),
    "prepare": (PrepareConfig, "shrink images once into large files that are fast to read"),
    "show": (ShowConfig, "draw what a model makes of images: losses, mask, features, attention"),
    "view": (ViewConfig, "a page on this machine to try a model on images"),
    "export": (ExportConfig, "hand the backbone over to timm, Hugging Face, torchvision, ONNX"),
}

POSITIONAL: dict[str, list[str]] = {
    "demo": [], "pretrain": ["data"], "report": ["run"], "eval": ["run", "data"],
    "ablate": ["data"], "bench": [], "tokenize": ["data"], "prepare": ["data"],
    "show": ["run", "data"], "view": ["run"], "export": ["run"], "bench data": ["data"],
}  # fmt: skip

# Verbs of several kinds, each with options of its own.
KINDS: dict[str, dict[str, Any]] = {
    "eval": dict(PROTOCOLS),
    "bench": {"step": BenchConfig, "data": BenchDataConfig},
}

# Verbs that take a preset or YAML file.
WITH_PRESETS = ("pretrain", "eval", "ablate")

# May be given several times.
REPEATED = ("arm", "vary")

# Words separated by commas.
LISTED = ("panels",)

USAGE = "\n".join(
    [
        "usage: hpm VERB ...   (hpm VERB --help for its options)",
        "",
        *[f"  {verb:9} {about}" for verb, (_, about) in VERBS.items()],
        "",
        "  --version",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for a mistake of the user, 128 + n on signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except UserError as error:
        _complain(str(error))
        return 2
    except torch.OutOfMemoryError as error:
        _complain(_out_of_memory(error))
        return 2
    except PermissionError as error:
        _complain(f"{error.filename}: {why(error)}" if error.filename else why(error))
        return 2
    except hpm.Interrupted as stopped:
        if distributed.is_main():
            print(f"hpm: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if distributed.reports_error():
            raise
        return 1  # another process has failed first and says why


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(hpm.__version__)
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(f"no verb '{verb}'{nearest(verb, VERBS)} (hpm --help lists them)")
    run = {
        "demo": _demo, "pretrain": _pretrain, "report": _report, "eval": _eval,
        "ablate": _ablate, "bench": _bench, "tokenize": _tokenize, "prepare": _prepare,
        "show": _show, "view": _view, "export": _export,
    }[verb]  # fmt: skip
    return run(rest)


def _demo(arguments: list[str]) -> int:
    from hpm.commands.demo import tour

    tour(_parse("demo", arguments))
    return 0


def _pretrain(arguments: list[str]) -> int:
    from hpm.pretraining import run_pretraining

    run_pretraining(_parse("pretrain", arguments))
    return 0


def _report(arguments: list[str]) -> int:
    from hpm.show.report import run_report

    print(f"written to {run_report(_parse('report', arguments))}")
    return 0


def _eval(arguments: list[str]) -> int:
    from hpm.evals import print_result, run_evaluation

    known = ", ".join(PROTOCOLS)
    if not arguments:
        raise UserError(f"name an evaluation: {known}")
    protocol, *rest = arguments
    if protocol in ("-h", "--help"):
        return _list_kinds("eval")
    if protocol not in PROTOCOLS:
        raise UserError(f"no evaluation '{protocol}'{nearest(protocol, PROTOCOLS)} ({known})")
    result = run_evaluation(_parse("eval", rest, protocol))
    if distributed.is_main():
        print_result(result, Console())
        if result.file:
            print(f"written to {result.file}")
        if result.unwritable:
            raise UserError(result.unwritable)
    return 0


def _ablate(arguments: list[str]) -> int:
    from hpm.commands.ablate import ablate
    from hpm.commands.ablation_results import print_results

    results = ablate(_parse("ablate", arguments))
    if distributed.is_main():
        print_results(results, Console())
        print(f"written to {results.file} (with .csv and .png beside it)")
    return 0


def _bench(arguments: list[str]) -> int:
    from hpm.commands import bench_data
    from hpm.commands import bench_step as bench

    kind, *rest = arguments or [""]
    if kind in ("-h", "--help"):
        return _list_kinds("bench")
    if kind not in KINDS["bench"]:
        raise UserError(
            "name what to measure: hpm bench step, or hpm bench data (--help for its options)"
        )
    config = _parse("bench", rest, kind)
    if kind == "step":
        report = bench.bench_step(config)
        bench.print_report(report, Console())
    else:
        report = bench_data.bench_data(config)
        bench_data.print_report(report, Console())
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {config.json}")
    return 0


def _tokenize(arguments: list[str]) -> int:
    from hpm.commands.tokenize import tokenize

    path, distance = tokenize(_parse("tokenize", arguments))
    print(f"mean squared distance of a patch to its token: {distance:.4g}")
    print(f"written to {path}: hpm pretrain ... --target tokens --codebook {path}")
    return 0


def _prepare(arguments: list[str]) -> int:
    from hpm.commands.prepare import prepare

    config = _parse("prepare", arguments)
    made = prepare(config)
    if made.unreadable:
        print(
            f"{counted(len(made.unreadable), 'image')} cannot be read: {config.out}/unreadable.txt"
        )
    print(
        f"{counted(made.images, 'image')}, {made.bytes / 1e9:.3g} GB, in {config.out}: "
        f"hpm pretrain {config.out} --out ..."
    )
    return 0


def _show(arguments: list[str]) -> int:
    from hpm.show.command import show

    print(f"written to {show(_parse('show', arguments))}")
    return 0


def _view(arguments: list[str]) -> int:
    from hpm.show.view import view

    view(_parse("view", arguments))
    return 0


def _export(arguments: list[str]) -> int:
    from hpm.commands.export import run_export

    run_export(_parse("export", arguments))
    return 0


def _list_kinds(verb: str) -> int:
    """What there is of a verb of several kinds, a line each."""
    for kind, config in KINDS[verb].items():
        places = " ".join(_places(verb, kind)).upper()
        print(f"hpm {verb} {kind:10} {places:10} {' '.join((config.__doc__ or '').split())}")
    print(f"hpm {verb} KIND --help lists the options of one")
    return 0


def _places(verb: str, kind: str | None) -> list[str]:
    """Options that need no name, in order."""
    return POSITIONAL.get(f"{verb} {kind}", POSITIONAL[verb])


def _parse(verb: str, arguments: list[str], protocol: str | None = None) -> Any:
    """The config of a verb (or of a kind of it), read and checked by jsonargparse."""
    config, about = VERBS[verb]
    if protocol:
        config, about = KINDS[verb][protocol], ""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    prog = " ".join(["hpm", verb, *([protocol] if protocol else [])])
    parser = _Parser(prog=prog, description=about or None, exit_on_error=False)
    parser.usage = " ".join(
        [parser.prog, *[p.upper() for p in _places(verb, protocol)], "[--OPTION VALUE]"]
    )
    if verb in WITH_PRESETS:
        parser.add_argument(
            "--config", action="config", help="A preset's name or a YAML file; options come on top."
        )
    parser.add_class_arguments(config)
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        sys.exit(0)
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}
    written = _spell_out(arguments, types, _places(verb, protocol), parser.prog)
    try:
        options = parser.parse_args(written).as_dict()
    except ArgumentError as error:
        raise UserError(_one_line(str(error), parser.prog)) from None
    options.pop("config", None)
    typed = {word.removeprefix("--").partition("=")[0] for word in written}
    given = {name: value for name, value in options.items() if name in typed}
    return config(**(lay_over(options, given) if "steps" in options else options))


class _Parser(ArgumentParser):
    """Shows options as they are mostly typed: with hyphens."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        text = super().format_help(formatter)
        return re.sub(r"--[a-z_]+", lambda m: m[0].replace("_", "-"), text)


def _spell_out(
    arguments: list[str], types: dict[str, str], positional: list[str], prog: str
) -> list[str]:
    """Write each argument as `--name=value`: every option takes one value (true, for a flag)."""
    written, places, waiting = [], iter(positional), list(arguments)
    config: list[str] = []
    repeated: dict[str, list[str]] = {}
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            name = next(places, "")
            if not name:
                raise UserError(f"'{argument}' is one argument too many (see {prog} --help)")
            written.append(f"--{name}={argument}")
            continue
        name, given, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name not in types and name != "config":
            known = [f"--{option.replace('_', '-')}" for option in types]
            hint = nearest(f"--{name.replace('_', '-')}", known)
            raise UserError(f"unknown option '{argument.partition('=')[0]}'{hint}")
        if not given and types.get(name) == "bool" and waiting[:1] not in (["true"], ["false"]):
            value = "true"
        elif not given:
            if not waiting:
                raise UserError(f"option '{argument}' needs a value")
            value = waiting.pop(0)
        if name == "config":
            # First, wherever it stands, so that options come on top. A preset is a file inside of
            # the package.
            config.append(f"--config={preset_path(value)}")
            continue
        several = "tuple" in types.get(name, "") and name not in REPEATED
        if name in LISTED or (several and "," in value):
            value = f"[{value.strip('[]')}]"
        if name in REPEATED:
            repeated.setdefault(name, []).append(value)
        else:
            written.append(f"--{name}={value}")
    return (
        config + written + [f"--{name}={json.dumps(values)}" for name, values in repeated.items()]
    )


def _one_line(error: str, prog: str) -> str:
    """jsonargparse's message, shortened: which option, what was expected, what was given."""
    text = " ".join(error.split())
    missing = re.search(r"arguments are required: (.*)", text)
    if missing:
        names = missing[1].split(", ")
        return f"{' and '.join(names)} missing (see {prog} --help)"
    key = re.search(r'Parser key "(\w+)"', text)
    if key:
        # The last one: of a union, the whole.
        given = re.search(r".*(?:Got|Given) value: (.*)", text)
        value = f"'{given[1]}'" if given else "this value"
        choices = re.search(r"Literal\[(.*?)\]", text)
        if choices:
            known = choices[1].replace("'", "").split(", ")
            hint = nearest(value.strip("'"), known)
            return f"{key[1]} is {value}{hint} (one of {', '.join(known)})"
        return f"{key[1]} cannot be {value}: it must be {_kind(text)}"
    unknown = re.search(r"(?:[Kk]ey|Option|arguments?)[^'\"]*['\"](\w+)['\"]", text)
    return f"{text}{nearest(unknown[1], _all_options()) if unknown else ''}"


def _kind(text: str) -> str:
    kinds = {"float": "a number", "int": "a whole number", "bool": "true or false"}
    found = [words for kind, words in kinds.items() if re.search(rf"\b{kind}\b", text)]
    if "tuple" in text.lower():
        found.append("a list such as [1,2]")
    return " or ".join(found) or "of another type"


def _all_options() -> set[str]:
    configs = [config for config, _ in VERBS.values()]
    configs += [config for kinds in KINDS.values() for config in kinds.values()]
    return {field.name for config in configs for field in dataclasses.fields(config)}


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f" ({wanted[1]} more were wanted)" if wanted else ""
    return (
        f"the GPU's memory is full{more}: pass --accumulate 2 (4, ...), --checkpoint-activations "
        "or a smaller --batch-size, as far as the verb has them"
    )


def _complain(text: str) -> None:
    """Report an error once, whichever process it happened on."""
    if distributed.reports_error():
        rank = distributed.rank()
        print(f"hpm: error: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr)

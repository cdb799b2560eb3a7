"""What an evaluation is, and how it is found by its name.

An evaluation is a module with

- `Options`, a dataclass that derives from `EvalOptions` (or `LabelledEvalOptions`,
  `FrozenEvalOptions`): what can be set. Its docstring is what `hpm eval --help` says of it.
- `run(task, options)`, which yields a `Measured` for each row of numbers. It checks its options
  first. Where several processes evaluate, all of them yield the same.
- `COLUMNS` (optional), the columns of the printed table: title -> format of a row's numbers, such
  as `{"effective rank": "{rank:.1f}"}`. Otherwise there is a column for each number.

`hpm.evals.task.Task` gives the backbones, the images and the device. An evaluation sees features of
frozen backbones, or trains a copy of the encoder. What it imports beyond `Options`, PyTorch above
all, is imported inside `run`, so that `hpm eval --help` answers at once.

A module of `hpm.evals` is found by its own name, one of an installed package by its name in the
entry point group `hpm.evaluations`, and any other by its dotted name: `hpm eval my_package.my_eval`
(or `hpm eval my_eval`, for `my_eval.py` in the working directory).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from hpm.core.errors import UserError, nearest
from hpm.evals.options import EvalOptions

ENTRY_POINTS = "hpm.evaluations"
# Names of features. Those of the run that --compare names are the trained ones' with the first
# word replaced, which is how the differences find their pairs.
TRAINED, COMPARED, RANDOM, RAW_PIXELS = "trained", "compared", "random weights", "raw pixels"
# In place of features: numbers of the run's loss predictor, which a result keeps apart.
PREDICTOR = "predictor"

Numbers = dict[str, float]


@runtime_checkable
class Scores(Protocol):
    """What each test image scored. The numbers, their intervals and paired differences to another
    backbone follow from it (see `hpm.evals.metrics.TrueClassRanks`)."""

    def numbers(self, seed: int) -> Numbers:
        """By name; NAME_low and NAME_high are the ends of NAME's 95 % interval."""
        ...

    def difference(self, other: Any, seed: int) -> Numbers:
        """These less the other's, of the same images; named alike."""
        ...


@dataclass(frozen=True)
class Measured:
    """The numbers of one kind of features at one setting.

    features: the row of the table, such as `trained, patch mean`.
    setting: such as `k = 20`; the evaluation's name where there is only one.
    scores: per image; its numbers come before `numbers`.
    numbers: by name.
    per_class: class -> its numbers by name.
    chosen: the hyper-parameters that a held-out part chose.
    figures: end of a file name, such as `masks.png` -> what writes that file, such as
        `image.save`. The files are beside the JSON file.
    """

    features: str
    setting: str = ""
    scores: Scores | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    per_class: Mapping[str, Numbers] = field(default_factory=dict)
    chosen: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was found by its name."""

    name: str
    options: type[EvalOptions]
    run: Callable[[Any, Any], Iterable[Measured]]  # (Task, its options)
    columns: Mapping[str, str]

    @property
    def about(self) -> str:
        """One line on what it does."""
        return " ".join((self.options.__doc__ or "").split())


def find(name: str) -> Evaluation:
    """The evaluation of that name. Raises UserError where there is none, or it is not complete."""
    known = installed()
    if name in known:
        return _evaluation(name, _import(name, known[name]))
    if not _exists(name):
        names = ", ".join(known)
        raise UserError(f"no evaluation '{name}'{nearest(name, known)} ({names})")
    return _evaluation(name, _import(name, name))


def installed() -> dict[str, str]:
    """Evaluations that have a name of their own: name -> module. None of them is imported."""
    built_in = {path.stem: f"{__package__}.{path.stem}" for path in _built_in_files()}
    others = {each.name: each.module for each in entry_points(group=ENTRY_POINTS)}
    return built_in | {name: others[name] for name in sorted(others.keys() - built_in.keys())}


def installed_options(name: str) -> type[EvalOptions] | None:
    """The options of an evaluation that a file names; None where it is not installed.

    A name in a file is never taken for a module to import.
    """
    try:
        return find(name).options if name in installed() else None
    except UserError:
        return None


def _built_in_files() -> list[Path]:
    """The modules beside this one that have `Options`; looked up in their text, because importing
    the other modules would import PyTorch."""
    folder = Path(__file__).parent
    files = [*folder.glob("*.py"), *(init.parent for init in folder.glob("*/__init__.py"))]
    return sorted(file for file in files if "\nclass Options(" in _text(file))


def _text(module: Path) -> str:
    file = module / "__init__.py" if module.is_dir() else module
    return file.read_text(encoding="utf-8")


def _exists(module: str) -> bool:
    """Whether there is such a module, also in the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # to stay: `run` may import what lies beside it
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"evaluation '{name}' cannot be imported: {reason}") from error


def _evaluation(name: str, module: ModuleType) -> Evaluation:
    options: Any = getattr(module, "Options", None)
    run = getattr(module, "run", None)
    derived = inspect.isclass(options) and issubclass(options, EvalOptions)
    if not (derived and "__dataclass_fields__" in vars(options) and callable(run)):
        raise UserError(
            f"{module.__name__} is no evaluation: it needs a dataclass Options derived from "
            "hpm.evals.options.EvalOptions, and a function run(task, options)"
        )
    return Evaluation(name, options, run, getattr(module, "COLUMNS", {}))

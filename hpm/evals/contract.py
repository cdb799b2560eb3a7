"""The interface of evaluations, and how they are found by name.

An evaluation is a module with

- `Options`, a dataclass that derives from `EvalOptions` (or `LabelledEvalOptions`,
  `FrozenEvalOptions`). Its docstring is shown by `hpm eval --help`.
- `run(task, options)`, which checks its options and yields a `Measured` for each row of numbers.
  With several processes, all of them yield the same.
- `COLUMNS` (optional), the columns of the printed table: title -> format of a row's numbers, such
  as `{"effective rank": "{rank:.1f}"}`. Default: one column per number.

`hpm.evals.task.Task` provides the backbones, the images and the device. An evaluation uses features
of frozen backbones, or trains a copy of the encoder. PyTorch and other slow imports belong inside
`run`, so that `hpm eval --help` stays fast.

A module of `hpm.evals` is found by its own name, one of an installed package by its name in the
entry point group `hpm.evaluations`, and any other by its dotted name: `hpm eval my_package.my_eval`
(or `hpm eval my_eval`, for `my_eval.py` in the working directory).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from hpm.core.errors import UserError, nearest
from hpm.core.plugins import import_plugin, installed_plugins, module_exists
from hpm.evals.options import EvalOptions

ENTRY_POINTS = "hpm.evaluations"
# First words of the names of features. Differences pair TRAINED with COMPARED (the run that
# --compare names), whose names are otherwise equal.
TRAINED, COMPARED, RANDOM, RAW_PIXELS = "trained", "compared", "random weights", "raw pixels"
# Last words of the names of the features of an encoder of images on clips.
OVER_FRAMES = ", mean of frames"
# In place of features: the numbers of the run's loss predictor (`Result.hardness`).
PREDICTOR = "predictor"

Numbers = dict[str, float]


@runtime_checkable
class Scores(Protocol):
    """Scores of each test image, from which numbers, confidence intervals and paired differences
    between backbones are computed (see `hpm.evals.metrics.TrueClassRanks`)."""

    def numbers(self, seed: int) -> Numbers:
        """Numbers by name. NAME_low and NAME_high are the 95 % confidence interval of NAME."""
        ...

    def difference(self, other: Any, seed: int) -> Numbers:
        """Paired differences to `other` on the same images (self minus other), by the same
        names."""
        ...


@dataclass(frozen=True)
class Measured:
    """The numbers of one kind of features in one setting.

    features: name of the row, such as `trained, patch mean`.
    setting: such as `k = 20`. Default: the name of the evaluation.
    scores: scores per image; their numbers come before `numbers`.
    numbers: further numbers by name.
    per_class: numbers by class and name.
    chosen: hyper-parameters that were chosen on held-out images.
    figures: end of a file name, such as `masks.png` -> function that writes the file, such as
        `image.save`. Figures are written beside the JSON file.
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
    """An evaluation, loaded from its module."""

    name: str
    options: type[EvalOptions]
    run: Callable[[Any, Any], Iterable[Measured]]  # (Task, its options)
    columns: Mapping[str, str]

    @property
    def about(self) -> str:
        """A one-line description."""
        return " ".join((self.options.__doc__ or "").split())


def find(name: str) -> Evaluation:
    """Find an evaluation by name. Raises UserError if there is none or it is incomplete."""
    known = installed()
    if name not in known and not module_exists(name):
        names = ", ".join(known)
        raise UserError(f"no evaluation '{name}'{nearest(name, known)} ({names})")
    return _evaluation(name, import_plugin(f"evaluation '{name}'", known.get(name, name)))


def installed() -> dict[str, str]:
    """Built-in and registered evaluations, name -> module, without importing them."""
    built_in = {path.stem: f"{__package__}.{path.stem}" for path in _built_in_files()}
    others = {name: each.module for name, each in installed_plugins(ENTRY_POINTS).items()}
    return built_in | {name: others[name] for name in sorted(others.keys() - built_in.keys())}


def installed_options(name: str) -> type[EvalOptions] | None:
    """The options of an evaluation named in a file; None if it is not installed.

    A name in a file is never imported as a module.
    """
    try:
        return find(name).options if name in installed() else None
    except UserError:
        return None


def _built_in_files() -> list[Path]:
    """The modules beside this one that define `Options`. Their text is searched, because importing
    the others would import PyTorch."""
    folder = Path(__file__).parent
    files = [*folder.glob("*.py"), *(init.parent for init in folder.glob("*/__init__.py"))]
    return sorted(file for file in files if "\nclass Options(" in _text(file))


def _text(module: Path) -> str:
    file = module / "__init__.py" if module.is_dir() else module
    return file.read_text(encoding="utf-8")


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

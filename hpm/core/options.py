"""Options: dataclass fields that know their bounds, and dataclasses made from names and values.

A dataclass of options is read by the command line, by Python and from YAML alike. What a field
cannot say by its type it says by `option(...)`: bounds, whether it is a duration, whether an
interrupted run may go on with another value. The string below a field is its help. Groups of
options are base classes, whose docstring is the group's title.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from hpm.core.durations import check_duration
from hpm.core.errors import UserError, nearest

AnyPath = str | os.PathLike[str]  # also an `hpm.Run`
LENGTHS = ("steps", "epochs", "max_hours")  # of a training: one of them says it
LARGEST_SEED = 10**18  # with some added, as for several seeds, it still fits into 64 bits
PRESETS = Path(__file__).parent / "presets"
Config = TypeVar("Config")


@dataclass(frozen=True)
class Rules:
    """Constraints on the value of an option, in addition to its type."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    rising: bool = False
    duration: bool = False
    path: bool = False
    main: bool = False  # shown first in the help
    may_change: bool = False  # when an interrupted run is resumed
    changes_numbers: bool = True  # of an evaluation
    testing_only: bool = False
    refused: str = ""  # why this evaluation has no use for an option that others share


def option(default: Any = MISSING, **rules: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its default; without one the option is required.
        at_least, above, at_most, below: bounds of its value, or of each value of a list. Of a
            duration, only above=0.
        rising: of a pair, the second value is not below the first.
        duration: its text is `40 epochs`, `500 steps` or `5%`.
        path: it names a file or folder to write, in which `~` is the home folder.
        main: it is among the few that the help shows first.
        may_change: an interrupted run may go on with another value.
        changes_numbers: of an evaluation: its numbers depend on the value.
        testing_only: of an evaluation that trains: the trained model does not depend on the value.
    """
    return dataclasses.field(default=default, metadata={"rules": Rules(**rules)})


def refused(base: type, name: str, reason: str) -> Any:
    """Redefine a field of the base class as an option that is refused, and left out of the help.
    reason: one sentence, such as `segmentation reads whole images`."""
    inherited = describe(base)[name]
    rules = dataclasses.replace(inherited.rules, refused=reason)
    return dataclasses.field(default=inherited.default, metadata={"rules": rules})


@dataclass(frozen=True)
class Described:
    """An option, as the parser and the help use it."""

    name: str
    hint: Any
    default: Any
    rules: Rules
    help: str
    group: str

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_flag(self) -> bool:
        return self.hint is bool


def describe(cls: Any) -> dict[str, Described]:
    """The options of a dataclass by name, in the order of its fields."""
    return _describe(cls)


@functools.cache
def _describe(cls: Any) -> dict[str, Described]:
    hints = typing.get_type_hints(cls)
    texts: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if isinstance(base, type) and dataclasses.is_dataclass(base):
            title = inspect.cleandoc(base.__doc__ or "").splitlines()[0].rstrip(".")
            texts |= {name: (text, title) for name, text in _attribute_texts(base).items()}
    described = {}
    for field in dataclasses.fields(cls):
        text, group = texts.get(field.name, ("", ""))
        rules = field.metadata.get("rules", Rules())
        described[field.name] = Described(
            field.name, hints[field.name], field.default, rules, text, group
        )
    return described


def _attribute_texts(cls: type) -> dict[str, str]:
    """The string below each field of a class, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = " ".join(str(below.value.value).split())
            texts[field.target.id] = text
    return texts


def make_config(
    cls: type[Config], values: dict[str, Any], spell: Callable[[str], str] = str
) -> Config:
    """A dataclass of options from names and values, all of them checked.

    Args:
        cls: the dataclass.
        values: by name: text as it is typed, values from YAML, or Python's own.
        spell: how messages write the name of an option, such as `--mask-ratio`.

    Raises UserError.
    """
    described = describe(cls)
    for name in values:
        if name not in described:
            raise UserError(f"unknown option '{name}'{nearest(name, described)}")
    missing = [name for name, each in described.items() if each.required and name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given")
    converted = {n: convert(spell(n), value, described[n].hint) for n, value in values.items()}
    for name, value in converted.items():
        if described[name].rules.path and value is not None:
            converted[name] = os.path.expanduser(value)
    options = cls(**converted)
    check_rules(options, spell)
    return options


def check_rules(options: Any, spell: Callable[[str], str] = str) -> None:
    """Raise UserError for the first option whose value breaks its own rules."""
    for option, each in describe(type(options)).items():
        value, name = getattr(options, option), spell(option)
        if each.rules.refused and value != each.default:
            raise UserError(f"{each.rules.refused}: leave {name} out")
        if value is None:
            continue
        if each.rules.duration:
            check_duration(name, value, is_interval=each.rules.above == 0)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check_bounds(name, number, each.rules)
        if each.rules.rising and list(value) != sorted(value):
            raise UserError(
                f"{name} is {value[0]},{value[1]}; the second must not be below the first"
            )


def _check_bounds(name: str, value: float, rules: Rules) -> None:
    lowest = rules.at_least if rules.above is None else rules.above
    highest = rules.at_most if rules.below is None else rules.below
    fits = (
        (rules.at_least is None or value >= rules.at_least)
        and (rules.above is None or value > rules.above)
        and (rules.at_most is None or value <= rules.at_most)
        and (rules.below is None or value < rules.below)
        and abs(value) != float("inf")
        and value == value
    )
    if fits:
        return
    if lowest is not None and highest is not None:
        wanted = f"lie between {lowest:g} and {highest:g}"
    elif rules.at_least == 0:
        wanted = "not be negative"
    elif rules.above is not None:
        wanted = f"be above {rules.above:g}"
    elif lowest is not None:
        wanted = f"be at least {lowest:g}"
    elif highest is not None:
        wanted = f"be {'below' if rules.at_most is None else 'at most'} {highest:g}"
    else:
        wanted = "be a finite number"
    shown = f"{value:g}" if isinstance(value, float) else value
    raise UserError(f"{name} is {shown}; it must {wanted}")


def convert(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to its type. Raises UserError that says what would fit."""
    for kind in _alternatives(hint):
        try:
            return _convert_to(value, kind)
        except (TypeError, ValueError):
            continue
    choices = [str(c) for kind in _alternatives(hint) for c in _choices(kind)]
    if choices:
        hint_at_one = nearest(str(value), choices)
        raise UserError(f"{name} is '{value}'{hint_at_one} (one of {', '.join(choices)})")
    raise UserError(f"{name} cannot be '{value}': it must be {describe_type(hint)}")


def describe_type(hint: Any) -> str:
    """A type in words: `a number`, `a whole number or a list such as [1, 2]`."""
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    kinds = [kind for kind in _alternatives(hint) if kind is not types.NoneType]
    return " or ".join(
        dict.fromkeys(
            "a list such as [1, 2]"
            if typing.get_origin(kind) is tuple
            else words.get(kind, str(kind))
            for kind in kinds
        )
    )


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union. Text comes last, because any value converts to it."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(hint)) if union else [hint]
    return sorted(kinds, key=lambda kind: (kind is types.NoneType, kind is str))


def _choices(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) is tuple:
        return _choices(typing.get_args(kind)[0])
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _convert_to(value: Any, kind: Any) -> Any:
    """Convert a value to one type. Raises ValueError or TypeError if it does not fit."""
    is_text = isinstance(value, str)
    if kind is types.NoneType:
        if value is None or (is_text and value.lower() in ("null", "none")):
            return None
    elif typing.get_origin(kind) is Literal:
        value = str(value).lower() if isinstance(value, bool) else value  # YAML's true
        if value in typing.get_args(kind):
            return value
    elif typing.get_origin(kind) is tuple:
        return _convert_to_tuple(value, typing.get_args(kind))
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if is_text and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    elif kind is int and (is_text or (isinstance(value, int) and not isinstance(value, bool))):
        return int(value)
    elif kind is float and not isinstance(value, bool) and isinstance(value, (str, int, float)):
        return float(value) if is_text else value
    raise ValueError(value)


def _convert_to_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    return tuple(_convert_to_any(part, kind) for part, kind in zip(value, kinds, strict=True))


def _convert_to_any(value: Any, hint: Any) -> Any:
    for kind in _alternatives(hint):
        try:
            return _convert_to(value, kind)
        except (TypeError, ValueError):
            continue
    raise ValueError(value)


def lay_over(preset: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Override the options of a preset. A length of the training (see LENGTHS) replaces that of the
    preset. Raises UserError if the options have several."""
    lengths = {name: options[name] for name in LENGTHS if options.get(name) is not None}
    if len(lengths) > 1:
        found = " and ".join(f"{name} is {value}" for name, value in lengths.items())
        raise UserError(f"{found}: pass only one of them")
    if lengths:
        preset = {name: value for name, value in preset.items() if name not in LENGTHS}
    return preset | options


def preset_path(name: str | Path) -> Path:
    """A YAML file, or the preset of that name installed with the package."""
    name = str(name)
    if Path(name).is_file():
        return Path(name)
    presets = preset_names()
    if name not in presets:
        known = ", ".join(presets)
        raise UserError(f"no preset or file '{name}'{nearest(name, presets)} (presets: {known})")
    return PRESETS / f"{name}.yaml"


def preset_names() -> list[str]:
    """The presets that are installed with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str | Path) -> dict[str, Any]:
    """The options of a preset or YAML file."""
    try:
        values = yaml.safe_load(preset_path(name).read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} has no options: write one `name: value` per line")
    return values

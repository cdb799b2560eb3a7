"""From names and values to a dataclass of options, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from hpm.core.config import _expected
from hpm.core.errors import UserError, nearest

PRESETS = Path(__file__).parent / "presets"

Config = TypeVar("Config")


def make_config(cls: type[Config], options: dict[str, Any]) -> Config:
    """A config from keyword arguments, their names and types checked. Raises UserError."""
    hints = typing.get_type_hints(cls)
    for name in options:
        if name not in hints:
            raise UserError(f"unknown option '{name}'{nearest(name, hints)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in options and field.default is dataclasses.MISSING:
            raise UserError(f"{field.name} is missing")
    return cls(**{name: _typed(name, value, hints[name]) for name, value in options.items()})


def lay_over(preset: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options on top of those of a preset. Steps and epochs are two ways to give one length:
    that of the options replaces either of the preset. Raises UserError where they give both."""
    if None not in (options.get("steps"), options.get("epochs")):
        raise UserError(
            f"steps is {options['steps']} and epochs is {options['epochs']}: pass only one of them"
        )
    if options.get("epochs") is not None:
        options = {"steps": None} | options
    return preset | options


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its type wants it: YAML has no tuples and takes 1e-3 for text."""
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        if value not in known:
            words = [str(k) for k in known]
            raise UserError(
                f"{name} is '{value}'{nearest(str(value), words)} (one of {', '.join(words)})"
            )
        return value
    if isinstance(value, list):
        value = tuple(value)
    if float in (hint, *typing.get_args(hint)) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, Path) and str in (hint, *typing.get_args(hint)):
        value = str(value)
    if not _fits(value, hint):
        raise UserError(f"{name} cannot be {value!r}: it must be {_expected(hint)}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_fits(v, a) for v, a in zip(value, arguments, strict=True))
        )
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def preset_path(name: str | Path) -> Path:
    """A YAML file, or the preset of that name installed with the package."""
    name = str(name)
    if Path(name).is_file():
        return Path(name)
    presets = {p.stem: p for p in PRESETS.glob("*.yaml")}
    if name not in presets:
        known = ", ".join(sorted(presets))
        raise UserError(f"no preset or file '{name}'{nearest(name, presets)} (presets: {known})")
    return presets[name]


def read_preset(name: str | Path) -> dict[str, Any]:
    """The options of a preset or YAML file."""
    try:
        return yaml.safe_load(preset_path(name).read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None

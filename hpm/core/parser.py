"""The command line: arguments to a dataclass of options, and the help of a verb."""

from __future__ import annotations

import inspect
import os
import shutil
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from hpm.core.errors import UserError, nearest
from hpm.core.options import (
    Described,
    describe,
    describe_type,
    lay_over,
    make_config,
    preset_path,
    read_preset,
)

MAIN_OPTIONS = "Main options"


class HelpWanted(Exception):
    """Raised for --help; the exception's text is the help."""


@dataclass(frozen=True)
class Command:
    """The arguments of `hpm VERB`: options, some of them positional.

    `repeated` options may be given several times, the last positional one without its name;
    `presets` says whether there is --config.
    """

    prog: str
    options: type
    positional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    presets: bool = False

    def parse(self, arguments: Sequence[str]) -> Any:
        """Arguments to a dataclass of options. Raises UserError, or HelpWanted for --help."""
        if any(argument in ("-h", "--help") for argument in arguments):
            raise HelpWanted(self.help())
        typed = self._read(arguments)
        preset = read_preset(typed.pop("config")) if "config" in typed else {}
        # A text is one value, which may have commas: `vary: mask=random,hardest`.
        preset |= {n: [preset[n]] for n in self.repeated if isinstance(preset.get(n), str)}
        values = lay_over(preset, typed)
        required = [n for n, each in describe(self.options).items() if each.required]
        missing = [self._spell(name) for name in required if name not in values]
        if missing:
            raise UserError(f"{' and '.join(missing)} must be given (see {self.prog} --help)")
        return make_config(self.options, values, self._spell)

    def _read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The text of each option on the command line; a list of texts for repeated options."""
        described = describe(self.options)
        places, waiting = iter(self.positional), list(arguments)
        typed: dict[str, Any] = {}
        while waiting:
            argument = waiting.pop(0)
            if not argument.startswith("--"):
                name, value = next(places, self._rest), argument
                if not name:
                    raise UserError(f"unexpected argument '{argument}'{self._several(argument)}")
            else:
                word, equals, value = argument.partition("=")
                name = word.removeprefix("--").replace("-", "_")
                if name not in described and not (name == "config" and self.presets):
                    known = [self._spell(each, False) for each in described]
                    switch = described.get(name.removeprefix("no_"))
                    hint = nearest(word, known)
                    if switch is not None and bool in (switch.hint, *typing.get_args(switch.hint)):
                        hint = f": pass {self._spell(switch.name, False)} false"
                    raise UserError(f"unknown option '{word}'{hint}")
                if not equals:
                    is_flag = name in described and described[name].is_flag
                    if is_flag and waiting[:1] not in (["true"], ["false"]):
                        value = "true"
                    elif not waiting:
                        raise UserError(f"option '{argument}' needs a value")
                    else:
                        value = waiting.pop(0)
            if name == "config":
                preset_path(value)  # a wrong name is refused before anything else
            if name in self.repeated:
                typed.setdefault(name, []).append(value)
            else:
                typed[name] = value
        return typed

    def _several(self, argument: str) -> str:
        """What to do about an argument too many."""
        see = f" (see {self.prog} --help)"
        if not {"data", "images"} & {*self.positional}:
            return see
        if os.path.exists(argument):
            return ": put a pattern such as 'shards/*.tar' in quotes, and commas between folders"
        return f": put a path with spaces in quotes{see}"

    @property
    def _rest(self) -> str:
        """The option that takes all further arguments without a name; empty if there is none."""
        last = self.positional[-1:]
        return last[0] if last and last[0] in self.repeated else ""

    def _spell(self, name: str, by_place: bool = True) -> str:
        """An option as the user types it: DATA, --mask-ratio."""
        if by_place and name in self.positional:
            return name.upper()
        return f"--{name.replace('_', '-')}"

    def help(self) -> str:
        """The text of --help: the main options first, then the others by group."""
        described = describe(self.options)
        places = " ".join(
            name.upper() + (" ..." if name == self._rest else "") for name in self.positional
        )
        required = " ".join(
            f"{self._spell(name)} {name.upper()}"
            for name, each in described.items()
            if each.required and name not in self.positional
        )
        usage = " ".join(filter(None, [self.prog, places, required, "[--OPTION VALUE ...]"]))
        about = inspect.cleandoc(self.options.__doc__ or "")
        width = min(100, shutil.get_terminal_size().columns)
        lines = [f"usage: {usage}", "", *textwrap.wrap(" ".join(about.split()), width)]
        groups: dict[str, list[str]] = {MAIN_OPTIONS: []}
        for name, each in described.items():
            if each.rules.refused:
                continue
            first = each.required or each.rules.main or name in self.positional
            own = inspect.cleandoc(self.options.__doc__ or "").splitlines()[0].rstrip(".")
            group = MAIN_OPTIONS if first else each.group
            groups.setdefault("Options" if group == own else group, []).append(name)
        if self.presets:
            groups[MAIN_OPTIONS].append("config")
        for title, names in groups.items():
            if names:
                lines += ["", f"{title}:"]
            for name in names:
                lines += self._entry(name, described.get(name), width)
        return "\n".join(lines) + "\n"

    def _entry(self, name: str, each: Described | None, width: int) -> list[str]:
        """The lines of the help about one option."""
        if each is None:
            head, text = (
                "--config NAME",
                "Preset or YAML file of options; the command line overrides it.",
            )
        else:
            head = self._spell(name)
            if name in self.repeated:
                head += " TEXT" * (name != self._rest)  # one value each time
            elif name not in self.positional and not (each.is_flag and not each.default):
                head += f" {_placeholder(each.hint)}"
            text = each.help.removesuffix(".") + ("" if each.required else _default_text(each))
            text += "." if text else ""
            if name in self.repeated and name != self._rest:
                text += " May be given several times."
        indent = 28
        body = textwrap.wrap(text, width - indent) or [""]
        if len(head) + 4 > indent:
            return [f"  {head}", *[" " * indent + line for line in body]]
        rest = [" " * indent + line for line in body[1:]]
        return [f"  {head}".ljust(indent) + body[0], *rest]


def _placeholder(hint: Any) -> str:
    """Placeholder for the value of an option: N, X, {a,b}, {true,false}, TEXT, A,B."""
    kinds = [hint, *typing.get_args(hint)]
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            choices = [str(choice) for choice in typing.get_args(kind)]
            return "{" + ",".join(choices) + "}" if len(",".join(choices)) < 40 else "NAME"
    if typing.get_origin(hint) is tuple:
        return "A,B"
    for kind, word in ((int, "N"), (float, "X"), (str, "TEXT"), (bool, "{true,false}")):
        if kind in kinds:
            return word
    return "A,B"  # a list, or none


def _default_text(each: Described) -> str:
    """The default in brackets; empty if the help text has it already."""
    value = each.default
    if (
        value is MISSING
        or value is None
        or value == ()
        or value == ""
        or (each.is_flag and not value)
        or "(the default" in each.help
    ):
        return ""
    if isinstance(value, tuple):
        value = ",".join(str(part) for part in value)
    if isinstance(value, bool):
        value = str(value).lower()
    return f" (default: {value})"


__all__ = ["Command", "HelpWanted", "describe_type"]

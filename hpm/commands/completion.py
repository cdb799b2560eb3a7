"""`hpm __complete WORD ...`: what the shell asks at each press of the tab key, so that it always
knows the options of the installed version, and of the user's own evaluations."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from hpm.commands.verbs import ABOUT, GROUPS, VERBS
from hpm.core.errors import UserError
from hpm.core.options import Described, describe, preset_names
from hpm.core.parser import Command


def complete(words: Sequence[str]) -> list[str]:
    """What the last of the words after `hpm` may become; empty where a file may stand."""
    *before, word = words or [""]
    if not before:
        return _starting(word, ABOUT)
    verb, *typed = before
    try:
        if verb in GROUPS and not typed:
            return _starting(word, GROUPS[verb][1]())
        command = _command(verb, typed)
    except UserError:  # for example a verb that does not exist
        return []
    return _complete_option(command, typed, word) if command else []


def _command(verb: str, typed: list[str]) -> Command | None:
    """The command that is being typed, if there is one of that name."""
    if verb in VERBS:
        return VERBS[verb].command(f"hpm {verb}")
    kind = GROUPS[verb][1](typed[0]).get(typed[0]) if verb in GROUPS else None
    return kind.command("") if kind else None


def _complete_option(command: Command, typed: list[str], word: str) -> list[str]:
    options = describe(command.options)
    if typed[-2:-1] and typed[-1] == "=":  # bash splits --mask=random into three words
        return _starting(word, _values(command, options, typed[-2]))
    if word == "=" and typed:
        return _values(command, options, typed[-1])
    if word.startswith("--") and "=" in word:
        name, _, value = word.partition("=")
        return [f"{name}={found}" for found in _starting(value, _values(command, options, name))]
    if word.startswith("-"):
        shown = [name for name, each in options.items() if not each.rules.refused]
        names = [name for name in shown if name not in command.positional]
        names += ["config", "help"] if command.presets else ["help"]
        return _starting(word, [f"--{name.replace('_', '-')}" for name in names])
    return _starting(word, _values(command, options, typed[-1])) if typed else []


def _values(command: Command, options: dict[str, Described], word: str) -> list[str]:
    """The values of the option that `word` names, as far as they can be listed."""
    name = word.removeprefix("--").replace("-", "_")
    if name == "config" and command.presets:
        return preset_names()
    if not word.startswith("--") or name not in options:
        return []
    return _choices(options[name].hint)


def _choices(hint: Any) -> list[str]:
    if hint is bool:
        return ["true", "false"]
    if typing.get_origin(hint) is Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _starting(word: str, known: Iterable[str]) -> list[str]:
    return [each for each in known if each.startswith(word)]

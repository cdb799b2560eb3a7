"""Parts that users add from outside of the package, found by name."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hpm.core.errors import UserError, nearest, one_line


def find_plugin(
    option: str,
    name: str,
    group: str,
    known: Collection[str],
    kind: str = "FUNCTION",
    trusted: bool = True,
) -> Any:
    """The object that an option names, if it is not one of the `known` built-in ones.

    Args:
        option: name of the option, for messages.
        name: `module:attribute`, or a name that an installed package registers. The working
            directory is searched for the module after the Python path.
        group: entry point group of the registered names.
        known: built-in names, for messages.
        kind: what the attribute is, for messages.
        trusted: whether the name comes from the user. If it comes from a weights file, a module
            that is not imported yet is refused, because importing it would run its code.

    Raises UserError where there is no such object, or importing it fails.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        installed = installed_plugins(group)
        if name not in installed:
            names = [*known, *installed]
            raise UserError(
                f"{option} is '{name}'{nearest(name, names)} "
                f"(one of {', '.join(names)}, or MODULE:{kind})"
            )
        module, attribute = installed[name].module, installed[name].attr
    elif not trusted and module not in sys.modules:
        raise UserError(
            f"{option} is '{name}', and a module that a file names is not imported: if you trust "
            f"it, pass `hpm --import {module} ...` (in Python: import {module})"
        )
    if not (module and attribute):
        raise UserError(f"{option} is '{name}': write it as MODULE:{kind}")
    found: Any = import_plugin(f"{option} is '{name}'", module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = nearest(part, dir(found))
            raise UserError(f"{option} is '{name}': {module} has no '{part}'{hint}")
        found = getattr(found, part)
    return found


def find_class(
    option: str,
    name: str,
    group: str,
    known: Collection[str],
    base: type,
    trusted: bool = True,
) -> Any:
    """`find_plugin` for a subclass of `base`."""
    found = find_plugin(option, name, group, known, "CLASS", trusted)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{option} is '{name}': it is not a subclass of {base.__module__}.{base.__name__}"
        )
    return found


def import_plugin(subject: str, module: str) -> ModuleType:
    """Import a module of the user's, which may lie in the working directory.

    subject: start of the message of the UserError that is raised if this fails.
    """
    _search_working_directory()
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0]):
            raise UserError(
                f"{subject}: no module named '{error.name}' in the working directory or on the "
                "Python path"
            ) from None
        raise UserError(f"{subject}: importing it failed: {_located(error)}") from error


def import_named(arguments: Sequence[str]) -> Sequence[str]:
    """Import the modules of `hpm --import MODULE VERB ...`. Returns the other arguments.

    Raises UserError.
    """
    while arguments and arguments[0].split("=")[0] == "--import":
        first, *rest = arguments
        _, equals, module = first.partition("=")
        if not equals:
            module, rest = (rest[0], rest[1:]) if rest else ("", [])
        if not module:
            raise UserError("--import needs the name of a module: hpm --import MODULE VERB ...")
        import_plugin(f"--import {module}", module)
        arguments = rest
    return arguments


def module_exists(module: str) -> bool:
    """Whether there is such a module, also in the working directory."""
    _search_working_directory()
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def installed_plugins(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group, by name."""
    return {entry.name: entry for entry in entry_points(group=group)}


def _search_working_directory() -> None:
    """Find modules in the working directory, as `python -m` does. Last, so that a file there hides
    no installed package."""
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def _located(error: Exception) -> str:
    """An error and the line that raised it: `NameError: name 'x' is not defined (masks.py:3)`."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file, line = last.filename, last.lineno
    if isinstance(error, SyntaxError):
        file, line = error.filename or file, error.lineno
    return f"{type(error).__name__}: {one_line(error)} ({Path(file).name}:{line})"

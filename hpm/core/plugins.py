"""Parts that users add from outside of the package, found by name."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, nearest, one_line


def find_plugin(option: str, name: str, group: str, known: Collection[str]) -> Any:
    """The object that an option names, if it is not one of the `known` built-in ones.

    Args:
        option: name of the option, for messages.
        name: `module:attribute`, or a name that an installed package registers. The working
            directory is searched for the module after the Python path.
        group: entry point group of the registered names.
        known: built-in names, for messages.

    Raises UserError where there is no such object, or importing it fails.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        installed = installed_plugins(group)
        if name not in installed:
            names = [*known, *installed]
            raise UserError(
                f"{option} is '{name}'{nearest(name, names)} "
                f"(one of {', '.join(names)}, or MODULE:FUNCTION)"
            )
        module, attribute = installed[name].module, installed[name].attr
    if not (module and attribute):
        raise UserError(f"{option} is '{name}': write it as MODULE:FUNCTION")
    _search_working_directory()
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0]):
            raise UserError(
                f"{option} is '{name}': no module named '{error.name}' in the working directory or "
                "on the Python path"
            ) from None
        raise UserError(f"{option} is '{name}': importing it failed: {_located(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = nearest(part, dir(found))
            raise UserError(f"{option} is '{name}': {module} has no '{part}'{hint}")
        found = getattr(found, part)
    return found


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

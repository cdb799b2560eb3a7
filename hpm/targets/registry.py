"""Targets by name: the built-in ones, those of installed packages, and those of the user's files.

`--target` is the name of a built-in target, of an entry point in the group `hpm.targets`, or a
dotted name such as `my_module:MyTarget`.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

import torch

from hpm.core.config import PretrainConfig, TargetName
from hpm.core.errors import UserError, nearest, one_line
from hpm.core.options import convert, describe
from hpm.models.architecture import Architecture
from hpm.models.patches import grid_size
from hpm.targets.base import Target, TargetInputs

GROUP = "hpm.targets"
BUILT_IN: dict[str, str] = {
    "normalized_pixels": "hpm.targets.pixels:PixelTarget",
    "pixels": "hpm.targets.pixels:PixelTarget",
    "hog": "hpm.targets.hog:HogTarget",
    "teacher": "hpm.targets.teacher:TeacherTarget",
    "frozen": "hpm.targets.frozen:FrozenTarget",
    "tokens": "hpm.targets.tokens:TokenTarget",
}
assert set(BUILT_IN) == set(get_args(TargetName))


def check_target(config: PretrainConfig) -> None:
    """Raises UserError for the first option that does not go together with the target."""
    kind = find_target(config.target)
    for option, owner in options_of_others(config.target).items():
        value = getattr(config, option)
        if value != describe(PretrainConfig)[option].default:
            raise UserError(
                f"{option} is {value}, but target is {config.target}: leave it out, or pass "
                f"--target {owner}"
            )
    if config.target_options and config.target in BUILT_IN:
        raise UserError(
            f"target_options are for targets of your own, but target is {config.target}: "
            "leave them out"
        )
    read_options(kind, config.target_options)
    kind.check(config)


def options_of_others(target: str) -> dict[str, str]:
    """Options of the config that have no effect with a target: the target that each belongs to."""
    own = find_target(target).config_options
    return {
        option: name
        for name in BUILT_IN
        for option in find_target(name).config_options
        if option not in own
    }


def make_target(
    config: PretrainConfig,
    architecture: Architecture,
    mean: list[float],
    std: list[float],
    device: torch.device,
    fetch: bool = True,
) -> Target:
    """The target of a checked config; `mean` and `std` are those that images are normalised by.

    fetch: False where the config comes from a file and not from the user: then no model is
    downloaded and no module imported that the file names. Raises UserError where something that
    the target needs is missing or does not fit.
    """
    patch_size = architecture.patch_size
    inputs = TargetInputs(
        patch_size=patch_size,
        grid=grid_size(architecture.image_size, patch_size),
        channels=architecture.channels,
        embed_dim=architecture.embed_dim,
        mean=torch.tensor(mean, device=device),
        std=torch.tensor(std, device=device),
        device=device,
        fetch=fetch,
    )
    kind = find_target(config.target, trusted=fetch)
    return kind.build(config, inputs, **read_options(kind, config.target_options))


def find_target(name: str, trusted: bool = True) -> type[Target]:
    """The class of a target. Raises UserError where there is none of this name.

    trusted: the user gave the name. Where it comes from a file of weights, a dotted name is looked
    up among the modules that are imported already, since importing one runs its code.
    """
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name in BUILT_IN:
        return _load(name, BUILT_IN[name])
    if name in plugins:
        return _load(name, plugins[name].value)
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        known = [*BUILT_IN, *sorted(plugins)]
        raise UserError(
            f"target is '{name}'{nearest(name, known)} (one of {', '.join(known)}, or MODULE:CLASS)"
        )
    if not trusted and module not in sys.modules:
        raise UserError(
            f"these weights need the target {name}, but modules named in weights are not imported: "
            f"in Python, import {module} first; on the command line, use a target that was trained "
            f"by its entry point of {GROUP}"
        )
    return _load(name, name)


def _load(name: str, reference: str) -> type[Target]:
    """The class that `module:Class` refers to; modules in the working folder are found too."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        kind = EntryPoint(name, reference, GROUP).load()
    except Exception as error:  # of the user's own code, whatever it is
        raise UserError(f"target {name} cannot be imported: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    if not (isinstance(kind, type) and issubclass(kind, Target)):
        raise UserError(f"target {name} is not a subclass of hpm.targets.base.Target")
    return kind


def read_options(kind: type[Target], texts: tuple[str, ...]) -> dict[str, Any]:
    """The values of `name=value` texts, as the constructor of the target annotates them.

    Raises UserError where the target has no such option, or a value does not fit.
    """
    if not texts:
        return {}
    parameters = dict(list(inspect.signature(kind).parameters.items())[1:])
    hints = typing.get_type_hints(kind.__init__)
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            raise UserError(f"target_options has '{text}': write name=value")
        if name not in parameters:
            has = f"it has {', '.join(parameters)}" if parameters else "it has none"
            raise UserError(
                f"target {kind.__name__} has no option '{name}'{nearest(name, parameters)} ({has})"
            )
        values[name] = convert(f"target option {name}", value.strip(), hints.get(name, str))
    return values

"""Find targets by name: built-in ones, those of installed packages, and those of the user's files.

`--target` is the name of a built-in target, of an entry point in the group `hpm.targets`, or a
dotted name such as `my_module:MyTarget`.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from typing import Any, get_args

import torch

from hpm.core.choices import TargetName
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, nearest
from hpm.core.options import convert, describe
from hpm.core.plugins import find_class
from hpm.models.architecture import Architecture
from hpm.models.patches import grid_size
from hpm.targets.base import Target, TargetInputs

GROUP = "hpm.targets"
BUILT_IN: dict[str, str] = {
    "normalized_pixels": "hpm.targets.pixels:PixelTarget",
    "normalized_channels": "hpm.targets.pixels:ChannelTarget",
    "pixels": "hpm.targets.pixels:PixelTarget",
    "hog": "hpm.targets.hog:HogTarget",
    "teacher": "hpm.targets.teacher:TeacherTarget",
    "frozen": "hpm.targets.frozen:FrozenTarget",
    "tokens": "hpm.targets.tokens:TokenTarget",
}
assert set(BUILT_IN) == set(get_args(TargetName))


def check_target(config: PretrainConfig) -> None:
    """Raise UserError for the first option that is incompatible with the target."""
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
    """Options that have no effect with this target, and the target that each belongs to."""
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
    """Build the target of a checked config. mean, std: normalisation of the images.

    fetch: False if the config comes from a file and not from the user; then no model is downloaded
    and no module imported. Raises UserError if something that the target needs is missing or does
    not match.
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
    """Find the class of a target. Raises UserError if there is none of this name.

    trusted: whether the name comes from the user, see `find_plugin`.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    return find_class("target", name, GROUP, BUILT_IN, Target, trusted)


def read_options(kind: type[Target], texts: tuple[str, ...]) -> dict[str, Any]:
    """Parse `name=value` texts, by the annotations of the target's constructor.

    Raises UserError for an unknown option or an invalid value.
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

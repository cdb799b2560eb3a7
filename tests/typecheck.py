"""Types are checked at run time in every test: beartype checks arguments and results, jaxtyping the
shapes of tensors.

jaxtyping costs ten times as much per call, and decorates every function. So functions without
shapes are left to beartype alone, and functions within functions, which are decorated anew at each
call, to mypy.
"""

import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is a float, as type checkers have it.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Check the functions of `hpm`, which must not have been imported."""
    jaxtyping.jaxtyped = _decorator  # what jaxtyping's import hook decorates with
    jaxtyping.install_import_hook("hpm", "typecheck.typechecker")


def _decorator(typechecker):
    def decorated(target):
        if "<locals>" in target.__qualname__:
            return target
        if not inspect.isclass(target):
            return _checked(target, typechecker)
        if "__dataclass_fields__" in vars(target):
            target.__init__ = _checked(target.__init__, typechecker)
        return target

    return decorated


def _checked(function, typechecker):
    hints = {n: _evaluated(h, function.__globals__) for n, h in function.__annotations__.items()}
    if any(map(_has_shape, hints.values())):
        return _jaxtyped(function, typechecker=typechecker)
    function.__annotations__ = hints
    return typechecker(function)


def _evaluated(hint, names):
    """A type, of its name; anything is right where the name is unknown, as jaxtyping has it."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except Exception:
        return typing.Any


def _has_shape(hint):
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))

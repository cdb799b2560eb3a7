"""Optional libraries, imported where they are used. A missing one is a one-line error."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from hpm.core.errors import UserError

# These import torchvision where it is installed.
NEED_TORCHVISION = ("timm", "torchvision", "transformers")


def need(module: str, extra: str, job: str) -> ModuleType:
    """Import an optional module. Raises UserError naming the extra of `pip install` it is in."""
    try:
        if module.split(".")[0] in NEED_TORCHVISION and find_spec("torchvision"):
            from hpm.core.torchvision_shim import import_torchvision

            import_torchvision()
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{job} needs {error.name or module}: pip install 'hpm-vision[{extra}]'"
        ) from None

"""Optional packages, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> Any:
    """Import an optional package's module.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there and lacks something of its own
        message = f"blaq: {package} is not installed; try pip install 'blaq-kernels[{extra}]'"
        raise ModuleNotFoundError(message, name=package) from None

"""The one place that picks a backend for real tensors.

``BLAQ_BACKEND=auto``, the default, loads the C++ kernels (``blaq_kernels._C``), which serve CPU
tensors; ``reference`` keeps plain PyTorch everywhere. The reference also serves every device that
has no kernel of its own. ``blaq env`` prints what :func:`serving` says.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

import torch

from . import reference
from .schemas import LIBRARY, SCHEMAS, with_checks

BACKENDS = ("auto", "reference")
log = logging.getLogger("blaq")

native: ModuleType | None = None
_reason = ""


def requested_backend() -> str:
    """Value of ``BLAQ_BACKEND``, checked."""
    name = os.environ.get("BLAQ_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"blaq: BLAQ_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def register() -> None:
    """Register the reference for every device and, where wanted and built, the C++ kernels."""
    for name in SCHEMAS:
        LIBRARY.impl(name, with_checks(name, getattr(reference, name)), "CompositeExplicitAutograd")
    _load_native()


def _load_native() -> None:
    global native, _reason
    if requested_backend() == "reference":
        _reason = "BLAQ_BACKEND=reference"
        return
    try:
        from . import _C
    except ImportError as error:
        _reason = f"blaq_kernels._C did not load: {error}"
        log.info("blaq: plain PyTorch serves every op; %s", _reason)
        return
    native, _reason = _C, "no C++ kernel"


def serving() -> dict[str, str]:
    """Which backend serves each op on CPU tensors, and why: what ``blaq env`` prints."""
    def who(name: str) -> str:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"blaq::{name}", "CPU"):
            return f"C++ ({cpu_capability()})"
        return f"reference ({_reason})"

    return {name: who(name) for name in SCHEMAS}


def has_int8() -> bool:
    """Whether CPU kernels compute in 8-bit integers here, from a weight that ``repack`` made."""
    return native is not None and native.has_int8()


def cpu_capability() -> str:
    """Variant of the C++ kernels in use: ``scalar``, ``avx2``, ``avx512`` or ``neon``; ``none`` without."""
    return native.cpu_capability() if native else "none"


def cpu_capabilities() -> list[str]:
    """Variants that this processor can run, ascending; empty without the C++ kernels."""
    return list(native.cpu_capabilities()) if native else []


def set_cpu_capability(name: str) -> None:
    """Choose the variant of the C++ kernels, for tests and measurements.

    Raises:
        ValueError: this processor cannot run ``name``.
        RuntimeError: the C++ kernels are not loaded.
    """
    if native is None:
        raise RuntimeError(f"blaq.set_cpu_capability: the C++ kernels must be loaded, got: {_reason}")
    native.set_cpu_capability(name)

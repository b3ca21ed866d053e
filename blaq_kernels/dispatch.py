"""The one place that picks a backend for real tensors.

The reference serves every device that has no kernel of its own. ``BLAQ_BACKEND=reference`` keeps it
everywhere; ``auto``, the default, loads the C++ kernels for CPU tensors where they are built.
"""

from __future__ import annotations

import logging
import os

from . import reference
from .schemas import LIBRARY, SCHEMAS, with_checks

BACKENDS = ("auto", "reference")
log = logging.getLogger("blaq")


def requested_backend() -> str:
    """Value of ``BLAQ_BACKEND``, checked."""
    name = os.environ.get("BLAQ_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"blaq: BLAQ_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def register() -> None:
    """Register the reference for every device."""
    for name in SCHEMAS:
        LIBRARY.impl(name, with_checks(name, getattr(reference, name)), "CompositeExplicitAutograd")


def serving() -> dict[str, str]:
    """Which backend serves each op on CPU tensors, and why: what ``blaq env`` prints."""
    return {name: "reference" for name in SCHEMAS}

"""CUDA C++ kernels for tensors on a GPU: the op ``name`` is the function ``name`` of the module
``name``, which calls ``torch.ops.blaq_cuda.<name>`` of the library ``blaq_kernels._cuda`` (csrc/cuda)
for what that covers, and Triton's op, or the reference, for the rest. The training ops share one,
``step_call``, which takes addresses: a list of weights is known to the host code by its addresses.

The library is loaded when the first of its ops is wanted. No GPU has run it yet, so only
``BLAQ_BACKEND=cuda`` chooses it (docs/gpu-status.md).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from .. import triton

NATIVE = ("repack", "packed_linear", "binary_linear")  # in C++ too
OPS = (*NATIVE, "solve", "fused_trial", "fused_step")
ARCHITECTURES = ((8, None), (9, 0), (10, 0), (12, 0))
"""Compute capabilities that the library has code for: sm_80 serves every 8.x, the others themselves."""

log = logging.getLogger("blaq")
_library: torch.library.Library | None = None


def unavailable() -> str:
    """Why the kernels cannot run here, or nothing if they can; the library itself is not loaded."""
    if importlib.util.find_spec("blaq_kernels._cuda") is None:
        return "blaq_kernels._cuda was not built (BLAQ_CUDA=1 and nvcc build it)"
    if torch.version.cuda is None:
        return "blaq_kernels._cuda is for a torch that is built with CUDA, and this one is not"
    if not torch.cuda.is_available():
        return "blaq_kernels._cuda is for a GPU, and torch finds no CUDA device"
    return ""


def load() -> None:
    """Defines ``torch.ops.blaq_cuda``, with the schemas of ``torch.ops.blaq``, and loads its kernels.

    Raises:
        OSError: the library does not load.
    """
    global _library
    if _library is not None:
        return
    from ..schemas import SCHEMAS, STEP_CALL

    library = torch.library.Library("blaq_cuda", "DEF")
    for name in NATIVE:
        library.define(name + SCHEMAS[name])
    library.define("packed_int8" + SCHEMAS["packed_linear"])
    library.define("step_call" + STEP_CALL)
    torch.ops.load_library(importlib.util.find_spec("blaq_kernels._cuda").origin)
    _library = library


@functools.cache
def major(device: torch.device) -> int:
    """Compute capability's first number."""
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def covers(device: torch.device) -> bool:
    """Whether the library has code for this device; where it has none, says so once, at INFO."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ARCHITECTURES or (major, None) in ARCHITECTURES:
        return True
    log.info("blaq: the CUDA kernels have no code for %s, compute capability %d.%d; %s serves it",
             device, major, minor, "plain PyTorch" if triton.unavailable() else "Triton")
    return False


def serving(name: str) -> str:
    """What serves the op, in words."""
    rest = "reference" if triton.unavailable() or name not in triton.OPS else "Triton"
    long = f"CUDA C++ (groups of more than 8192 weights; else {rest})"
    linear = f"CUDA C++ (repacked, to 64 rows of 16 bits; more with accuracy fast; else {rest})"
    limits = {**dict.fromkeys(("solve", "fused_trial", "fused_step"), long), "packed_linear": linear}
    return limits.get(name, "CUDA C++")


def function(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The op ``name``, which gives to ``otherwise`` what the kernels do not cover."""
    load()
    module = importlib.import_module(f"{__name__}.{name}")
    return functools.partial(getattr(module, name), otherwise)

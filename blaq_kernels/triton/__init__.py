"""Triton kernels for tensors on a GPU: the op ``name`` is the function ``name`` of the module ``name``.

Nothing here imports Triton until an op is called, and the package works without it. With
``TRITON_INTERPRET=1`` the same functions take CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch

MINIMUM = (3, 6)
OPS = ("scaled_update", "blend", "solve", "fused_trial", "fused_step", "fake_quantize", "pack", "unpack",
       "packed_linear", "packed_conv2d")


def unavailable() -> str:
    """Why the kernels cannot run, or nothing if they can; Triton itself is not imported."""
    if torch.version.hip:
        return "the kernels hold instructions of NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build that carries another name
        version = importlib.import_module("triton").__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < MINIMUM:
        return f"Triton {version} is older than {'.'.join(map(str, MINIMUM))}"
    return ""


def function(name: str) -> Callable[..., Any]:
    """The op ``name``; its module, and Triton with it, is imported by the first call."""
    body: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal body
        if body is None:
            body = getattr(importlib.import_module(f"{__name__}.{name}"), name)
        return body(*args)

    return call

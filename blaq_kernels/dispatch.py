"""The one place that picks a backend for real tensors.

``BLAQ_BACKEND`` is one of

* ``auto``, the default: C++ kernels (``blaq_kernels._C``) for CPU tensors, Triton kernels for CUDA
  tensors, each where it is there;
* ``triton``: the same, but an error where Triton is missing or too old;
* ``cuda``: CUDA C++ kernels (``blaq_kernels._cuda``) for what they cover on the devices that they have
  code for, Triton for the rest; an error where they cannot run. No GPU has run them yet, so that
  ``auto`` does not choose them;
* ``reference``: plain PyTorch everywhere.

The reference also serves every op and device that has no kernel of its own. ``blaq env`` prints what
:func:`serving` says.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

import torch

from . import cuda, reference, triton
from .schemas import LIBRARY, SCHEMAS, with_checks

BACKENDS = ("auto", "triton", "cuda", "reference")
log = logging.getLogger("blaq")

native: ModuleType | None = None
_reasons: dict[str, str] = {}  # why a device's tensors go to the reference
_cuda_ops: set[str] = set()  # that CUDA C++ kernels serve


def requested_backend() -> str:
    """Value of ``BLAQ_BACKEND``, checked."""
    name = os.environ.get("BLAQ_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"blaq: BLAQ_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and (why := triton.unavailable()):
        raise RuntimeError(f"blaq: BLAQ_BACKEND=triton must find Triton "
                           f"{'.'.join(map(str, triton.MINIMUM))} or newer, got: {why}")
    if name == "cuda" and (why := cuda.unavailable()):
        raise RuntimeError(f"blaq: BLAQ_BACKEND=cuda must find CUDA C++ kernels, got: {why}; try "
                           "triton or auto")
    return name


def register() -> None:
    """Register the reference for every device and, where wanted and there, the kernels."""
    for name in SCHEMAS:
        LIBRARY.impl(name, with_checks(name, getattr(reference, name)), "CompositeExplicitAutograd")
    if requested_backend() == "reference":
        _reasons.update(dict.fromkeys(("cpu", "cuda"), "BLAQ_BACKEND=reference"))
        return
    _load_native()
    _register_gpu(with_cuda=requested_backend() == "cuda")


def _load_native() -> None:
    global native
    try:
        from . import _C
    except ImportError as error:
        _reasons["cpu"] = f"blaq_kernels._C did not load: {error}"
        log.info("blaq: plain PyTorch serves every op on the CPU; %s", _reasons["cpu"])
        return
    native, _reasons["cpu"] = _C, "no C++ kernel"


def _register_gpu(with_cuda: bool) -> None:
    _reasons["cuda"] = triton.unavailable() or "no Triton kernel"
    kernels = {} if triton.unavailable() else {name: triton.function(name) for name in triton.OPS}
    if triton.unavailable():
        log.info("blaq: plain PyTorch serves what no other kernel does on CUDA devices; %s",
                 _reasons["cuda"])
    if with_cuda:
        for name in cuda.OPS:
            plain = with_checks(name, getattr(reference, name))
            kernels[name] = cuda.function(name, otherwise=kernels.get(name, plain))
            _cuda_ops.add(name)
    for name, kernel in kernels.items():
        LIBRARY.impl(name, kernel, "CUDA")


def serving(device: str = "cpu") -> dict[str, str]:
    """Which backend serves each op on tensors of a device, and why: what ``blaq env`` prints.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"blaq.serving: device must be 'cpu' or 'cuda', got {device!r}")

    def who(name: str) -> str:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"blaq::{name}", device.upper()):
            if device == "cpu":
                return f"C++ ({cpu_capability()})"
            return cuda.serving(name) if name in _cuda_ops else "Triton"
        return f"reference ({_reasons[device]})"

    return {name: who(name) for name in SCHEMAS}


def has_int8() -> bool:
    """Whether CPU kernels compute in 8-bit integers here, from a weight that ``repack`` made."""
    return native is not None and native.int8_kernels() != ""


def int8_kernels() -> str:
    """Instructions that CPU kernels compute with in 8-bit integers here: ``AVX-512 VNNI``, ``AVX2`` or
    ``NEON``; empty where the capability in use has none."""
    return str(native.int8_kernels()) if native else ""


def reads_repacked(device: torch.device, op: str = "packed_linear") -> bool:
    """Whether ``packed_linear`` or ``binary_linear`` on this device reads a repacked weight."""
    if device.type == "cuda":
        return op in _cuda_ops and cuda.covers(device)
    return device.type == "cpu" and (has_int8() if op == "packed_linear" else native is not None)


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
        raise RuntimeError(f"blaq.set_cpu_capability: the C++ kernels must be loaded, got: {_reasons['cpu']}")
    native.set_cpu_capability(name)

"""What every launch needs: a device that can run it, and that device as the current one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..schemas import require


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return triton.knobs.runtime.interpret


def check_device(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless kernels can run where ``x`` is."""
    if not (x.is_cuda or interpreted()):
        require(False, op, name, "be on a CUDA device (or TRITON_INTERPRET=1 be set)", x.device)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current: Triton launches on the current device and stream."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as a number."""
    return driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes what the current stream of the current device is given."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_same_device(x: Tensor, device: torch.device) -> Tensor:
    """A 0-dim tensor as kernels read it. One on the CPU is written to the device without waiting for
    it: a captured graph replays that value, so what a graph is to follow belongs on the device."""
    if x.device == device:
        return x
    return torch.full((), x.item(), dtype=x.dtype, device=device)


def aligned(*tensors: Tensor) -> bool:
    """Whether every tensor begins where a 128-bit load may."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)


class Launch:
    """A kernel with all its arguments but the tensors, whose types stay those of the first call.

    Triton looks at every argument of every call for the machine code that fits, which takes longer
    than a small product. Here only addresses differ from call to call, and of those only whether each
    is a multiple of 16: where all are, what was compiled once is launched.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], *rest: Any, num_warps: int) -> None:
        self._kernel, self._grid, self._rest, self._warps = kernel, grid, rest, num_warps
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        addresses = 0
        for x in tensors:
            if x is not None:
                addresses |= x.data_ptr()
        if self._compiled is not None and addresses % 16 == 0:
            self._compiled(*tensors, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._rest, num_warps=self._warps)
        if compiled is not None and addresses % 16 == 0:  # the interpreter compiles nothing
            self._compiled = compiled[self._grid]

"""What every launch of Triton's needs: a device that can run it, and code that was compiled
once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from ..device import aligned, on_device_of
from ..rules import require

__all__ = ["Launch", "aligned", "check_device", "interpreted", "on_device_of"]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return triton.knobs.runtime.interpret


def check_device(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless kernels can run where ``x`` is."""
    if not (x.is_cuda or interpreted()):
        require(False, op, name, "be on a CUDA device (or TRITON_INTERPRET=1 be set)", x.device)


class Launch:
    """A kernel with all its arguments but the tensors, whose types stay those of the first call.

    Triton looks at every argument of every call for the machine code that fits, which takes longer
    than a small product. Here only addresses differ from call to call, and of those only whether
    each is a multiple of 16: where all are, what was compiled once is launched. It takes numbers: a
    tensor it would ask for its address again, and the driver whether that is the device's.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], *rest: Any, num_warps: int) -> None:
        self._kernel, self._grid, self._rest, self._warps = kernel, grid, rest, num_warps
        self._compiled: Callable[[list[int | None]], None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        addresses: list[int | None] = []
        bits = 0
        for x in tensors:
            address = None if x is None else x.data_ptr()
            addresses.append(address)
            bits |= address or 0
        is_aligned = bits & 15 == 0
        if self._compiled is not None and is_aligned:
            self._compiled(addresses)
            return
        compiled = self._kernel[self._grid](*tensors, *self._rest, num_warps=self._warps)
        if compiled is not None and is_aligned:  # the interpreter compiles nothing
            self._compiled = _starting(compiled, self._grid, self._rest)


def _starting(compiled: Any, grid: tuple[int, int, int],
              rest: tuple[Any, ...]) -> Callable[[list[int | None]], None]:
    """``compiled[grid]``, without what that makes for profilers on every call, if there is none: by
    arguments that are those of Triton 3.6."""
    start, runtime, driver = compiled[grid], triton.knobs.runtime, triton.runtime.driver
    if not triton.__version__.startswith("3.6.") or not all(
            type(hook) is triton.knobs.HookChain
            for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook)):
        return lambda addresses: start(*addresses, *rest)
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(addresses: list[int | None]) -> None:
        if (enter.calls or leave.calls or runtime.launch_enter_hook is not enter
                or runtime.launch_exit_hook is not leave):
            start(*addresses, *rest)
        else:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            run(*grid, stream, function, metadata, None, None, None, *addresses, *rest)

    return launch

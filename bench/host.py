"""What a call on a GPU costs the processor, measured without one: on tensors of the CPU, with all of
Triton's Python but its compiler, up to the driver's launch, which is replaced by nothing.

    python bench/host.py            # Triton must be installed; TRITON_INTERPRET must not be set
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from blaq_kernels import flat
from blaq_kernels.codebook import levels_of
from blaq_kernels.schemas import SCHEMAS
from blaq_kernels.triton import function, launch

FUNCTIONS = {name: function(name) for name in
             ("packed_linear", "fused_trial", "fused_step")}


class Driver:
    """A GPU that is not there, as Triton asks for it."""

    utils = mock.MagicMock()
    utils.get_device_properties.return_value = {"max_shared_mem": 232448}
    utils.load_binary.return_value = (object(), 0, 32, 0, 1024)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None


def microseconds(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Median of calls."""
    for _ in range(20):
        call()
    samples, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
    return statistics.median(samples) * 1e-3


def linear_calls() -> dict[str, tuple[Any, ...]]:
    levels, qweight = levels_of("pow2", 1), torch.zeros(1, 4096, 512, dtype=torch.uint8)
    small = qweight[:, :64, :8].contiguous()
    scale = torch.rand(4096, 1)
    x = torch.randn(1, 4096, dtype=torch.bfloat16)
    return {"packed_linear 1x64x64": (x[:, :64].contiguous(), small, scale[:64], None, levels, -1),
            "packed_linear 1x4096x4096, k in parts": (x, qweight, scale, None, levels, -1),
            "packed_linear 40x4096x4096": (x.expand(40, -1).contiguous(), qweight, scale, None, levels, -1)}


def step_calls(count: int, together: bool, size: int = 64) -> dict[str, tuple[Any, ...]]:
    """A step's lists; the states of all weights in one tensor each where ``together``."""
    def new(*shape: int) -> list[torch.Tensor]:
        return flat.join([torch.rand(shape) for _ in range(count)])

    lists = {name: new(size) for name in ("params", "grads", "trial_grads")}
    states = {name: new(1 if name == "scales" else size) for name in flat.STATES}
    if together and count > 1:
        states = {name: [flat.joined(tensors)] for name, tensors in states.items()}
    scalars = torch.tensor(1e-3), torch.tensor(3.0)  # lr, step
    hyper = 0.9, 0.999, 1e-8, 0.0, 0.0, levels_of("pow2", 1), 0, 5, "alternating"
    params, grads, trial_grads = lists.values()
    flips = torch.zeros(count, dtype=torch.int64)
    return {"fused_trial": (params, grads, *states.values(), *scalars, *hyper),
            "fused_step": (params, grads, trial_grads, *states.values(), *scalars,
                           torch.tensor(0.6), *hyper, None, None, flips)}


def show(title: str, name: str, args: Iterable[Any]) -> None:
    args = tuple(args)
    op = getattr(torch.ops.blaq_host, name).default
    kernel = microseconds(lambda: FUNCTIONS[name](*args))
    with torch.inference_mode():
        print(f"{title:38} {kernel:8.1f} {microseconds(lambda: op(*args)):26.1f}")


def main() -> None:
    library = torch.library.Library("blaq_host", "DEF")
    for name, kernel in FUNCTIONS.items():
        library.define(name + SCHEMAS[name])
        library.impl(name, kernel, "CPU")
    print(f"{'microseconds a call':38} {'kernel':>8} {'torch.ops, inference mode':>26}")
    driver.set_active(Driver())
    with mock.patch.object(launch, "interpreted", lambda: True):
        for title, args in linear_calls().items():
            show(title, "packed_linear", args)
        for count, together, size in ((1, True, 64), (1, True, 10_000), (161, False, 64), (161, True, 64)):
            for name, args in step_calls(count, together, size).items():
                show(f"{name}, {count} x {size}" + ", flat states" * (together and count > 1), name,
                     args)


if __name__ == "__main__":
    main()

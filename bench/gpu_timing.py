"""Times on a GPU: CUDA graphs, medians of interleaved rounds, data that no cache holds.

A variant is a list of calls that do the same work on different data, together larger than the L2 cache.
They are captured in one graph; a sample is one replay over the number of calls, so it holds the work and
the gap between kernels, and nothing of Python or of the events.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ROUNDS = 20
LEAST_SECONDS = 2e-4  # of a sample: some hundred times what an event resolves
COLD_BYTES = 512 << 20  # read between two uses of the same data


@dataclass(frozen=True)
class Variant:
    """Calls that do the same work.

    Attributes:
        calls: one for each set of data.
        bytes: least traffic of one call.
        operations: multiplications and additions of one call.
        captured: whether a CUDA graph can hold it.
    """

    calls: Sequence[Callable[[], object]]
    bytes: float = 0
    operations: float = 0
    captured: bool = True


def copies(nbytes: int, most: int = 48) -> int:
    """Sets of data of this size that no cache holds together."""
    return max(1, min(most, math.ceil(COLD_BYTES / max(nbytes, 1))))


def measure(variants: Mapping[str, Variant], rounds: int = ROUNDS,
            deadline: float = math.inf) -> dict[str, list[float]]:
    """Seconds of one call, a value for each round; every round runs every variant once."""
    replays = {name: _capture(variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(rounds):
        if done >= 5 and time.monotonic() > deadline:
            break
        for name, (replay, count) in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()  # brings clocks and, for a single set of data, caches to a steady state
            start.record()
            replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) * 1e-3 / count)
    return seconds


def _capture(variant: Variant) -> tuple[Callable[[], object], int]:
    def once() -> None:
        for call in variant.calls:
            call()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm: compiles, allocates, makes handles
        once()
        once()
    torch.cuda.synchronize()
    start = time.perf_counter()
    once()
    torch.cuda.synchronize()
    repeats = max(1, math.ceil(LEAST_SECONDS / (time.perf_counter() - start)))
    if not variant.captured:
        def eager() -> None:
            for _ in range(repeats):
                once()

        return eager, repeats * len(variant.calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            once()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, repeats * len(variant.calls)


def host_microseconds(call: Callable[[], object], count: int = 500) -> float:
    """What one eager call costs the processor, while the GPU keeps up: median of batches."""
    for _ in range(20):
        call()
    samples = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count // 10):
            call()
        samples.append((time.perf_counter() - start) / (count // 10))
    torch.cuda.synchronize()
    return statistics.median(samples) * 1e6


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written both counted."""
    x = torch.empty(2 << 28, dtype=torch.float32, device="cuda").normal_()
    y = torch.empty_like(x)
    times = measure({"copy": Variant([lambda: y.copy_(x)])})["copy"]
    return 2 * x.nbytes / statistics.median(times)


def gemm_rate(dtype: torch.dtype, n: int = 8192) -> float:
    """Operations a second of torch's own product of random matrices."""
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    times = measure({"gemm": Variant([lambda: torch.mm(a, b)])})["gemm"]
    return 2 * n**3 / statistics.median(times)

"""Interleaved timing: every round runs every variant once, so that noise hits all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Timing", "measure", "quantile"]

SAMPLE_SECONDS = 1e-3
"""Shortest sample: 10,000 times what reading the clock costs."""
WARM_UP_SECONDS = 0.02
FEWEST_ROUNDS = 5


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values.

    >>> quantile([3.0, 1.0, 2.0], 0.25)
    1.5
    """
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Timing:
    """What one variant took.

    Attributes:
        seconds: of one call, a value for each round.
        repeats: calls in a round, whose mean that value is.
    """

    seconds: tuple[float, ...]
    repeats: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.seconds, 0.8)

    def over(self, other: Timing) -> float:
        """This time over the other's: the median of the rounds' ratios, which a slow minute that
        hits both leaves alone."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(variants: Mapping[str, Callable[[], object]], rounds: int = 20,
            most_seconds: float = 30.0,
            before: Callable[[], object] | None = None, pause: float = 0.0) -> dict[str, Timing]:
    """Time the variants in interleaved rounds, A B C A B C ….

    Each is called until it is warm; then a sample is as many calls as last a millisecond. Before a
    sample of several calls comes one that is not timed, which brings the variant's own data back
    into the caches: such a time is that of a loop over the same data.

    Args:
        variants: callables by name; what they return is dropped.
        rounds: samples of each variant.
        most_seconds: no round is begun after this time, but for the first five.
        before: called, untimed, ahead of every sample, which is then one call.
        pause: seconds to sleep ahead of every sample.

    Returns:
        a :class:`Timing` for each name, all with the same number of rounds.
    """
    if rounds < 1:
        raise ValueError(f"blaq.bench.measure: rounds must be at least 1, got {rounds}")
    repeats = {name: _repeats(call) for name, call in variants.items()}
    if before:
        repeats = dict.fromkeys(repeats, 1)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > most_seconds:
                break
            for name, call in variants.items():
                if pause:
                    time.sleep(pause)
                if before:
                    before()
                elif repeats[name] > 1:
                    call()
                seconds[name].append(_sample(call, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(seconds[name]), repeats[name]) for name in variants}


def _sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / repeats


def _repeats(call: Callable[[], object]) -> int:
    """Calls that fill a sample, by the fastest of those that warm the variant up."""
    end = time.perf_counter() + WARM_UP_SECONDS
    fastest = _sample(call, 1)  # allocates, fills caches, starts threads
    while True:
        fastest = min(fastest, _sample(call, 1))
        if time.perf_counter() >= end:
            return max(1, math.ceil(SAMPLE_SECONDS / max(fastest, 1e-9)))

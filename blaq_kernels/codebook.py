"""Codebooks: the magnitudes that a quantized weight may take, in ascending order, the largest 1.

A codebook is symmetric: every magnitude exists with both signs. A code is ``bits`` wide, its most
significant bit the sign (1 is negative), the rest the index into the ascending magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_LEVELS = 8


def levels_of(name: str, bits: int) -> tuple[float, ...]:
    """Ascending magnitudes of a named codebook.

    Args:
        name: ``binary``, ``pow2`` (the paper's), ``ternary``, ``linear``, ``pow2_zero`` or ``uniform``.
        bits: width of a code, 1 to 4.

    >>> levels_of("pow2", 3)
    (0.125, 0.25, 0.5, 1.0)
    """
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"blaq.levels_of: bits must be 1, 2, 3 or 4, got {bits!r}")
    count = 2 ** (bits - 1)
    n = count - 1
    if name == "binary":
        _require_bits(name, bits, (1,))
        return (1.0,)
    if name == "pow2":  # Q = {±1, ±1/2, …, ±2^-(L-1)}
        return tuple(2.0 ** (i - count + 1) for i in range(count))
    if name == "ternary":
        _require_bits(name, bits, (2,))
        return (0.0, 1.0)
    if name == "linear":  # LAQ-linear, arXiv 1802.08635
        _require_bits(name, bits, (2, 3, 4))
        return tuple(i / n for i in range(count))
    if name == "pow2_zero":  # LAQ-log, arXiv 1802.08635
        _require_bits(name, bits, (2, 3, 4))
        return (0.0, *(2.0 ** (i - n + 1) for i in range(n)))
    if name == "uniform":  # symmetric grid without zero: 1/3, 1 at 2 bits
        return tuple((2 * i + 1) / (2 * count - 1) for i in range(count))
    raise ValueError(
        "blaq.levels_of: name must be one of binary, pow2, ternary, linear, pow2_zero, uniform, "
        f"got {name!r}"
    )


def _require_bits(name: str, bits: int, allowed: tuple[int, ...]) -> None:
    if bits not in allowed:
        raise ValueError(f"blaq.levels_of: bits must be one of {allowed} for {name!r}, got {bits}")


def bits_of(levels: Sequence[float]) -> int:
    """Width of a code for this many magnitudes: one sign bit and an index."""
    return 1 + (len(levels) - 1).bit_length()


def midpoints(levels: Sequence[float]) -> list[float]:
    """Decision thresholds between neighbouring magnitudes, as fractions of the scale."""
    return [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]


def check_levels(op: str, levels: Sequence[float], most: int = MAX_LEVELS) -> None:
    """Raise ValueError unless ``levels`` is a codebook: 1 to ``most`` magnitudes, ascending, last 1."""
    rule = f"have 1 to {most} ascending magnitudes in [0, 1], the largest 1.0"
    ok = 1 <= len(levels) <= most and levels[-1] == 1.0 and levels[0] >= 0.0
    ok = ok and all(a < b for a, b in zip(levels, levels[1:], strict=False))
    if not ok:
        raise ValueError(f"blaq.{op}: levels must {rule}, got {list(levels)}")

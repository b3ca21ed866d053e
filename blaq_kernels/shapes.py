"""What a weight's shape says of its matrix and of its scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["matrix_shape", "scale_shape"]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """``(N, K)`` of a weight: a conv weight counts as ``[out, in·kh·kw]``."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def scale_shape(shape: Sequence[int], group_size: int) -> tuple[int, ...]:
    """Shape of ``scale`` for a weight of this shape."""
    n, k = matrix_shape(shape)
    if group_size == 0:
        return (1,)
    if group_size == -1:
        return (n, 1)
    return (n, -(-k // group_size))

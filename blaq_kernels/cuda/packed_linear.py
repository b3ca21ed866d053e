"""torch.ops.blaq.packed_linear: input @ weightᵀ + bias, the weight read from fragments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import cuda
from ..schemas import check_packed_linear

__all__ = ["packed_linear"]

MAX_INPUTS, MAX_OUTPUTS = 2**24 - 1, 2**30 - 1
MAX_ROWS = 64  # beyond them the weight is worth decoding once for more rows than these kernels hold
DTYPES = (torch.float16, torch.bfloat16)
MOST_CALLS = 4096
_covered: dict[object, bool] = {}  # calls whose arguments have passed the rules: are they for us?


def packed_linear(otherwise: Callable[..., Tensor], input: Tensor, qweight: Tensor, scale: Tensor,
                  bias: Tensor | None, levels: Sequence[float], group_size: int,
                  repacked: Tensor | None = None, accuracy: str = "high") -> Tensor:
    """``input @ weight.T + bias`` with ``weight = round(level × scale)`` to the input's dtype.

    Args:
        otherwise: serves what is not 1 to 64 rows of float16 or bfloat16 and a repacked weight.
        input: ``[..., K]``, any layout.
        qweight, scale, bias, levels, group_size: as ``reference.packed_linear`` has them.
        repacked: ``repack(qweight)``, made on this device.
        accuracy: for CPU kernels; every GPU kernel is exact.

    Returns:
        ``[..., N]`` of the input's dtype: sums in float32, rounded once.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    args = (input, qweight, scale, bias, levels, group_size, repacked, accuracy)
    if repacked is None or input.dtype not in DTYPES:
        return otherwise(*args)
    key = (_facts(input), _facts(qweight), _facts(scale), None if bias is None else _facts(bias),
           tuple(levels), group_size, _facts(repacked), accuracy)
    covered = _covered.get(key)
    if covered is None:
        check_packed_linear(*args)
        if len(_covered) >= MOST_CALLS:
            _covered.clear()
        k, n = input.shape[-1], qweight.shape[1]
        rows = math.prod(input.shape[:-1])
        fits = rows <= MAX_ROWS and k <= MAX_INPUTS and n <= MAX_OUTPUTS
        covered = _covered[key] = fits and cuda.covers(input.device)
    if not covered:
        return otherwise(*args)
    return torch.ops.blaq_cuda.packed_linear.default(*args)


def _facts(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype, x.device

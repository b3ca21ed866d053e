"""torch.ops.blaq.packed_linear: input @ weightᵀ + bias, the weight read from fragments; or, for many
rows and where 8 bits are precise enough, from the planes themselves, by integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import cuda
from ..packed_rules import check_packed_linear

__all__ = ["packed_linear"]

MAX_INPUTS, MAX_OUTPUTS = 2**24 - 1, 2**30 - 1
MAX_ROWS = 64  # beyond them the weight is worth decoding once for more rows than these kernels hold
DTYPES = (torch.float16, torch.bfloat16)
INT8_DTYPES = (*DTYPES, torch.float32)
INT8_GROUP = 128  # inputs of a chunk, with which sums of a group can end
INT8_MAJORS = (8, 9, 12)
"""Compute capabilities whose int8 products have twice the rate of bfloat16's by the instructions
that the kernels use: mma.sync, on 9.0 wgmma. On 10.0 only tcgen05 has such a rate: Triton serves."""
MOST_CALLS = 4096
_kernels: dict[object, str] = {}  # for calls whose arguments have passed the rules: who serves them


def packed_linear(otherwise: Callable[..., Tensor], input: Tensor, qweight: Tensor, scale: Tensor,
                  bias: Tensor | None, levels: Sequence[float], group_size: int,
                  repacked: Tensor | None = None, accuracy: str = "high") -> Tensor:
    """``input @ weight.T + bias`` with ``weight = round(level × scale)`` to the input's dtype.

    Args:
        otherwise: serves the rest of what is 1 to 64 rows of float16 or bfloat16 and a repacked weight,
            or more rows, also of float32, with accuracy ``fast`` and scales of a tensor, a row or a
            multiple of 128 inputs.
        input: ``[..., K]``, any layout.
        qweight, scale, bias, levels, group_size: as ``reference.packed_linear`` has them.
        repacked: ``repack(qweight)``, made on this device.
        accuracy: ``fast`` lets more than 64 rows be rounded to 8 bits, in a unit for each 256 inputs:
            below 1e-2 off on Gaussian inputs; a row with NaN or Inf becomes NaN. All else is exact.

    Returns:
        ``[..., N]`` of the input's dtype: sums in float32 (or int32), rounded once.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    args = (input, qweight, scale, bias, levels, group_size, repacked, accuracy)
    if repacked is None and accuracy != "fast" or input.dtype not in INT8_DTYPES:
        return otherwise(*args)
    key = (*(None if x is None else _facts(x) for x in (input, qweight, scale, bias, repacked)),
           tuple(levels), group_size, accuracy)
    kernel = _kernels.get(key)
    if kernel is None:
        check_packed_linear(*args)
        if len(_kernels) >= MOST_CALLS:
            _kernels.clear()
        kernel = _kernels[key] = _kernel_for(*args)
    if not kernel or kernel == "packed_linear" and repacked.data_ptr() % 16:
        return otherwise(*args)  # it reads 16 bytes at once
    return getattr(torch.ops.blaq_cuda, kernel).default(*args)


def _kernel_for(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                levels: Sequence[float], group_size: int, repacked: Tensor | None, accuracy: str) -> str:
    """The op of ``torch.ops.blaq_cuda`` for a call; nothing where there is none."""
    k, n = input.shape[-1], qweight.shape[1]
    if k > MAX_INPUTS or n > MAX_OUTPUTS or not cuda.covers(input.device):
        return ""
    if math.prod(input.shape[:-1]) <= MAX_ROWS:
        return "packed_linear" if repacked is not None and input.dtype in DTYPES else ""
    whole_book = len(levels) == 1 << (qweight.shape[0] - 1)  # a code that no level has is NaN
    fitting = group_size <= 0 or group_size % INT8_GROUP == 0
    by_integers = accuracy == "fast" and k > 0 and whole_book and fitting
    return "packed_int8" if by_integers and cuda.major(input.device) in INT8_MAJORS else ""


def _facts(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype, x.device

"""torch.ops.blaq.binary_linear: signs times signs, counted by tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import cuda
from ..packed_rules import check_binary_linear

__all__ = ["binary_linear"]


def binary_linear(otherwise: Callable[..., Tensor], input: Tensor, qweight: Tensor, scale: Tensor,
                  bias: Tensor | None, group_size: int, repacked: Tensor | None = None) -> Tensor:
    """Signs of the input times a 1-bit weight, as ``reference.binary_linear`` has it: sums of signs
    are integers, so exact but for their scale's and the bias's rounding.

    Args:
        otherwise: serves devices that the kernels have no code for.
        input, qweight, scale, bias, group_size: as there.
        repacked: ``binary_repack(qweight, …)``; made where it is not given.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    args = (input, qweight, scale, bias, group_size)
    if not cuda.covers(input.device):
        return otherwise(*args, repacked)
    check_binary_linear(*args, repacked)
    if repacked is None or repacked.data_ptr() % 16:  # the kernels read 16 bytes at once
        repacked = torch.ops.blaq.binary_repack.default(qweight, input.shape[-1], 1, 1)
    return torch.ops.blaq_cuda.binary_linear.default(*args, repacked)

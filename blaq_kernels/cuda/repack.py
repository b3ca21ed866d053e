"""torch.ops.blaq.repack: bit planes in the order of tensor cores' fragments (csrc/cuda/fragments.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import cuda
from ..packed_rules import check_repack

__all__ = ["repack"]


def repack(otherwise: Callable[[Tensor], Tensor], qweight: Tensor) -> Tensor:
    """uint8 ``[bits, N, ceil(K/8)]``, contiguous, to as many bytes as ``packed_rules.repacked_bytes`` says.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
        torch.OutOfMemoryError: nothing has changed.
    """
    if not cuda.covers(qweight.device):
        return otherwise(qweight)
    check_repack(qweight)
    return torch.ops.blaq_cuda.repack.default(qweight)

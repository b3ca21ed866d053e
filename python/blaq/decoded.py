"""Products with a decoded weight, where torch's own are faster than those with the packed one: for
few outputs, preparing a row of inputs costs more than the products take.

The bounds were measured on a Zen 4, 1 and 2 threads, at 1 to 4 bits; ``blaq bench sweep`` looks for
shapes that they get wrong. Convolutions have theirs in ``decoded_conv.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ALL", "Decoded", "bounds", "linear", "takes_linear", "version"]

MOST_WEIGHTS = 1 << 20
"""That a layer keeps decoded."""
FEW_OUTPUTS, FEW_WEIGHTS, FEW_PRODUCTS = 32, 1 << 12, 1 << 16
MANY_ROWS, LONG = 1024, 256
TABLE_OUTPUTS = {torch.float32: (40, 88, 32, 32), torch.bfloat16: (128, 384, 384, 384)}
"""Outputs that a row's tables, or integers, of 16 bits must serve to pay, for 1 to 4 bits."""
TABLE_ROWS = {torch.float32: (32, 32, 32, 32), torch.bfloat16: (1024, 256, 256, 256)}
"""From this many rows on; for fewer, starting torch's product takes as long."""
ALL = 1 << 62


def version(tensor: Tensor) -> int:
    """Counts writes, which tensors made in inference mode do not."""
    return 0 if tensor.is_inference() else tensor._version


class Decoded(NamedTuple):
    """A decoded weight, of what, and which inputs a layer multiplies by it at once.

    Attributes:
        versions: of ``qweight`` and ``scale``.
        most, least: see :func:`bounds`.
        accuracy, layout: that the layer was asked for, and that of its inputs.
    """

    qweight: Tensor
    scale: Tensor
    versions: tuple[int, int]
    most: int
    least: int
    accuracy: str
    layout: torch.memory_format
    weight: Tensor

    def is_of(self, qweight: Tensor, scale: Tensor) -> bool:
        return (self.qweight is qweight and self.scale is scale
                and self.versions == (version(qweight), version(scale)))

    def serves(self, input: Tensor, qweight: Tensor, scale: Tensor) -> bool:
        """Whether the tensors are those still, and the input is one for ``F.linear`` if it fits: a
        tenth of a small layer's call."""
        return (self[0] is qweight and self[1] is scale
                and (input.numel() <= self[3] or input.numel() >= self[4])
                and (qweight._version, scale._version) == self[2]
                and not torch.is_autocast_enabled("cpu")
                and not (scale.requires_grad and torch.is_grad_enabled()))


def bounds(dtype: torch.dtype, n: int, k: int) -> tuple[int, int]:
    """Numbers of input, all rows together, up to which, and from which on, ``F.linear`` is the fastest
    way on the CPU."""
    if dtype is torch.float32:
        few = FEW_PRODUCTS // n if n else 0
        if not _is_narrow(n, k):
            return few, ALL
        blocks = n < FEW_OUTPUTS and _has_blocks(n)
        return (max(few, MANY_ROWS * k - 1) if blocks else ALL), ALL
    if dtype is not torch.bfloat16:
        return 0, ALL
    few = FEW_WEIGHTS if n == 1 else k  # else oneDNN takes 15 µs to start
    many = 5 * k if n < 8 else ALL if _has_blocks(n) or n >= 96 else 128 * k
    return (few if n * k <= FEW_WEIGHTS else 0), many


def takes_linear(input: Tensor, n: int, k: int, bits: int = 1, accuracy: str = "high") -> bool:
    """Whether :func:`linear` is the fastest way to ``n`` outputs of ``input [..., k]`` on the CPU."""
    size = input.numel()
    if n * k > MOST_WEIGHTS:
        return False
    if accuracy != "fast" and input.dtype in TABLE_OUTPUTS and (
            n < TABLE_OUTPUTS[input.dtype][bits - 1]
            and size >= TABLE_ROWS[input.dtype][bits - 1] * k):
        return True
    if n >= 96 and size * n > FEW_PRODUCTS:
        return False
    most, least = bounds(input.dtype, n, k)
    if size <= most or size >= least:
        return True
    if input.dtype is torch.bfloat16:
        return _has_blocks(n) and size >= 128 * k
    return input.dtype is torch.float32 and _is_narrow(n, k)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` on the CPU. Many rows for few outputs it gives not to BLAS but to oneDNN, up to
    2.6 times faster there: by the name that TorchInductor calls it by, without a gradient."""
    n, k = weight.shape
    if weight.dtype is torch.bfloat16:
        by_blocks = _has_blocks(n) or n >= 96
    else:
        by_blocks = (input.numel() >= MANY_ROWS * k and _has_blocks(n)
                     and (n * k <= FEW_WEIGHTS if n < FEW_OUTPUTS else k >= LONG))
    if by_blocks and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
    return F.linear(input, weight, bias)


def _is_narrow(n: int, k: int) -> bool:
    return n < FEW_OUTPUTS or n * k <= FEW_WEIGHTS


def _has_blocks(n: int) -> bool:
    """Whether oneDNN's blocks of 16 outputs are not mostly padding, but where BLAS is as bad."""
    return 8 <= n < FEW_OUTPUTS or (n > 0 and n % 16 == 0)

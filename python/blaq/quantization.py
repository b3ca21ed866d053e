"""What a parameter is quantized to: the link from the optimizer that knows it to packing and summary.

The model stays as the user wrote it, so the link lives beside it: a table from parameter to
:class:`Quantization` that does not keep the parameter alive.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from blaq_kernels.codebook import bits_of

__all__ = ["Quantization", "quantization_of"]


@dataclass(frozen=True)
class Quantization:
    """How ``param == level × scale`` holds for one parameter.

    Attributes:
        levels: ascending magnitudes of the codebook, the largest 1.0; more than 8 (an 8-bit layer)
            cannot be bit-packed.
        group_size: 0 one scale for the tensor, -1 one a row, g > 0 one for each g inputs of a row.
        scale: float32, ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``: the optimizer's own tensor, which
            every step updates.
        flips: int64, 0-dim: codes that the last step changed; None where nothing counts them.
    """

    levels: tuple[float, ...]
    group_size: int
    scale: Tensor
    flips: Tensor | None = None

    @property
    def bits(self) -> int:
        """Width of a code: one sign bit and an index."""
        return bits_of(self.levels)


_TABLE: WeakIdKeyDictionary = WeakIdKeyDictionary()


def quantization_of(param: Tensor) -> Quantization | None:
    """How ``param`` is quantized; None for one that no BLAQ optimizer quantizes."""
    return _TABLE.get(param)


def record(param: Tensor, quantization: Quantization) -> None:
    """Say how ``param`` is quantized from now on; the optimizer's part."""
    _TABLE[param] = quantization

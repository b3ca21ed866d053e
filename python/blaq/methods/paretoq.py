"""ParetoQ (Liu et al., 2025, arXiv 2502.02631): for each width the grid and the scale that suit it.

Every row or filter has a learned scale with LSQ's gradient, times 1/√(numel · max(2^(b-1) - 1, 1)).

- 1 bit, elastic binary: ``α sign(w)``, α at first mean|w|; gradient to w where |w| <= α, to α
  sign(w).
- 2 bits, stretched elastic: ``α (round(N clip(w/α, ±0.99) - z) + z)/N`` with N = 2, z = ½: ±0.25 α
  and ±0.75 α, α at first max|w|; ternary the same with N = 1.5, z = 0: 0 and ±⅔ α. The gradient is
  the formula's with the rounding straight through. (The authors' code gives a ternary α ±1 outside
  the clip range, where the formula has ±⅔.)
- 3 and 4 bits: LSQ, its step at first max|w| / (2^(b-1) - 1).

Not implemented: the split of a training budget into full precision and quantized (start from a
float run with ``init``).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from blaq_kernels.reference import signs

from .grouped import GroupQuantizer, scaled_gradient
from .lsq import TINY, LearnedStep
from .quantizer import QuantizerMethod, straight_through

__all__ = ["ElasticBinary", "ParetoQ", "RowStep", "StretchedElastic", "StretchedTernary", "Ternary"]


class _Elastic(GroupQuantizer):
    """A learned α for each row."""

    group_size = -1

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.scale = nn.Parameter(self.per_group())
        self.started(latent)

    def alpha(self, groups: Tensor) -> Tensor:
        """α, positive, with LSQ's scaled gradient; its p is 1 at 1 and 2 bits."""
        return scaled_gradient(self.scale.abs().clamp_min(TINY), 1 / math.sqrt(groups.numel()))


class ElasticBinary(_Elastic):
    """The 1-bit grid."""

    widths = (1,)
    levels = (1.0,)

    def start(self, groups: Tensor) -> None:
        self.scale.copy_(groups.abs().mean(1, keepdim=True))

    def quantize(self, groups: Tensor) -> Tensor:
        alpha = self.alpha(groups)
        within = (groups / alpha.detach()).clamp(-1, 1)
        return straight_through(within, signs(groups)) * alpha


class StretchedElastic(_Elastic):
    """The 2-bit grid."""

    widths = (2,)
    levels = (1 / 3, 1.0)
    count, shift, highest = 2.0, 0.5, 1.5

    def start(self, groups: Tensor) -> None:
        self.scale.copy_(groups.abs().amax(1, keepdim=True))

    def quantize(self, groups: Tensor) -> Tensor:
        alpha = self.alpha(groups)
        stretched = self.count * (groups / alpha).clamp(-0.99, 0.99)
        rounded = (stretched - self.shift).round() + self.shift  # which makes -0 packing's zero
        # Level × scale, as a packed weight is decoded.
        unit = straight_through(stretched / self.highest, rounded / self.highest)
        return unit * (alpha * (self.highest / self.count))


class StretchedTernary(StretchedElastic):
    """The ternary grid; it takes 2 bits of memory."""

    levels = (0.0, 1.0)
    count, shift, highest = 1.5, 0.0, 1.0


class RowStep(LearnedStep):
    """The 3- and 4-bit grids: LSQ with a step for each row."""

    widths = (3, 4)
    input_widths = ()
    group_size = -1

    def start(self, groups: Tensor) -> None:
        self.step.copy_(groups.abs().amax(1, keepdim=True) / self.highest)


def grid(latent: Tensor, bits: int, *rest: Any) -> GroupQuantizer:
    """The quantizer for a width."""
    kinds: dict[int, type[GroupQuantizer]] = {1: ElasticBinary, 2: StretchedElastic}
    return kinds.get(bits, RowStep)(latent, bits, *rest)


class ParetoQ(QuantizerMethod):
    """Each width by its grid."""

    quantizer = staticmethod(grid)
    quantizer_lr = 0.1


class Ternary(QuantizerMethod):
    """The ternary grid."""

    quantizer = StretchedTernary
    quantizer_lr = 0.1

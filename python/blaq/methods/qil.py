"""QIL, quantization interval learning (Jung et al., CVPR 2019, arXiv 1808.05779).

The transformer ``t(w)`` is 0 where |w| < c - δ, ``sign(w)`` where |w| > c + δ, else
``(A|w| + B)^γ sign(w)`` with A = 0.5/δ, B = 0.5 - 0.5 c/δ; the discretizer is ``round(q t)/q``, q =
2^(b-1) - 1, straight through. c, δ and γ of a layer are learned; inputs have γ = 1 and q = 2^b - 1.

At first c - δ = 0, γ = 1 and c + δ is the clip of least squared error. The result is multiplied by
that first clip, a constant, where the paper has values in [-1, 1]: batch norm behind the layer
makes both the same function, and networks without it can be trained.

Not implemented: progressive narrowing (32 → 5 → 4 → 3 → 2 bits), which the paper needs at 2 bits:
train a run for each width, each from the weights that the last one ships, with ``init``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..codebook import levels_of
from .grouped import GroupQuantizer, best_scale
from .lsq import TINY
from .octav import optimal_clip
from .quantizer import QuantizerMethod, straight_through

__all__ = ["QIL", "LearnedInterval"]


class LearnedInterval(GroupQuantizer):
    """QIL's quantizer."""

    input_widths = (1, 2, 3, 4, 8)

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.center = nn.Parameter(self.per_group())
        self.distance = nn.Parameter(self.per_group())
        if self.signed:
            self.levels = levels_of("linear", bits)
            self.exponent = nn.Parameter(self.per_group())
        self.factor: Tensor
        self.register_buffer("factor", self.per_group())
        self.started(latent)

    def start(self, groups: Tensor) -> None:
        clip = (optimal_clip(groups, self.bits, signed=False) if self.levels is None
                else best_scale(groups, self.levels))
        for tensor, share in ((self.center, 0.5), (self.distance, 0.5), (self.factor, 1.0)):
            tensor.copy_(share * clip)

    def transform(self, groups: Tensor) -> Tensor:
        """t, in [-1, 1]."""
        size = groups.abs() if self.signed else groups
        distance = self.distance.abs().clamp_min(TINY)
        place = 0.5 + 0.5 * (size - self.center) / distance
        if not self.signed:
            return place.clamp(0, 1)
        # The power of 0 has no finite derivative below γ = 1: it is taken of what is kept alone.
        powered = (self.exponent.abs() * place.clamp(TINY, 1).log()).exp()  # pow takes longer
        return torch.where(place > 0, powered, 0.0) * groups.sign()

    def quantize(self, groups: Tensor) -> Tensor:
        count = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        t = self.transform(groups)
        rounded = (t * count).round() / count + 0.0  # which makes -0 the zero of packing
        return straight_through(t, rounded) * self.factor


class QIL(QuantizerMethod):
    """Learned intervals for weights and inputs."""

    quantizer = LearnedInterval
    activation = LearnedInterval.of_inputs
    quantizer_lr = 0.1

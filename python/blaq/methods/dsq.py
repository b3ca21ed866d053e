"""DSQ, differentiable soft quantization (Gong et al., ICCV 2019, arXiv 1908.05033): rounding
approached by a tanh in every interval of the grid (:func:`soft_step`).

Forward: the nearest of 2^b even steps from l to u. Backward: the derivative of the soft quantizer,
0 outside. Two forms:

- ``dsq``, the compact one of MQBench: α = 0.4 and an observed range. The grid of weights is
  symmetric, and its u = -l is the clip of least squared error, anew each time; inputs have l = 0
  and as u an average of the batches' best clips (0.9 of the last). MQBench's own observers are not
  here.
- ``dsq-learned``: l, u and α of each layer learned by the soft quantizer's derivative (sections
  3.2, 3.3), from the same range and α = 0.2 on. α is the sigmoid of a parameter, so inside (0, 1);
  the paper's bound on α with its multiplier, and its moving averages of l and u, are not here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..codebook import levels_of
from ..functional import fake_quantize
from .grouped import GroupQuantizer, best_scale
from .lsq import TINY
from .octav import optimal_clip
from .quantizer import QuantizerMethod, straight_through

__all__ = ["DSQ", "LearnedDSQ", "LearnedSoftStep", "SoftStep", "slope_of_soft_step", "soft_step"]

SOFTNESS = 0.4  # MQBench's


def soft_step(values: Tensor, low: Tensor, high: Tensor, bits: int,
              softness: Tensor | float) -> tuple[Tensor, Tensor]:
    """DSQ's soft quantizer and the hard one it stands for (Gong et al., ICCV 2019, Eqs. 3-7).

    On [l, u] with ``Δ = (u - l)/(2^b - 1)`` interval i has the middle ``m_i``, and
    ``φ(x) = tanh(k (x - m_i)) / (1 - α)``, ``k = ln(2/α - 1)/Δ``, is ±1 at its ends. Soft:
    ``l + Δ(i + (φ + 1)/2)``; hard: the same with φ's sign, the nearest level; l below, u above.

    Args:
        values: any shape.
        low, high: l < u, which broadcast.
        bits: width of a quantized value.
        softness: α in (0, 1): to 0 the soft quantizer becomes the hard one, to 1 a straight line.

    Returns:
        soft, differentiable in all its arguments; hard, without a gradient.
    """
    softness = torch.as_tensor(softness, dtype=values.dtype, device=values.device)
    delta = (high - low) / (2**bits - 1)
    clipped = torch.minimum(torch.maximum(values, low), high)
    place = (clipped - low) / delta
    interval = place.detach().floor().clamp(0, 2**bits - 2)
    phi = torch.tanh((2 / softness - 1).log() * (place - interval - 0.5)) / (1 - softness)
    soft = low + delta * (interval + (phi + 1) / 2)
    with torch.no_grad():
        hard = low + delta * (interval + (place - interval >= 0.5))
    return soft, hard


def slope_of_soft_step(values: Tensor, low: Tensor, high: Tensor, bits: int,
                       softness: float) -> tuple[Tensor, Tensor]:
    """Derivative of :func:`soft_step` to its values, ``½ k Δ (1 - tanh²)/(1 - α)`` inside [l, u],
    and the hard quantizer."""
    delta = (high - low) / (2**bits - 1)
    place = (values - low) / delta
    interval = place.floor().clamp_(0, 2**bits - 2)
    hard = low + delta * (interval + (place - interval >= 0.5))
    sharpness = math.log(2 / softness - 1)  # k Δ
    slope = torch.tanh(sharpness * (place - interval - 0.5)).square_().neg_().add_(1)
    slope *= sharpness / (2 * (1 - softness))
    return slope.masked_fill_((values < low) | (values > high), 0.0), hard


class SoftStep(GroupQuantizer):
    """DSQ with a fixed softness and an observed range."""

    widths = (1, 2, 3, 4)
    input_widths = (1, 2, 3, 4, 8)

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.make()
        self.started(latent)

    def make(self) -> None:
        """Register parameters and buffers."""
        self.high: Tensor
        if self.signed:
            self.levels = levels_of("uniform", self.bits)
        else:
            self.register_buffer("high", self.per_group())

    def start(self, groups: Tensor) -> None:
        if not self.signed:
            self.high.copy_(self.observed(groups))

    def observed(self, groups: Tensor) -> Tensor:
        """u of least squared error, ``[1, 1]``."""
        if self.signed:
            return best_scale(groups, levels_of("uniform", self.bits))
        return optimal_clip(groups, self.bits, signed=False)

    @torch.no_grad()
    def range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """l and u, ``[1, 1]``."""
        if self.signed:
            high = self.observed(groups)
            return -high, high
        if self.training:
            self.high.lerp_(self.observed(groups), 0.1)
        return torch.zeros_like(self.high), self.high.clone()

    def quantize(self, groups: Tensor) -> Tensor:
        low, high = self.range(groups)
        with torch.no_grad():  # the only derivative that is wanted, without a graph
            slope, hard = slope_of_soft_step(groups, low, high, self.bits, SOFTNESS)
            if self.levels is not None:  # level × scale, as a packed weight is decoded
                hard = fake_quantize(groups, high.reshape(1), self.levels)
        return straight_through(groups * slope, hard)


class LearnedSoftStep(SoftStep):
    """DSQ with learned softness and range."""

    def make(self) -> None:
        if self.signed:
            self.low = nn.Parameter(-self.per_group())
        self.high = nn.Parameter(self.per_group())
        self.softness_logit = nn.Parameter(torch.logit(torch.tensor(0.2)))

    def start(self, groups: Tensor) -> None:
        self.high.copy_(self.observed(groups))
        if self.signed:
            self.low.copy_(-self.high)

    def range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low if self.signed else torch.zeros_like(self.high)
        return low, torch.maximum(self.high, low + TINY)

    def softness(self) -> Tensor:
        """α, between 0 and 1."""
        return self.softness_logit.sigmoid()

    def quantize(self, groups: Tensor) -> Tensor:
        low, high = self.range(groups)
        return straight_through(*soft_step(groups, low, high, self.bits, self.softness()))


class DSQ(QuantizerMethod):
    """Soft quantization of weights and inputs in its compact form."""

    quantizer = SoftStep
    activation = SoftStep.of_inputs


class LearnedDSQ(QuantizerMethod):
    """Soft quantization with learned range and softness."""

    quantizer = LearnedSoftStep
    activation = LearnedSoftStep.of_inputs
    quantizer_lr = 0.1

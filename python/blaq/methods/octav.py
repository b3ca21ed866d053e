"""OCTAV, optimally clipped tensors and vectors (Sakr et al., ICML 2022, arXiv 2206.06501).
 ``Δ clip(round(w/Δ), -2^(b-1), 2^(b-1) - 1)`` with Δ = s · 2^(1-b), for inputs ``Δ clip(round(x/Δ),
0, 2^b - 1)`` with Δ = s · 2^-b. The clip s of least squared error comes from Newton's recursion
(:func:`optimal_clip`), in each step of training 3 more of its steps; one for a tensor, without a
gradient. The gradient to weights is magnitude-aware: 1 inside ±s, ``s/|w|`` outside; to inputs
piecewise
linear: 0 outside.

In evaluation inputs keep an average of the training's clips (0.9 of the last: this project's
choice, so that a result does not depend on what else is in a batch). Not implemented: a clip for
each vector; 4-bit gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grouped import GroupQuantizer
from .lsq import TINY
from .quantizer import QuantizerMethod, straight_through

__all__ = ["OCTAV", "OptimalClip", "optimal_clip"]


def optimal_clip(groups: Tensor, bits: int, signed: bool = True, iterations: int = 20,
                 start: Tensor | None = None) -> Tensor:
    """Newton's recursion for the clip s of least ``noise + clipping`` error of each group.

    ``J(s) = c s² E[0 < |X| <= s] + E[(s - |X|)²; |X| > s]`` with c = 4^-b / 3, the variance of a
    step of 2s/2^b, or a quarter of it unsigned. From mean|X|,
    ``s ← E[|X|; |X| > s] / (c E[0 < |X| <= s] + E[|X| > s])``. The derivative leaves out what moves
    across the clip: at 2 bits J ends 0.3 % above its minimum.

    Args:
        groups: ``[groups, members]``, floating point.
        bits: width of a quantized value.
        signed: whether the grid has negative values.
        iterations: fixed, so that nothing waits for a device; 20 are enough from mean|X| at 8 bits.
        start: ``[groups, 1]`` to go on from, in place of mean|X|; beyond the largest it counts for
            nothing.

    Returns:
        ``[groups, 1]``, positive.
    """
    noise = 4.0**-bits / (3 if signed else 12)
    size = groups.abs()
    occupied = (size > 0).sum(1, keepdim=True)
    mean = size.mean(1, keepdim=True)
    clip = mean if start is None else start
    for _ in range(iterations):
        above = size > clip
        outside = above.sum(1, keepdim=True)
        sum_outside = (size * above).sum(1, keepdim=True)
        moved = sum_outside / (noise * (occupied - outside) + outside)
        clip = torch.where(outside > 0, moved, mean)  # a step never goes past the largest
    return clip.clamp_min(TINY)


WARM = 3
"""Newton steps from the last clip: it moves little between two steps of training."""


class OptimalClip(GroupQuantizer):
    """OCTAV's quantizer."""

    input_widths = (1, 2, 3, 4, 8)

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.clip: Tensor
        self.register_buffer("clip", self.per_group())
        self.started(latent)

    def start(self, groups: Tensor) -> None:
        self.clip.copy_(optimal_clip(groups, self.bits, self.signed))

    def _clip(self, groups: Tensor) -> Tensor:
        if not self.signed and not self.training:
            return self.clip
        clip = optimal_clip(groups, self.bits, self.signed, WARM, self.clip)
        if self.training:
            self.clip.lerp_(clip, 1.0 if self.signed else 0.1)
        return clip

    def quantize(self, groups: Tensor) -> Tensor:
        with torch.no_grad():
            clip = self._clip(groups)
            step = clip * (2.0 ** (1 - self.bits) if self.signed else 2.0**-self.bits)
            low = -(2 ** (self.bits - 1)) if self.signed else 0
            value = (groups / step).round().clamp(low, low + 2**self.bits - 1) * step
            size = groups.abs()
        if self.signed:
            slope = torch.where(size <= clip, 1.0, clip / size.clamp_min(TINY))
        else:
            slope = ((groups >= 0) & (groups <= clip)).to(groups.dtype)
        return straight_through(groups * slope, value)


class OCTAV(QuantizerMethod):
    """The clip of least squared error, for weights and inputs."""

    quantizer = OptimalClip
    activation = OptimalClip.of_inputs

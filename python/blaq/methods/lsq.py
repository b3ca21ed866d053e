"""LSQ, learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153).

``ŵ = s · round(clip(w/s, n, p))`` with n = -2^(b-1) and p = 2^(b-1) - 1, for inputs 0 and 2^b - 1
(Eqs. 1, 2). The gradient reaches w inside the clip range; s gets ``round(z) - z`` inside, n or p
outside (Eq. 3), times 1/√(numel · p) (section 2.2). One s for a tensor, at first 2 mean|w| / √p.

Not implemented: distillation.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .grouped import GroupQuantizer, scaled_gradient
from .quantizer import QuantizerMethod, straight_through

__all__ = ["LSQ", "TINY", "LearnedStep"]

TINY = 2.0**-20
"""Least scale: one that training drives through zero counts by its magnitude."""


class LearnedStep(GroupQuantizer):
    """LSQ's quantizer."""

    input_widths: tuple[int, ...] = (1, 2, 3, 4, 8)

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.lowest = -(2 ** (bits - 1)) if self.signed else 0
        self.highest = 2 ** (bits - 1) - 1 if self.signed else 2**bits - 1
        self.step = nn.Parameter(self.per_group())
        self.started(latent)

    def start(self, groups: Tensor) -> None:
        self.step.copy_(2 * groups.abs().mean(1, keepdim=True) / math.sqrt(self.highest))

    def step_size(self, groups: Tensor) -> Tensor:
        """s, positive, with LSQ's scaled gradient."""
        step = self.step.abs().clamp_min(TINY)
        return scaled_gradient(step, 1 / math.sqrt(groups.numel() * self.highest))

    def integers(self, groups: Tensor, step: Tensor) -> Tensor:
        """z in steps, clipped; what is rounded."""
        return (groups / step).clamp(self.lowest, self.highest)

    def round(self, z: Tensor) -> Tensor:
        """z to integers."""
        return straight_through(z, z.round())

    def quantize(self, groups: Tensor) -> Tensor:
        step = self.step_size(groups)
        return self.round(self.integers(groups, step)) * step


class LSQ(QuantizerMethod):
    """Learned step sizes for weights and inputs."""

    quantizer = LearnedStep
    activation = LearnedStep.of_inputs
    quantizer_lr = 0.1  # a small step at Adam's whole rate runs through zero, and back

"""Nearest level, one scale by least squares: BWN, and TWN solved exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codebook import levels_for
from ..functional import fake_quantize, solve
from .quantizer import QuantizerMethod, WeightQuantizer

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["Nearest", "NearestLevel"]


class NearestLevel(WeightQuantizer):
    """``argmin Σ (w - scale · level)²`` in every forward pass: the unweighted solve.

    The gradient at the quantized weight goes to the latent one unchanged (straight through).
    """

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__(latent, bits, config, options)
        self.levels: tuple[float, ...] = levels_for(config.codebook, bits)
        self.group_size = config.group_size

    def forward(self, latent: Tensor) -> Tensor:
        fixed = latent.detach()
        _, scale = solve(fixed, torch.ones_like(fixed), self.levels, self.group_size,
                         method="exact")
        return fake_quantize(latent, scale, self.levels, self.group_size)


class Nearest(QuantizerMethod):
    """The exact solve without curvature: BWN (Rastegari et al., 2016) at 1 bit; for the ternary
    codebook TWN (Li et al., 2016), its least-squares problem solved instead of its 0.7 rule."""

    quantizer = NearestLevel

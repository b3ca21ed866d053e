"""Ternary weights: TWN by its rule and solved exactly, and LAT with a scale for each sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from blaq_kernels.reference import from_groups, to_groups

from ..codebook import levels_for
from ..functional import fake_quantize, solve
from .quantizer import QuantizerMethod, WeightQuantizer, straight_through

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["TWN", "ExactTWN", "NearestLevel", "TwoScale", "TwoScaleExact"]

TERNARY = (0.0, 1.0)


class Threshold(WeightQuantizer):
    """Zero up to 0.7 of the mean of |w|; beyond, the sign times the mean of |w| there."""

    levels = TERNARY

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__(latent, bits, config, options)
        self.group_size = config.group_size

    def forward(self, latent: Tensor) -> Tensor:
        groups = to_groups(latent.detach(), self.group_size)
        magnitude = groups.abs()
        count = to_groups(torch.ones_like(latent), self.group_size).sum(1, keepdim=True)
        kept = magnitude > 0.7 * magnitude.sum(1, keepdim=True) / count
        scale = (magnitude * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        value = torch.where(kept, scale * groups.sign(), 0.0)  # no code has -0
        return straight_through(latent, from_groups(value, latent.shape, self.group_size))


class TWN(QuantizerMethod):
    """Ternary Weight Networks (Li, Zhang, Liu, 2016, arXiv 1605.04711) by their rule of thumb; the
    gradient goes straight through, unclipped. One scale for a layer, or as ``group_size`` says."""

    quantizer = Threshold


class NearestLevel(WeightQuantizer):
    """``argmin Σ (w - scale · level)²`` in every forward pass: the unweighted solve, to its global
    minimum. The gradient at the quantized weight goes to the latent one unchanged."""

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


class ExactTWN(QuantizerMethod):
    """TWN with its least-squares problem solved instead of approximated: LATe without curvature."""

    quantizer = NearestLevel


class SignedScales(WeightQuantizer):
    """``{-scale⁻, 0, scale⁺}``, each side solved by itself with the curvature of the last step.

    The other side's weights count as zeros, which no scale of a ternary solve depends on.
    """

    method = "alternating"

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__(latent, bits, config, options)
        self.max_iter, self.rows = config.max_iter, config.group_size
        self.plus: Tensor
        self.minus: Tensor
        for name, side in (("plus", latent), ("minus", -latent)):
            _, scale = solve(side.clamp_min(0.0).contiguous(), torch.ones_like(side), TERNARY,
                             self.rows, method="exact")
            self.register_buffer(name, scale)

    def forward(self, latent: Tensor) -> Tensor:
        fixed = latent.detach()
        plus, minus = (fake_quantize(side.clamp_min(0.0), scale, TERNARY, self.rows)
                       for side, scale in ((fixed, self.plus), (-fixed, self.minus)))
        return straight_through(latent, plus - minus)

    def after_step(self, latent: Tensor, curvature: Tensor | None) -> None:
        weight = torch.ones_like(latent) if curvature is None else curvature
        for side, scale in ((latent, self.plus), (-latent, self.minus)):
            _, found = solve(side.clamp_min(0.0), weight, TERNARY, self.rows, scale,
                             self.max_iter, self.method)
            scale.copy_(found)


class SignedScalesExact(SignedScales):
    method = "exact"


class TwoScale(QuantizerMethod):
    """LAT2a (Hou, Kwok, ICLR 2018, arXiv 1802.08635): LAQ for ternary weights with a scale for each
    sign, by alternation from the last step's scales. Latent weights stay in [-clip, clip].

    No packed format has two scales: the quantized weights are saved as floats. Under SGD, which has
    no curvature, the solve is unweighted.
    """

    quantizer: ClassVar[type[WeightQuantizer]] = SignedScales
    clips = True


class TwoScaleExact(TwoScale):
    """LAT2e: as :class:`TwoScale`, each side's solve to its global minimum."""

    quantizer = SignedScalesExact

"""LOTION (Kwun et al., 2025, arXiv 2510.08757): minimise the expected loss under unbiased
randomized rounding, which is smooth where the quantized loss is a staircase.

Randomized rounding takes w, r of the way between two levels that are s apart, to the upper with
probability r: mean w, variance ``s² r (1 - r)``. To second order the expected loss is
``L(w) + ½ Σ H_ii s² r_i (1 - r_i)``. Training runs on the latent weights with that regularizer, H
taken for the diagonal of the empirical Fisher matrix: Adam's second moment, which is of batch
means, times the batch size, times ``strength``. ``sample=yes`` rounds at random in the forward pass
instead, the gradient straight through. Evaluation takes the nearest level.
``s = max|w| / (2^(b-1) - 1)``, one for a layer, without a gradient.

After every epoch batch norm's statistics are estimated again for the rounded weights, which the
paper's networks have no need of.

Known limits: Adam's moment holds the regularizer's own gradient too, so a large ``strength`` feeds
itself (100 gave NaN on MNIST, batches of 100); and 2 bits, where the largest weight is the only
level beside 0, learns badly. Not implemented: block scales; floating-point
grids.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from blaq_kernels.rules import require

from ..codebook import levels_of
from ..functional import fake_quantize
from .grouped import GroupQuantizer
from .lsq import TINY
from .norms import EstimatesNorms
from .quantizer import straight_through

__all__ = ["LOTION", "RandomizedRounding"]


OPTIONS = {"strength": 1.0, "sample": False}


class RandomizedRounding(GroupQuantizer):
    """LOTION's quantizer: latent weights in training, the nearest level in evaluation."""

    def __init__(self, latent: Tensor, bits: int, config: Any = None, options: Any = None) -> None:
        super().__init__(latent, bits, config, {**OPTIONS, **(options or {})})
        self.levels = self.grid = levels_of("linear", bits)
        self.samples = 1 if config is None else config.batch_size
        self.fisher: Tensor
        self.register_buffer("fisher", torch.zeros_like(latent))

    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s ``[1]``, w/s rounded down, and the rest r, differentiable in w."""
        step = latent.detach().abs().amax().clamp_min(TINY).reshape(1) / (len(self.grid) - 1)
        place = latent / step
        below = place.detach().floor()
        return step, below, place - below

    def variance(self, latent: Tensor) -> Tensor:
        """Of the randomly rounded weights, ``s² r (1 - r)``."""
        step, _, rest = self.parts(latent)
        return step.square() * rest * (1 - rest)

    def forward(self, latent: Tensor) -> Tensor:
        if not self.training:
            largest = latent.detach().abs().amax().clamp_min(TINY).reshape(1)
            return fake_quantize(latent, largest, self.grid)
        if not self.options["sample"]:
            return latent.clone()
        step, below, rest = self.parts(latent.detach())
        return straight_through(latent, (below + (torch.rand_like(rest) < rest)) * step)

    def penalty(self, latent: Tensor) -> Tensor | None:
        if self.options["sample"]:
            return None
        curvature = self.options["strength"] * self.samples * self.fisher
        return 0.5 * (curvature * self.variance(latent)).sum()

    def after_step(self, latent: Tensor, curvature: Tensor | None) -> None:
        if curvature is not None:
            torch.square(curvature, out=self.fisher)


class LOTION(EstimatesNorms):
    """The expected loss under randomized rounding."""

    OPTIONS: ClassVar = OPTIONS
    LEAST: ClassVar = {"strength": 0}
    quantizer = RandomizedRounding

    def prepare(self) -> Optimizer:
        require(self.config.optimizer == "adamw", "methods", "optimizer",
                f"be adamw, whose second moment is the curvature, for {self.config.method}",
                repr(self.config.optimizer))
        return super().prepare()

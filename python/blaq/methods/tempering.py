"""Noise tempering: inspired by Wang et al. (2022, arXiv 2212.05603), not a reproduction of it.

Of that method only its idea was at hand: noise in proportion to the quantization error that decays
exponentially, and a learned scale on the gradient of the loss. Here, on LSQ's quantizer:

- forward in training ``x̂ + λ ξ |x̂ - x|``, ξ uniform on (-1, 1), ``λ = λ₀ exp(-κ t/T)``;
  evaluation has x̂. By it ``E[L] ≈ L(x̂) + λ²/6 Σ H_ii (x̂ - x)_i²``: the noise sees curvature.
- backward EWGS' ``g (1 + δ sign(g) (z - ẑ))`` with a learned δ >= 0 for each layer. δ changes no
  forward pass, so its gradient is a hypergradient: the last step's share of δ, ``-|g| (z - ẑ)``,
  times this step's gradient, as a cosine. Inputs have δ = 0, as no input comes twice.

Not implemented, because not known: the paper's own distribution, decay, place of the scale,
schedule.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .lsq import LSQ, LearnedStep

__all__ = ["NoiseTempering", "TemperedStep"]


class _LearningRound(torch.autograd.Function):
    """round(z) with EWGS' gradient; δ gets its hypergradient, ``last`` is what that needs next."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, delta: Tensor, last: Tensor) -> Tensor:
        rounded = z.round()
        ctx.save_for_backward(z - rounded, delta)
        ctx.last = last
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        error, delta = ctx.saved_tensors
        share = grad.abs() * error
        size = (grad.norm() * ctx.last.norm()).clamp_min(torch.finfo(grad.dtype).tiny)
        hypergradient = -(grad * ctx.last).sum() / size
        ctx.last.copy_(share)
        return grad + delta.clamp_min(0.0) * share, hypergradient, None


class TemperedStep(LearnedStep):
    """LSQ's quantizer with decaying noise and a learned scale of the gradient."""

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        if latent is not None:
            self.delta = nn.Parameter(torch.zeros(()))
            self.last: Tensor
            self.register_buffer("last", torch.zeros_like(self._grouped(latent.detach())))

    def noise(self) -> float:
        """λ."""
        return float(self.options["noise"] * math.exp(-self.options["decay"] * self.progress))

    def round(self, z: Tensor) -> Tensor:
        return _LearningRound.apply(z, self.delta, self.last) if self.signed else super().round(z)

    def quantize(self, groups: Tensor) -> Tensor:
        value = super().quantize(groups)
        if not self.training:
            return value
        error = (value - groups).detach().abs()
        return value + self.noise() * torch.empty_like(error).uniform_(-1, 1) * error


class NoiseTempering(LSQ):
    """LSQ under decaying noise of the size of the quantization error."""

    OPTIONS: ClassVar = {"noise": 1.0, "decay": 6.0}
    LEAST: ClassVar = {"noise": 0, "decay": 0}
    quantizer = TemperedStep
    activation = TemperedStep.of_inputs

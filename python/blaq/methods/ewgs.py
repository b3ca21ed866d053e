"""EWGS, element-wise gradient scaling (Lee, Kim, Ham, CVPR 2021, arXiv 2104.00903), on LSQ's
quantizer.

The gradient passes rounding as ``g_z = g_ẑ (1 + δ sign(g_ẑ) (z - ẑ))`` (Eq. 5), z in steps. δ
follows the curvature, ``δ = max(0, tr(H)/N / (3 std(g)))`` (Eq. 9), g and H of the loss by a
layer's quantized values in steps. It is 0, which is LSQ, in the first epoch; from then on the first
3 batches of every ``refresh``-th epoch set it anew (the authors': 10 on CIFAR, 1 on ImageNet).

The trace is Hutchinson's, ``E[vᵀ H v]`` with random signs v, as the authors', but H v is a central
difference of gradients, ``(g(ŵ + h v) - g(ŵ - h v)) / 2h``, where they differentiate twice: the
loop's closure is enough, and its two evaluations a batch are counted with the others. All layers' v
are there at once: what one has of another's has mean zero; it widened an estimate's spread by up to
three times where it was measured.

The authors quantize between learned bounds, here it is a learned step; z - ẑ is the same error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..trial import RandomState, modules_with_buffers, trial_pass
from .lsq import LSQ, LearnedStep

__all__ = ["EWGS", "ScaledGradientStep"]

BATCHES = 3
REACH = 0.01
"""h in steps. At 0.001 float32 shows; from 0.01 to 0.1 δ is the same within its noise."""


class _ScaledRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, delta: Tensor) -> Tensor:
        rounded = z.round()
        ctx.save_for_backward(z - rounded, delta)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        error, delta = ctx.saved_tensors
        return grad + delta * grad.abs() * error, None


class ScaledGradientStep(LearnedStep):
    """LSQ's quantizer with EWGS' gradient."""

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.delta: Tensor  # clipped where it is used: a mean of clipped ones would be too large
        self.register_buffer("delta", torch.zeros(()))

    def round(self, z: Tensor) -> Tensor:
        return _ScaledRound.apply(z, self.delta.clamp_min(0.0))


class _Look:
    """One quantizer's v and gradients on both sides."""

    def __init__(self, reach: float, seed: int) -> None:
        self.reach, self.seed = reach, seed
        self.signs: Tensor | None = None
        self.grads: list[Tensor] = []

    def __call__(self, value: Tensor, side: float) -> Tensor:
        if self.signs is None:
            # From a generator of its own: both sides must see the same dropout.
            own = torch.Generator(value.device).manual_seed(self.seed)
            self.signs = torch.empty_like(value).bernoulli_(0.5, generator=own).mul_(2).sub_(1)
        moved = value + side * self.reach * self.signs
        moved.register_hook(self.grads.append)
        return moved

    def delta(self, step: float) -> float:
        """δ of Eq. 9 before max, in steps; 0 where there is no gradient."""
        if len(self.grads) != 2 or self.signs is None:
            return 0.0
        ahead, behind = self.grads
        trace = ((ahead - behind) * self.signs).sum().item() / (2 * self.reach)
        spread = 3 * ((ahead + behind) / 2).std().item()
        found = step * trace / ahead.numel() / spread if spread > 0 else 0.0  # s g and s² H by z
        return found if math.isfinite(found) else 0.0


def curvature_deltas(model: torch.nn.Module, quantizers: list[ScaledGradientStep],
                     closure: Callable[[], Tensor], seed: int) -> list[float]:
    """δ of every quantizer from one batch: two evaluations, which leave no trace in the model."""
    looks = [_Look(REACH * quantizer.step.abs().item(), seed + i)
             for i, quantizer in enumerate(quantizers)]
    random_state = RandomState()
    for side in (1.0, -1.0):
        for quantizer, look in zip(quantizers, looks, strict=True):
            quantizer.probe = partial(look, side=side)
        try:
            with trial_pass(modules_with_buffers(model), random_state):
                closure()
        finally:
            for quantizer in quantizers:
                quantizer.probe = None
    return [look.delta(quantizer.step.abs().item())
            for quantizer, look in zip(quantizers, looks, strict=True)]


class EWGS(LSQ):
    """LSQ with the gradient of rounding scaled by its error, for weights and inputs."""

    OPTIONS: ClassVar = {"refresh": 1}
    LEAST: ClassVar = {"refresh": 1}
    quantizer = ScaledGradientStep
    activation = ScaledGradientStep.of_inputs

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        epoch, batch = divmod(self.steps, self.steps_per_epoch)
        if epoch > 0 and epoch % self.options["refresh"] == 0 and batch < BATCHES:
            quantizers = [m for m in self.model.modules() if isinstance(m, ScaledGradientStep)]
            found = curvature_deltas(self.model, quantizers, closure,
                                     seed=len(quantizers) * self.steps)
            for quantizer, delta in zip(quantizers, found, strict=True):
                quantizer.delta.lerp_(quantizer.delta.new_tensor(delta), 1 / (batch + 1))
        return super().step(closure)

"""The paper's Fig. 1: two weights, one bit, one scale, ℓ = 5(ω₁ - 0.054)² + (ω₂ + 0.055)².

Every step is made by ``torch.ops.blaq``, with the exact Hessian over the learning rate η as the
curvature, so that an η of 1 is Newton's step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import blaq_kernels  # noqa: F401  (registers torch.ops.blaq)

__all__ = ["HESSIAN", "OPTIMUM", "ToyRun", "best_quantized", "loss", "train_toy"]

HESSIAN, OPTIMUM = torch.tensor([10.0, 2.0]), torch.tensor([0.054, -0.055])
ops = torch.ops.blaq


class ToyRun(NamedTuple):
    """What :func:`train_toy` returns.

    Attributes:
        flips: sign flips of each start, float32 ``[starts]``.
        weight: quantized weights at the end, float32 ``[starts, 2]``.
        path: latent weights of every start before each step and at the end, float32
            ``[steps + 1, starts, 2]``.
    """

    flips: Tensor
    weight: Tensor
    path: Tensor


def loss(weight: Tensor) -> Tensor:
    """ℓ of weights ``[..., 2]``, float32 ``[...]``."""
    return (weight - OPTIMUM).square() @ (HESSIAN / 2)


def best_quantized() -> tuple[float, list[int], float]:
    """Scale, signs and loss of the best quantized weights: ℓ is what ``solve`` minimises, with the
    optimum for latent weights and the Hessian for curvature."""
    codes, scale = ops.solve(OPTIMUM[None], HESSIAN[None], None, [1.0], 0, 1, "exact")
    weight = ops.fake_quantize(OPTIMUM[None], scale, [1.0], 0)
    return scale.item(), [1 - 2 * code for code in codes[0].tolist()], loss(weight).item()


def train_toy(backtrack: float, eta: float, starts: int = 200, steps: int = 200,
              seed: int = 0) -> ToyRun:
    """LAQ (``backtrack`` 1) or BLAQ from random starts in [-0.6, 0.6]², β₁ = 0."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.rand(starts, 2, generator=generator) * 1.2 - 0.6
    d = (HESSIAN / eta).expand(starts, 2).contiguous()

    def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = ops.solve(w, d, None, [1.0], -1, 1, "alternating")
        return codes, ops.fake_quantize(w, scale, [1.0], -1)

    codes, weight = quantize(latent)
    flips, path = torch.zeros(starts), [latent]
    for _ in range(steps):
        grad = (weight - OPTIMUM) * HESSIAN
        if backtrack < 1:
            _, trial_weight = quantize(ops.scaled_update(latent, grad, d))
            grad = ops.blend(grad, (trial_weight - OPTIMUM) * HESSIAN, backtrack)
        latent = ops.scaled_update(latent, grad, d)
        path.append(latent)
        before = codes
        codes, weight = quantize(latent)
        flips += (codes != before).sum(1)
    return ToyRun(flips, weight, torch.stack(path))

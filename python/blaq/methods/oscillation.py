"""Dampening and freezing of oscillating weights (Nagel et al., ICML 2022, arXiv 2203.11086) of LSQ.

A weight oscillates when its integer changes against the direction of its last change; its frequency
is the exponential average ``f ← (1 - m) f + m · oscillates`` (Eq. 3).

- ``lsq-dampened`` adds ``λ ‖ŵ - clip(w)‖²``, ŵ and the bounds fixed, summed over filters of the
  means over a filter's weights; λ rises from 0 to ``dampening`` by a cosine (Eqs. 5, 6).
- ``lsq-frozen`` (Algorithm 1) fixes a weight whose frequency is above a threshold at the rounded
  average of its integers. The threshold falls from ``start`` to ``end`` by a cosine after a quarter
  of the training; before, nothing freezes.

Batch norm's statistics are estimated again over 50 batches after each epoch (section 4.1).

Not implemented: other ways to sum the dampening.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from blaq_kernels.rules import require

from .lsq import LSQ, TINY, LearnedStep
from .norms import EstimatesNorms

__all__ = ["Dampened", "DampenedStep", "Frozen", "FrozenStep"]

FREEZE_AFTER = 0.25
"""Share of the training that passes before weights freeze."""


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


class DampenedStep(LearnedStep):
    """LSQ's quantizer that draws weights to the middle of their bins."""

    def penalty(self, latent: Tensor) -> Tensor | None:
        step = self.step.detach().abs().clamp_min(TINY)
        place = self.integers(latent, step)
        error = step * (place.detach().round() - place)
        return self.weight() * error.square().flatten(1).mean(1).sum()

    def weight(self) -> float:
        """λ."""
        return _cosine(0.0, self.options["dampening"], self.progress)


class FrozenStep(LearnedStep):
    """LSQ's quantizer that fixes what oscillates."""

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        if latent is None:
            return
        for name in ("integer", "direction", "frequency", "average"):
            self.register_buffer(name, torch.zeros_like(latent))
        self.register_buffer("frozen", torch.zeros_like(latent, dtype=torch.bool))
        self.integer: Tensor
        self.direction: Tensor
        self.frequency: Tensor
        self.average: Tensor
        self.frozen: Tensor
        with torch.no_grad():
            self.integer.copy_(self._integers(latent))
            self.average.copy_(self.integer)

    def _integers(self, latent: Tensor) -> Tensor:
        return self.integers(latent, self.step.abs().clamp_min(TINY)).round()

    def threshold(self) -> float:
        """Frequency above which a weight freezes."""
        share = (self.progress - FREEZE_AFTER) / (1 - FREEZE_AFTER)
        if share < 0:
            return math.inf
        return _cosine(self.options["start"], self.options["end"], share)

    def after_step(self, latent: Tensor, curvature: Tensor | None) -> None:
        momentum = self.options["momentum"]
        new = self._integers(latent)
        change = (new - self.integer).sign()
        self.frequency.lerp_((change * self.direction < 0).float(), momentum)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        self.average.lerp_(new, momentum)
        freezing = ~self.frozen & (self.frequency > self.threshold())
        # A frozen weight stays its integer, whatever step size and optimizer did.
        self.integer.copy_(torch.where(self.frozen, self.integer,
                                       torch.where(freezing, self.average.round(), new)))
        self.frozen |= freezing
        step = self.step.abs().clamp_min(TINY)
        latent.copy_(torch.where(self.frozen, self.integer * step, latent))


class Dampened(EstimatesNorms, LSQ):
    """LSQ with dampened oscillations."""

    OPTIONS: ClassVar = {"dampening": 0.1}
    LEAST: ClassVar = {"dampening": 0}
    quantizer = DampenedStep


class Frozen(EstimatesNorms, LSQ):
    """LSQ that freezes oscillating weights."""

    OPTIONS: ClassVar = {"momentum": 0.01, "start": 0.1, "end": 0.01}
    LEAST: ClassVar = {"start": 0, "end": 0}
    quantizer = FrozenStep

    def prepare(self) -> Optimizer:
        momentum = self.options["momentum"]
        require(0 < momentum <= 1, "methods", f"option momentum of {self.config.method}",
                "be in (0, 1]", momentum)
        return super().prepare()

"""AQ: adaptive quantization (Khoram, Li, ICLR 2018), a width for each weight, after training.

It asks for the fewest bits with ``L(Ŵ) <= bound``. To first order the loss rises by at most
``Σ |g_i| τ_i`` where no weight moves by more than its tolerance τ_i; sharing the rise that is left
equally gives ``τ_i = (bound - L) / (n |g_i|)``, at most a trust region's radius.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from blaq_kernels.rules import require

from ..trial import evaluate
from .method import Method, make_optimizer, quantized_layers

__all__ = ["AQ", "coarsest", "tolerances"]

FINEST = 16


def tolerances(grads: list[Tensor], rise: float, trust: list[float]) -> list[Tensor]:
    """How far each weight may move: ``rise / (n |g|)``, at most ``trust`` of its layer; n counts
    the weights of all layers."""
    count = sum(grad.numel() for grad in grads)
    return [(max(rise, 0.0) / (count * grad.abs()).clamp_min(1e-30)).clamp_max(radius)
            for grad, radius in zip(grads, trust, strict=True)]


def coarsest(weight: Tensor, tolerance: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """For each weight the fixed-point number of fewest bits within its tolerance.

    A number of k bits is a multiple of ``unit / 2**(k-1)`` in [-unit, unit), two's complement; none
    is 0 bits, which stand for 0. A weight that 16 bits do not bring within its tolerance gets them.

    Returns:
        values, like ``weight``; bits, uint8.
    """
    values, bits = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.uint8)
    undecided = weight.abs() > tolerance
    for k in range(1, FINEST + 1):
        step, most = unit / 2 ** (k - 1), 2 ** (k - 1)
        number = (weight / step).round().clamp(-most, most - 1) * step
        values = torch.where(undecided, number, values)
        bits.masked_fill_(undecided, k)
        undecided = undecided & ((number - weight).abs() > tolerance)
    return values, bits


class AQ(Method):
    """Full-precision training, then a last epoch that only allocates: its batches are split into
    ``iterations`` parts, and after each the mean loss and gradient of the part move every quantized
    layer's weights to :func:`coarsest`. No parameter is trained in it. Until then what is measured
    is the float network.

    ``weight_bits`` is the mean width; where each weight's width is stored is not counted.

    Options: ``iterations``; ``margin``, by which the bound exceeds the loss before, as a share of
    it; ``trust``, radius as a share of a layer's largest weight. Not implemented: the paper's own
    choice of margin and radius, which its abstract does not give, and a file of mixed widths: the
    weights are saved as floats.
    """

    OPTIONS: ClassVar = {"iterations": 25, "margin": 0.1, "trust": 0.25}

    def prepare(self) -> Optimizer:
        for name, value in self.options.items():
            require(value > 0, "methods", f"option {name} of aq", "be positive", value)
        layers: list[Any] = list(quantized_layers(self.model, self.config))
        self.weights: list[Tensor] = [layer.weight for layer, _ in layers]
        self.bits = [torch.full_like(w, 32, dtype=torch.uint8) for w in self.weights]
        self.units: list[float] = []
        self.bound = 0.0
        self._clear()
        return make_optimizer([{"params": list(self.model.parameters())}], self.config)

    def _clear(self) -> None:
        self.sums = [torch.zeros_like(weight) for weight in self.weights]
        self.loss_sum, self.seen = 0.0, 0

    @property
    def allocating(self) -> bool:
        return self.steps >= (self.config.epochs - 1) * self.steps_per_epoch

    @property
    def is_quantized(self) -> bool:
        return bool(self.units)

    @property
    def weight_bits(self) -> float | None:
        total = sum(weight.numel() for weight in self.weights)
        return sum(b.sum().item() for b in self.bits) / total if total else None

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        if not self.allocating:
            self.units = []  # a longer run goes on from weights that were quantized
            return super().step(closure)
        loss: Tensor = evaluate(closure)
        self.loss_sum += loss.item()
        self.seen += 1
        for total, weight in zip(self.sums, self.weights, strict=True):
            assert weight.grad is not None
            total.add_(weight.grad)
        self.steps += 1
        place = self.steps % self.steps_per_epoch or self.steps_per_epoch
        parts = min(self.options["iterations"], self.steps_per_epoch)
        if place * parts // self.steps_per_epoch != (place - 1) * parts // self.steps_per_epoch:
            self.allocate()
        return loss

    @torch.no_grad()
    def allocate(self) -> None:
        """One iteration, from the gradients since the last."""
        loss = self.loss_sum / self.seen
        largest = [max(weight.abs().max().item(), 1e-30) for weight in self.weights]
        if not self.units:
            self.units = [2.0 ** (torch.tensor(top).log2().floor().item() + 1) for top in largest]
            self.bound = loss * (1 + self.options["margin"])
        allowed = tolerances([total / self.seen for total in self.sums], self.bound - loss,
                             [self.options["trust"] * top for top in largest])
        for i, (weight, tolerance) in enumerate(zip(self.weights, allowed, strict=True)):
            value, self.bits[i] = coarsest(weight, tolerance, self.units[i])
            weight.copy_(value)
        self._clear()

    def state_dict(self) -> dict[str, Any]:  # sums are empty at an epoch's end
        return {**super().state_dict(), "bits": self.bits, "units": self.units,
                "bound": self.bound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.units, self.bound = state["units"], state["bound"]
        self.bits = [bits.to(weight.device)
                     for bits, weight in zip(state["bits"], self.weights, strict=True)]

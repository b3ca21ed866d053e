"""ALQ: adaptive loss-aware quantization (Qu, Zhou, Cheng, Thiele, CVPR 2020, arXiv 1912.08883).

A group of weights is ``ŵ = B α``: signs B of I columns, one coordinate each in α. There is no
latent weight. Groups are ``group_size``'s; a weight's code is the number of its row of signs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from blaq_kernels.reference import from_groups, to_groups
from blaq_kernels.rules import require

from ..trial import evaluate
from .method import Method, make_optimizer, quantized_layers

__all__ = ["ALQ", "MultiBit", "nearest_codes", "refit", "sign_table"]

EPS = 1e-8


def sign_table(bits: int, like: Tensor) -> Tensor:
    """Every row of signs, ``[2**bits, bits]``: row r has +1 where bit i of r is 1."""
    rows = torch.arange(2**bits, device=like.device)[:, None]
    return (((rows >> torch.arange(bits, device=like.device)) & 1) * 2 - 1).to(like.dtype)


def nearest_codes(target: Tensor, alpha: Tensor) -> Tensor:
    """The nearest of a group's ``2**I`` levels.

    Args:
        target: ``[groups, n]``.
        alpha: ``[groups, I]``.

    Returns:
        Rows of :func:`sign_table`, uint8 ``[groups, n]``.
    """
    levels, order = (alpha @ sign_table(alpha.shape[1], alpha).T).sort(1)
    place = torch.zeros_like(target, dtype=torch.uint8)
    for middle in ((levels[:, 1:] + levels[:, :-1]) / 2).unbind(1):  # 5 times searchsorted's speed
        place += target > middle[:, None]
    return order.to(torch.uint8).gather(1, place.long())


def row_sums(values: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Sum of the values of each code, float64 ``[groups, 2**bits]``."""
    if values.is_cpu:
        sums = values.new_zeros(len(values), 2**bits, dtype=torch.float64)
        return sums.scatter_add_(1, codes.long(), values.double())
    return torch.stack([values.where(codes == row, 0.0).sum(1, dtype=torch.float64)
                        for row in range(2**bits)], 1)  # a GPU scatters in no fixed order


def refit(target: Tensor, curvature: Tensor, codes: Tensor, active: Tensor) -> Tensor:
    """``(Bᵀ diag(h) B)⁻¹ Bᵀ (h ⊙ target)`` over the active columns; a pruned one's is 0.

    Args:
        target, curvature: ``[groups, n]``; padding has curvature 0.
        codes: uint8 ``[groups, n]``.
        active: bool ``[groups, I]``.
    """
    bits = active.shape[1]
    columns = sign_table(bits, target).double() * active[:, None, :]
    weighted = columns * row_sums(curvature, codes, bits)[..., None]
    gram = weighted.transpose(1, 2) @ columns
    # Equal columns have no unique solution: the ridge shares between them; others move by 1e-6.
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
    gram = gram + torch.diag_embed(torch.where(active, ridge[:, None], 1.0))
    moments = row_sums(curvature * target, codes, bits)[:, None, :] @ columns
    found: Tensor = torch.linalg.solve(gram, moments.transpose(1, 2))
    return found[..., 0].to(target.dtype)


class Moments:
    """AMSGrad's, of a tensor."""

    def __init__(self, like: Tensor) -> None:
        self.tensors = {name: torch.zeros_like(like) for name in ("mean", "square", "largest")}
        self.count = 0

    def add(self, grad: Tensor) -> None:
        self.count += 1
        self.tensors["mean"].lerp_(grad, 0.1)
        self.tensors["square"].lerp_(grad.square(), 0.001)
        corrected = self.tensors["square"] / (1 - 0.999**self.count)
        torch.maximum(self.tensors["largest"], corrected, out=self.tensors["largest"])

    def model(self, lr: float) -> tuple[Tensor, Tensor]:
        """Pseudo-gradient ``lr m̂`` and pseudo-curvature ``sqrt(v̂_max) + eps``."""
        mean = self.tensors["mean"] / (1 - 0.9**max(self.count, 1))
        return lr * mean, self.tensors["largest"].sqrt() + EPS

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


class MultiBit:
    """One layer's weight as codes and coordinates, which :meth:`begin` takes from its values."""

    def __init__(self, weight: Tensor, bits: int, group_size: int) -> None:
        self.weight, self.group_size = weight, group_size
        self.valid = to_groups(torch.ones_like(weight), group_size)
        self.codes = torch.zeros_like(self.valid, dtype=torch.uint8)
        self.alpha = self.valid.new_zeros(len(self.valid), bits)
        self.active = torch.zeros_like(self.alpha, dtype=torch.bool)
        self.reset()

    def begin(self) -> None:
        """Greedy residual binarization; all coordinates are refitted at each column."""
        groups = to_groups(self.weight.detach(), self.group_size)
        residual = groups
        for i in range(self.alpha.shape[1]):
            self.codes |= (residual >= 0).to(torch.uint8) << i
            self.active[:, i] = True
            self.alpha = refit(groups, self.valid, self.codes, self.active)
            residual = groups - self.values()
        self.write()

    def reset(self) -> None:
        """Begin a phase: moments of the weights and of the coordinates from nothing."""
        self.bases, self.coordinates = Moments(self.valid), Moments(self.alpha)

    def values(self) -> Tensor:
        """Quantized weights, ``[groups, n]``."""
        levels = self.alpha @ sign_table(self.alpha.shape[1], self.alpha).T
        return levels.gather(1, self.codes.long())

    def write(self) -> None:
        with torch.no_grad():
            self.weight.copy_(from_groups(self.values(), self.weight.shape, self.group_size))

    def gradient(self) -> Tensor:
        assert self.weight.grad is not None
        return to_groups(self.weight.grad, self.group_size)

    def step_bases(self, lr: float) -> None:
        """Nearest level to the model's minimum ``ŵ - p/h``, then coordinates of least squares."""
        self.bases.add(self.gradient())
        slope, curvature = self.bases.model(lr)
        target = self.values() - slope / curvature
        self.codes = nearest_codes(target, self.alpha)
        self.alpha = refit(target, curvature * self.valid, self.codes, self.active)
        self.write()

    def step_coordinates(self, lr: float) -> None:
        """AMSGrad on the coordinates: their gradient is ``Bᵀ ∂L/∂ŵ``."""
        bits = self.alpha.shape[1]
        sums = row_sums(self.gradient(), self.codes, bits).to(self.alpha.dtype)
        self.coordinates.add(sums @ sign_table(bits, self.alpha) * self.active)
        slope, curvature = self.coordinates.model(lr)
        self.alpha = self.alpha - slope / curvature
        self.write()

    def importance(self, lr: float) -> Tensor:
        """Rise of the model's loss where a coordinate becomes 0: ``-g α + ½ h α²``."""
        slope, curvature = self.coordinates.model(lr)
        rise = -slope * self.alpha + 0.5 * curvature * self.alpha.square()
        return rise.masked_fill(~self.active, torch.inf)

    def drop(self, coordinates: Tensor) -> None:
        self.active &= ~coordinates
        self.alpha = self.alpha * self.active
        self.write()


class Place(NamedTuple):
    """Where in the schedule a step is: the round, and whether coordinates are being trained."""

    round: int
    coordinates: bool


class ALQ(Method):
    """The first share ``dense`` of the epochs is full precision: signs cannot be trained from
    nothing, and the paper begins with a trained network (0 where ``init`` names one); what is
    measured is then the float network. The weights are then resolved into ``bits`` columns.

    The rest of the run is ``rounds + 1`` equal parts, each two thirds steps of the bases and one
    third steps of the coordinates; after each but the last, the least important share ``prune`` of
    all coordinates is dropped. Groups are ``group_size``'s weights; the paper's are at most an
    output row (-1). Norms and biases take the config's optimizer.

    ``weight_bits`` is the mean number of signs that a weight is left with, coordinates not counted.

    Options: ``dense``, ``rounds``, ``prune``. Not implemented: the final phase with latent weights
    and straight-through gradients; a number of columns by a tolerance of the residual; more than 4
    (the paper begins with 6 to 8). No packed format has free coordinates: saved as floats.
    """

    OPTIONS: ClassVar = {"dense": 0.4, "rounds": 4, "prune": 0.2}
    LEAST: ClassVar = {"rounds": 0}

    def prepare(self) -> Optimizer:
        for name in ("dense", "prune"):
            require(0 <= self.options[name] < 1, "methods", f"option {name} of alq",
                    "be in [0, 1)", self.options[name])
        layers: list[Any] = list(quantized_layers(self.model, self.config))
        for _, bits in layers:
            require(bits <= 4, "methods", "first_bits and last_bits", "be at most 4 for alq", bits)
        self.layers = [MultiBit(layer.weight, bits, self.config.group_size)
                       for layer, bits in layers]
        self.place = Place(0, False)
        self.lr = self.config.lr
        self.dense_steps: int | None = None  # of full precision; None while it lasts
        self.epoch_ended(0)
        return make_optimizer([{"params": list(self.model.parameters())}], self.config)

    @property
    def is_quantized(self) -> bool:
        return self.dense_steps is not None

    def epoch_ended(self, epoch: int) -> None:
        if self.dense_steps is None and epoch >= round(self.options["dense"] * self.config.epochs):
            self.dense_steps = self.steps
            for layer in self.layers:
                layer.begin()

    def set_lr(self, lr: float) -> None:
        super().set_lr(lr)
        self.lr = lr

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        loss: Tensor = evaluate(closure)
        if self.dense_steps is not None:
            with torch.no_grad():
                self._enter(self._scheduled(self.dense_steps))
                for layer in self.layers:
                    if self.place.coordinates:
                        layer.step_coordinates(self.lr)
                    else:
                        layer.step_bases(self.lr)
                    layer.weight.grad = None  # the optimizer steps the other parameters
        self.optimizer.step()
        self.steps += 1
        return loss

    def _scheduled(self, start: int) -> Place:
        steps = self.config.epochs * self.steps_per_epoch - start
        parts = (self.steps - start) / steps * (self.options["rounds"] + 1)
        return Place(int(parts), parts % 1 >= 2 / 3)

    def _enter(self, place: Place) -> None:
        if place == self.place:
            return
        if place.round > self.place.round:
            self.prune()
        for layer in self.layers:
            layer.reset()
        self.place = place

    def prune(self) -> None:
        """Drop the least important coordinates over all layers."""
        ranks = [layer.importance(self.lr) for layer in self.layers]
        everything = torch.cat([rank.flatten() for rank in ranks])
        count = int(self.options["prune"] * everything.isfinite().sum())
        if count:
            threshold = everything.kthvalue(count).values
            for layer, rank in zip(self.layers, ranks, strict=True):
                layer.drop(rank <= threshold)

    @property
    def weight_bits(self) -> float | None:
        if self.dense_steps is None:
            return None
        signs = sum((layer.active.sum(1) * layer.valid.sum(1)).sum().item()
                    for layer in self.layers)
        total = sum(layer.weight.numel() for layer in self.layers)
        return signs / total if total else None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "place": tuple(self.place),
                "dense_steps": self.dense_steps, "layers": [
            {"alpha": layer.alpha, "active": layer.active, "codes": layer.codes,
             "bases": layer.bases.state_dict(), "coordinates": layer.coordinates.state_dict()}
            for layer in self.layers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.place, self.dense_steps = Place(*state["place"]), state["dense_steps"]
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            for name in ("alpha", "active", "codes"):
                setattr(layer, name, saved[name].to(layer.weight.device))
            layer.bases.load_state_dict(saved["bases"])
            layer.coordinates.load_state_dict(saved["coordinates"])

"""LQ-Nets (Zhang et al., ECCV 2018, arXiv 1807.10029): levels are the sums of a small basis with
signs.

A value becomes the nearest of all ``Σ_j v_j e_j``: of weights e_j = ±1, with a basis v for each
output filter; of inputs e_j = 0 or 1, with one for the layer. Each forward in training makes one
iteration of QEM (:func:`refit`) and moves v a tenth of the way to its result; v gets no gradient.
The gradient passes straight through, to inputs between 0 and the highest level.

At first ``v_j = 2^j · 0.6745 σ / 2^(b-1)`` with σ the weights' root mean square, which is the
paper's √(2/n) where they are He's; inputs take 20 iterations on the first batch. Reading a layer's
``weight`` in training mode counts as a forward.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from .grouped import GroupQuantizer
from .quantizer import QuantizerMethod, straight_through

__all__ = ["LQNet", "LearnedBasis", "nearest", "refit"]

REGULARIZER = 1e-4  # of the least squares, which thus exists where a level is unused
MOMENTUM = 0.9
QUARTILE = 0.6745  # of the normal distribution


def nearest(groups: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level of each value's group, the larger one of two at the same distance.

    Args:
        groups: ``[groups, members]``.
        levels: ``[groups, levels]``, ascending.

    Returns:
        int64 ``[groups, members]``.
    """
    index = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    for middle in ((levels[:, 1:] + levels[:, :-1]) / 2).t():  # few: faster than a search
        index += groups >= middle[:, None]
    return index.long()


def refit(groups: Tensor, basis: Tensor, encodings: Tensor) -> Tensor:
    """One iteration of QEM (LQ-Nets, section 3.3): codes by the nearest level, then the basis by
    least squares, ``(BᵀB + δI)⁻¹ (Bᵀw + δv)``. The error ``‖w - Bv‖²`` never rises.

    Args:
        groups: ``[groups, members]``.
        basis: v, ``[groups, bits]``.
        encodings: the 2^bits vectors e that a code may be, ``[2^bits, bits]``.

    Returns:
        the new v, ``[groups, bits]``.
    """
    levels, order = (basis @ encodings.t()).sort(1)
    index = order.gather(1, nearest(groups, levels))
    # Members enter only by how many take a code and by their sum: no B of their number is made.
    empty = groups.new_zeros(len(groups), len(encodings))
    counts = empty.scatter_add(1, index, torch.ones_like(groups))
    sums = empty.scatter_add(1, index, groups)
    ridge = REGULARIZER * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    gram = torch.einsum("lb,gl,lc->gbc", encodings, counts, encodings) + ridge
    return torch.linalg.solve(gram, sums @ encodings + REGULARIZER * basis)


class LearnedBasis(GroupQuantizer):
    """LQ-Nets' quantizer."""

    widths = (1, 2, 3, 4)
    input_widths = (1, 2, 3, 4)
    group_size = -1

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.basis: Tensor
        self.encodings: Tensor
        low = -1.0 if self.signed else 0.0
        self.levels = (1.0,) if self.signed and bits == 1 else None
        self.register_buffer("basis", self.per_group() * self._doubling())
        self.register_buffer("encodings", torch.tensor(list(product((low, 1.0), repeat=bits))),
                             persistent=False)
        self.started(latent)

    def _doubling(self) -> Tensor:
        """1, 2, 4, …: with them the levels are even steps."""
        return 2.0 ** torch.arange(self.bits)

    def start(self, groups: Tensor) -> None:
        rms = groups.square().mean().sqrt()
        doubling = self._doubling().to(groups.device)
        if self.signed:
            self.basis.copy_(QUARTILE * rms * doubling / 2 ** (self.bits - 1))
            return
        self.basis.copy_(3 * rms * doubling / doubling.sum())  # levels from 0 to 3 rms
        for _ in range(20):
            self.basis.copy_(refit(groups.reshape(1, -1), self.basis, self.encodings))

    def quantize(self, groups: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training:
                self.basis.lerp_(refit(groups, self.basis, self.encodings), 1 - MOMENTUM)
            levels = (self.basis @ self.encodings.t()).sort(1).values
            value = levels.gather(1, nearest(groups, levels))
        if self.signed:
            return straight_through(groups, value)
        return straight_through(groups.clamp(min=0.0).minimum(levels[:, -1:]), value)


class LQNet(QuantizerMethod):
    """Levels learned by quantization error minimization, for weights and inputs."""

    quantizer = LearnedBasis
    activation = LearnedBasis.of_inputs

"""1-bit weights without curvature: BinaryConnect, and the gradient rule of XNOR-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from blaq_kernels.reference import SCALE_TINY, from_groups, to_groups
from blaq_kernels.rules import require

from ..functional import fake_quantize
from .norms import EstimatesNorms
from .quantizer import QuantizerMethod, WeightQuantizer, straight_through

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["BWN", "BinaryConnect", "Sign", "StochasticConnect"]


class Sign(WeightQuantizer):
    """``±magnitude`` by the sign of the latent weight; the gradient goes straight through."""

    levels = (1.0,)

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__(latent, bits, config, options)
        self.scale: Tensor
        self.register_buffer("scale", latent.new_full((1,), options["magnitude"]))

    def forward(self, latent: Tensor) -> Tensor:
        return fake_quantize(latent, self.scale, self.levels)


class RandomSign(Sign):
    """In training ``+magnitude`` with probability ``clip((w / magnitude + 1) / 2, 0, 1)``."""

    def forward(self, latent: Tensor) -> Tensor:
        if not self.training:
            return super().forward(latent)
        plus = torch.rand_like(latent) < (latent.detach() / self.scale + 1) / 2
        return straight_through(latent, torch.where(plus, self.scale, -self.scale))


class BinaryConnect(QuantizerMethod):
    """BinaryConnect (Courbariaux, Bengio, David, NeurIPS 2015), deterministic: the weight is its
    sign, without a scale; latent weights stay in [-1, 1].

    Options: ``magnitude`` H of the weights, 1 in the paper, which then relies on batch norm (the
    bound of the latent weights is ``clip``); ``glorot_lr`` multiplies each layer's learning rate by
    ``1/sqrt(1.5/(fan_in + fan_out))``, as BinaryConnect's own recipe does and LAB's does not.

    Not implemented: its exponential decay of the rate is the schedule ``exponential``.
    """

    OPTIONS: ClassVar = {"magnitude": 1.0, "glorot_lr": False}
    quantizer = Sign
    clips = True

    def groups(self) -> list[dict[str, Any]]:
        require(self.options["magnitude"] > 0, "methods", "option magnitude of bc", "be positive",
                self.options["magnitude"])
        groups = super().groups()
        if self.options["glorot_lr"]:
            own = {id(latent) for _, _, latent in self.layers}
            groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in own]
            groups += [{"params": [latent], "lr_scale": glorot_scale(latent)}
                       for _, _, latent in self.layers]
        return groups


class StochasticConnect(EstimatesNorms, BinaryConnect):
    """BinaryConnect with random signs in training.

    What is measured and ships is the sign, with batch norm's statistics estimated for it after each
    epoch. The paper measures its stochastic networks with the real latent weights instead, which
    are no 1-bit network; that is not implemented.
    """

    quantizer = RandomSign


def glorot_scale(weight: Tensor) -> float:
    """``1/sqrt(1.5/(fan_in + fan_out))``; a convolution's fans are channels times kernel area."""
    area = math.prod(weight.shape[2:])
    return math.sqrt((weight.shape[0] + weight.shape[1]) * area / 1.5)


class ScaledSign(WeightQuantizer):
    """``mean|w| · sign(w)``, differentiated as XNOR-Net does: through the mean, and through the
    sign as if it were the identity on [-1, 1]:
    ``∂L/∂w_i = sign(w_i)/n · Σ_j g_j sign(w_j) + g_i mean|w| 1[|w_i| <= 1]``.
    ``rule=identity`` has ``g_i`` instead."""

    levels = (1.0,)

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__(latent, bits, config, options)
        self.group_size, self.rule = config.group_size, options["rule"]

    def forward(self, latent: Tensor) -> Tensor:
        if self.rule == "identity":
            scale = self._scale(latent.detach()).flatten().clamp_min(SCALE_TINY)
            return fake_quantize(latent, scale, self.levels, self.group_size)
        groups = to_groups(latent, self.group_size)
        sign = torch.where(groups < 0, -1.0, 1.0)
        value = self._scale(latent) * straight_through(groups.clamp(-1.0, 1.0), sign)
        return from_groups(value, latent.shape, self.group_size)

    def _scale(self, latent: Tensor) -> Tensor:
        """``mean|w|`` of each group, ``[n, 1]``."""
        if self.group_size == 0:
            return latent.abs().mean().reshape(1, 1)
        valid = to_groups(torch.ones_like(latent), self.group_size)
        return (to_groups(latent, self.group_size).abs().sum(1, keepdim=True)
                / valid.sum(1, keepdim=True))


class BWN(QuantizerMethod):
    """Binary-Weight-Networks (Rastegari et al., ECCV 2016, XNOR-Net): ``mean|w| · sign(w)``, one
    mean for a layer, as LAB compares with it, or for an output filter (``group_size`` -1), as the
    paper has it.

    Option ``rule``: ``identity`` gives the latent weight the gradient unchanged, ``scaled`` is the
    paper's. Not implemented: subtracting the mean over input channels.
    """

    OPTIONS: ClassVar = {"rule": "identity"}
    quantizer = ScaledSign

    def groups(self) -> list[dict[str, Any]]:
        require(self.options["rule"] in ("identity", "scaled"), "methods", "option rule of bwn",
                "be identity or scaled", repr(self.options["rule"]))
        return super().groups()

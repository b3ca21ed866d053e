"""LR-nets (Shayer, Levi, Fetaya, ICLR 2018, arXiv 1710.07739): learn the distribution of each
discrete weight by the local reparameterization trick.

A weight is -1, 0 or 1 at random: 0 with ``p₀ = σ(θ_a)``, of the others 1 with ``σ(θ_b)``; a binary
one has p₀ = 0. Its mean is ``μ = (1 - p₀)(2σ(θ_b) - 1)``, its variance ``(1 - p₀) - μ²``. By the
central limit theorem a layer's output is normal, so training draws ``x∗μ + ε √(x²∗σ² + 10⁻⁷)``, and
the gradient reaches θ without any straight-through. The latent weight is θ_b. Evaluation and what
ships take each weight's most probable value; batch norm's statistics are estimated for it after
every epoch.

It starts from the layer's weights over their standard deviation, w̃:
``p₀ = clip(0.95 - 0.9|w̃|, 0.05, 0.95)``, ``σ(θ_b) = clip(½(1 + w̃/(1 - p₀)), 0.05, 0.95)``. Values
are multiplied by that standard deviation, a constant that batch norm cancels and networks without
it need. θ has the paper's small L2 (10⁻¹¹) and no other decay.

Their learning rate is 30 times the others': they move by units where weights move by hundredths.

Not implemented: the binary nets' Beta prior; drawing weights at test.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from blaq_kernels.reference import signs
from blaq_kernels.rules import require

from .lsq import TINY
from .norms import EstimatesNorms
from .quantizer import WeightQuantizer

__all__ = ["LRNet", "RandomWeight"]


class RandomWeight(WeightQuantizer):
    """A weight's distribution: in training ``forward`` gives its mean, in evaluation its mode."""

    def __init__(self, latent: Tensor, bits: int, config: Any = None, options: Any = None) -> None:
        super().__init__(latent, bits, config, options)
        require(bits in (1, 2), "RandomWeight", "bits", "be 1 (binary) or 2 (ternary)", repr(bits))
        if config is not None:
            require(config.group_size == 0, "methods", "group_size",
                    f"not be given for {config.method}, which has its own", config.group_size)
        self.options = {"l2": 1e-11, **(options or {})}
        self.levels = (1.0,) if bits == 1 else (0.0, 1.0)
        self.factor: Tensor
        self.register_buffer("factor", latent.std(correction=0).clamp_min(TINY).reshape(1))
        zero = (0.95 - 0.9 * (latent / self.factor).abs()).clamp(0.05, 0.95)
        self.zero_logit = nn.Parameter(zero.logit()) if bits == 2 else None

    def zero(self) -> Tensor | float:
        """p₀."""
        return 0.0 if self.zero_logit is None else self.zero_logit.sigmoid()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """θ_b by which the mean is the weight, where probabilities can be that large."""
        share = weight / self.factor / (1 - self.zero())
        return (0.5 * (1 + share)).clamp(0.05, 0.95).logit()

    def mean(self, latent: Tensor) -> Tensor:
        """Of the weights, like ``latent``, which is θ_b."""
        return self.factor * (1 - self.zero()) * (2 * latent.sigmoid() - 1)

    def variance(self, latent: Tensor) -> Tensor:
        """Of the weights."""
        return self.factor.square() * (1 - self.zero()) - self.mean(latent).square()

    def mode(self, latent: Tensor) -> Tensor:
        """The most probable values."""
        zero, sure = self.zero(), latent.abs().sigmoid()  # of the likelier sign, where not 0
        return torch.where((1 - zero) * sure >= zero, signs(latent), 0.0) * self.factor

    def forward(self, latent: Tensor) -> Tensor:
        return self.mean(latent) if self.training else self.mode(latent).detach()

    def penalty(self, latent: Tensor) -> Tensor | None:
        return self.options["l2"] * sum(theta.square().sum() for theta in (latent, self.zero_logit)
                                        if theta is not None)


def _draw(layer: nn.Module, args: tuple[Any, ...], mean: Tensor) -> Tensor | None:
    """The output of a layer whose weights are drawn, given the output of their means."""
    if not layer.training:
        return None
    weight: Any = layer.parametrizations["weight"]  # type: ignore[index]
    variance = weight[0].variance(weight.original)
    squares = args[0].square()
    if isinstance(layer, nn.Linear):
        spread = F.linear(squares, variance)
    else:
        spread = layer._conv_forward(squares, variance, None)  # type: ignore[operator]
    return mean + torch.randn_like(mean) * (spread + 1e-7).sqrt()


class LRNet(EstimatesNorms):
    """Distributions in place of weights: binary with 1 bit, ternary with 2."""

    OPTIONS: ClassVar = {"l2": 1e-11}
    LEAST: ClassVar = {"l2": 0}
    quantizer = RandomWeight
    quantizer_lr = 30.0

    def prepare(self) -> Optimizer:
        optimizer = super().prepare()
        self._hooks = [layer.register_forward_hook(_draw) for layer, quantizer, _ in self.layers
                       if isinstance(quantizer, RandomWeight)]
        return optimizer

    def groups(self) -> list[dict[str, Any]]:
        """Latent weights are no weights here: they have no weight decay."""
        rest, *learned = super().groups()
        latents = [latent for _, quantizer, latent in self.layers
                   if isinstance(quantizer, RandomWeight)]
        rest["params"] = [p for p in rest["params"] if all(p is not q for q in latents)]
        return [rest, *learned, {"params": latents, "weight_decay": 0.0,
                                 "lr_scale": self.quantizer_lr}]

    def finalize(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super().finalize()

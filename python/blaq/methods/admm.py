"""ADMM (Zhang et al., ECCV 2018, arXiv 1804.03294; Leng et al., AAAI 2018, arXiv 1707.09870): float
weights that a proximal term draws to the set that they end in.

``min f(W) + 1_S(Z)``, W = Z: Adam on ``f + decay/2 ‖W‖² + rho/2 ‖W - Z + U‖²``, and after every
epoch ``Z = projection of W + U on S``, ``U = U + W - Z``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..codebook import levels_for
from ..encoding import recover_scale
from ..functional import fake_quantize, solve
from ..quantization import Quantization, record
from .method import Method, make_optimizer, quantized_layers
from .norms import RecentInputs
from .quantizer import eight_bit
from .sparsity import keep_largest, shares

__all__ = ["ADMM", "ADMMPruning"]


class ADMM(Method):
    """Quantization: S is every scale × level of the codebook, the projection the unweighted exact
    solve. W is measured, and ships, projected, with batch norm's statistics estimated for that.

    Options: ``rho``, and the factor ``growth`` on it after each epoch; ``decay``. Not implemented:
    Leng et al.'s extragradient step for W.
    """

    OPTIONS: ClassVar = {"rho": 1e-4, "growth": 1.0, "decay": 5e-5}
    LEAST: ClassVar = dict.fromkeys(OPTIONS, 0)

    def prepare(self) -> Optimizer:
        layers: list[Any] = list(quantized_layers(self.model, self.config))
        self.latents: list[Tensor] = [layer.weight for layer, _ in layers]
        self.bits: list[int] = [bits for _, bits in layers]
        self.recent = RecentInputs(self.model)
        self.begin()
        self.rho: float = self.options["rho"]
        with torch.no_grad():
            self.targets = [self.projected(i, latent) for i, latent in enumerate(self.latents)]
            self.duals = [torch.zeros_like(latent) for latent in self.latents]
        return make_optimizer([{"params": list(self.model.parameters())}], self.config)

    def begin(self) -> None:
        """What a projection needs to know beforehand."""

    def projected(self, i: int, value: Tensor) -> Tensor:
        """The nearest tensor that layer i may end as."""
        config = self.config
        if self.bits[i] == 8:
            return eight_bit(value)
        levels = levels_for(config.codebook, self.bits[i])
        _, scale = solve(value, torch.ones_like(value), levels, config.group_size, method="exact")
        return fake_quantize(value, scale, levels, config.group_size)

    def penalty(self) -> Tensor | None:
        total = None
        for latent, target, dual in zip(self.latents, self.targets, self.duals, strict=True):
            near = (latent - target + dual).square().sum() * (self.rho / 2)
            term = near + latent.square().sum() * (self.options["decay"] / 2)
            total = term if total is None else total + term
        return total

    @torch.no_grad()
    def epoch_ended(self, epoch: int) -> None:
        for i, (latent, dual) in enumerate(zip(self.latents, self.duals, strict=True)):
            dual.add_(latent)
            self.targets[i] = self.projected(i, dual)
            dual.sub_(self.targets[i])
        self.rho *= self.options["growth"]
        with self.evaluating():
            self.recent.estimate_norms()

    @contextmanager
    def _shipping(self) -> Iterator[None]:
        kept = [latent.detach().clone() for latent in self.latents]
        self._project()
        try:
            yield
        finally:
            with torch.no_grad():
                for latent, value in zip(self.latents, kept, strict=True):
                    latent.copy_(value)

    @torch.no_grad()
    def _project(self) -> None:
        for i, latent in enumerate(self.latents):
            latent.copy_(self.projected(i, latent))

    def evaluating(self) -> AbstractContextManager[object]:
        return self._shipping()

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        self.recent.close()
        self._project()
        for latent, bits in zip(self.latents, self.bits, strict=True):
            if bits != 8:
                levels, group_size = levels_for(self.config.codebook, bits), self.config.group_size
                record(latent, Quantization(levels, group_size,
                                            recover_scale(latent, levels, group_size)))
        return self.model

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "targets": self.targets, "duals": self.duals,
                "rho": self.rho}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("targets", "duals"):
            setattr(self, name, [value.to(latent.device) for value, latent in
                                 zip(state[name], self.latents, strict=True)])
        self.rho = state["rho"]


class ADMMPruning(ADMM):
    """Pruning: S is every tensor with all but the share ``sparsity`` of its weights zero. For the
    last share ``retrain`` of the epochs, weights pruned for good stay zero and the rest are trained
    by the loss alone. The weights stay float.

    Options: as :class:`ADMM`; ``sparsity``, of all layers or ``0.8:0.92:…`` of each; ``retrain``.
    """

    OPTIONS: ClassVar = {**ADMM.OPTIONS, "sparsity": "0.9", "retrain": 0.3}

    def begin(self) -> None:
        self.sparsity = shares(self.config.method, "sparsity", self.options["sparsity"],
                               len(self.latents))
        self.masks: list[Tensor] = []

    def projected(self, i: int, value: Tensor) -> Tensor:
        if self.masks:
            return value * self.masks[i]
        return value * keep_largest(value, self.sparsity[i])

    def penalty(self) -> Tensor | None:
        return None if self.masks else super().penalty()

    @torch.no_grad()
    def after_step(self) -> None:
        for latent, mask in zip(self.latents, self.masks, strict=False):  # none before retraining
            latent.mul_(mask)

    @torch.no_grad()
    def epoch_ended(self, epoch: int) -> None:
        if not self.masks and epoch >= self.config.epochs * (1 - self.options["retrain"]):
            self.masks = [keep_largest(latent, share) for latent, share in
                          zip(self.latents, self.sparsity, strict=True)]
            self._project()
        if not self.masks:
            super().epoch_ended(epoch)

    def finalize(self) -> nn.Module:
        self.recent.close()
        self._project()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.masks = [mask.to(latent.device)
                      for mask, latent in zip(state["masks"], self.latents, strict=False)]

"""Methods that are settings of :class:`blaq.BLAQ`: scale and codes are solved for by curvature.

LAB (Hou, Yao, Kwok, ICLR 2017, arXiv 1611.01600, Eqs. 7, 8), LAQ (Hou, Kwok, ICLR 2018, arXiv
1802.08635) and BLAQ (Ma et al., AAAI 2024, arXiv 2401.16760). One optimizer trains all parameters,
so biases and norms take AdamW's step with the same learning rate, as in LAB. The paper's scale is
one for a layer; ``group_size`` gives finer ones.

Not implemented: LAB's and LAQ's quantized activations and recurrent nets' one scale for each gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from blaq_kernels.rules import require

from ..optim import BLAQ
from .method import Method, groups_of

__all__ = ["LAQ", "Alternating", "ErrorCompensation", "Exact", "OnePass", "OneStepBack"]


class LAQ(Method):
    """LAQ, and by its codebook LAB (1 bit), LAQ-linear and LAQ-log: one evaluation a step, whose
    gradient at the quantized weights moves the latent ones."""

    optimizer: BLAQ

    def prepare(self) -> Optimizer:
        config = self.config
        require(config.optimizer == "adamw", "methods", "optimizer",
                f"be adamw, whose second moment is the curvature, for {config.method}",
                repr(config.optimizer))
        return BLAQ(groups_of(self.model, config), config.lr, codebook=config.codebook,
                    group_size=config.group_size, weight_decay=config.weight_decay,
                    clip=config.clip, **self.settings())

    def settings(self) -> dict[str, Any]:
        """What this reading of the method gives the optimizer."""
        return {"backtrack": 1.0, "max_iter": self.config.max_iter, "method": self.config.solve}

    @property
    def evaluations_per_step(self) -> int:
        return self.optimizer.evaluations_per_step


class ErrorCompensation(LAQ):
    """LAQ with the gradient moved from the quantized to the latent weight by a first-order term:
    ``g = ĝ + strength · d (w - ŵ)``, d = sqrt(v̂) + eps (the idea of Peng et al., 2021, whose paper
    gives no more than its abstract here). One evaluation a step.

    Divided by d, the term pulls latent weights towards quantized ones by ``lr · strength`` of their
    distance. It is applied like decoupled weight decay: it must not enter the moments, from which d
    itself comes. ``strength = 1/lr`` is LAB's Eq. 7 to the letter, a step from ŵ.
    """

    OPTIONS: ClassVar = {"strength": 1.0}

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        def compensated() -> Tensor:
            loss = closure()
            self.compensate()
            return loss

        return super().step(compensated)

    @torch.no_grad()
    def compensate(self) -> None:
        """Pull the latent weights: each keeps its nearest level, so its code."""
        for group in self.optimizer.param_groups:
            share = min(1.0, group["lr"] * self.options["strength"])
            for param in group["params"]:
                if group["bits"] is not None:
                    self.optimizer.state[param]["latent"].lerp_(param.float(), share)


class Alternating(LAQ):
    """LATa: scale and codes are solved for in turn, whatever ``solve`` says."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "method": "alternating"}


class Exact(LAQ):
    """LATe: the solve ends at its global minimum, whatever ``solve`` says."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "method": "exact"}


class OneStepBack(LAQ):
    """BLAQ: one step forward and backtrack, two evaluations a step."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "backtrack": self.config.backtrack}


class OnePass(OneStepBack):
    """BLAQ with Eq. 9 read recursively: last step's blended gradient is its current one."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "one_pass": True}

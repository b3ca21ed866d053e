"""TRQ, ternary residual quantization (Li et al., AAAI 2021): a weight is a stem and its residual.

``S = α sign(w)``, ``R = α sign(w - S)``, ``T = S + R``: -2α, 0 or 2α with thresholds ±α; one
learned α for a layer. The paper's rules for the gradients are not known here. The one to w is
straight through where |w| <= 2α, the one to α is ``Σ g T/α``, times 1/√n as in LSQ. α is at first
0.6 of the weights' root mean square: in that unit the paper is reported to start at 0.5 to 1.5 and
to end at 0.6.

Not implemented: more terms for more bits; ternary activations; batch norm of the two terms apart
(TRQ-bn).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from blaq_kernels.reference import signs

from .grouped import GroupQuantizer, scaled_gradient
from .lsq import TINY
from .quantizer import QuantizerMethod, straight_through

__all__ = ["TRQ", "StemResidual"]


class StemResidual(GroupQuantizer):
    """TRQ's quantizer."""

    widths = (2,)
    levels = (0.0, 1.0)

    def __init__(self, latent: Tensor | None, bits: int, *rest: Any) -> None:
        super().__init__(latent, bits, *rest)
        self.scale = nn.Parameter(self.per_group())
        self.started(latent)

    def start(self, groups: Tensor) -> None:
        self.scale.copy_(0.6 * groups.square().mean(1, keepdim=True).sqrt())

    def quantize(self, groups: Tensor) -> Tensor:
        alpha = scaled_gradient(self.scale.abs().clamp_min(TINY), 1 / math.sqrt(groups.numel()))
        held = alpha.detach()
        stem = signs(groups)
        both = stem + signs(groups - held * stem)
        return straight_through((groups / held).clamp(-2, 2), both) * alpha


class TRQ(QuantizerMethod):
    """Ternary weights as two signs."""

    quantizer = StemResidual
    quantizer_lr = 0.1

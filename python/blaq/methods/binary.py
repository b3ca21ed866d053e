"""BinaryConnect (Courbariaux, Bengio, David, NeurIPS 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..functional import fake_quantize
from .quantizer import QuantizerMethod, WeightQuantizer

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["BinaryConnect", "Sign"]


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


class BinaryConnect(QuantizerMethod):
    """Weights ``sign(w)``, without a scale; latent weights stay in [-1, 1]."""

    OPTIONS: ClassVar = {"magnitude": 1.0}
    quantizer = Sign
    clips = True

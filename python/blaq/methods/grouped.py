"""What the quantizers of weights and of inputs share: groups of values that have parameters in
common, and how a gradient passes a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blaq_kernels.reference import from_groups, scale_shape, to_groups
from blaq_kernels.rules import require

from ..functional import solve
from .quantizer import WeightQuantizer, straight_through

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["GroupQuantizer", "best_scale", "scaled_gradient"]


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` to the bit, with its gradient times ``factor`` (LSQ, Esser et al., 2020, section
    2.2)."""
    return straight_through(x * factor, x)


@torch.no_grad()
def best_scale(weight: Tensor, levels: Sequence[float]) -> Tensor:
    """The one scale of least squared error for a codebook, ``[1, 1]``."""
    fixed = weight.detach()
    _, scale = solve(fixed, torch.ones_like(fixed), levels, method="exact")
    return scale.reshape(1, 1)


class GroupQuantizer(WeightQuantizer):
    """Quantizes a weight, or a layer's input, group by group.

    A subclass says which ``widths`` have a meaning for weights and for inputs, has ``group_size`` 0
    (one group) or -1 (one for each output row or filter), makes what it learns by
    :meth:`per_group`, sets it in :meth:`start`, and quantizes in :meth:`quantize`. Weights are
    signed. Inputs are taken for what a ReLU gives, are one group, and set the parameters by the
    first batch in training.

    Args:
        latent: weight ``[out, ...]``; None: the quantizer is one of inputs.
        bits: width of a quantized value.
        config, options: as :class:`WeightQuantizer` has them.

    Raises:
        ValueError: the method has no meaning at this width.
    """

    widths: tuple[int, ...] = (2, 3, 4)
    input_widths: tuple[int, ...] = ()
    probe: Callable[[Tensor], Tensor] | None = None
    """What a method that looks around the quantized values puts behind them for an evaluation."""

    def __init__(self, latent: Tensor | None, bits: int, config: TrainConfig | None = None,
                 options: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(latent, bits, config, options)  # type: ignore[arg-type]
        self.signed = latent is not None
        widths, what = ((self.widths, "weights") if self.signed else (self.input_widths, "inputs"))
        require(bits in widths, type(self).__name__, "bits",
                f"be {' or '.join(map(str, widths)) or '0'} for {what}", repr(bits))
        if config is not None:
            require(config.group_size in (0, self.group_size), "methods", "group_size",
                    f"not be given for {config.method}, which has its own", config.group_size)
        self.bits, self.options = bits, options
        self._groups = 1
        if latent is not None:
            self._groups = math.prod(scale_shape(latent.shape, self.group_size))
        self.ready: Tensor
        self.register_buffer("ready", torch.tensor(False))

    @classmethod
    def of_inputs(cls, bits: int, config: TrainConfig | None = None,
                  options: Mapping[str, Any] = MappingProxyType({})) -> GroupQuantizer:
        """The quantizer of a layer's input."""
        return cls(None, bits, config, options)

    def per_group(self, value: float = 1.0) -> Tensor:
        """A number for each group, float32 ``[groups, 1]``."""
        return torch.full((self._groups, 1), value)

    @torch.no_grad()
    def started(self, values: Tensor | None) -> None:
        """Set the parameters by these values, if there are any: a subclass's last line."""
        if values is not None:
            self.start(self._grouped(values.detach().to(self.ready.device)))
            self.ready.fill_(True)

    def start(self, groups: Tensor) -> None:
        """Set parameters and buffers by what is quantized first, ``[groups, members]``."""

    def quantize(self, groups: Tensor) -> Tensor:
        """``[groups, members]`` to the same, quantized."""
        raise NotImplementedError

    def _grouped(self, values: Tensor) -> Tensor:
        return to_groups(values, self.group_size if self.signed else 0)

    def forward(self, latent: Tensor) -> Tensor:
        wide = latent.float() if latent.dtype in (torch.bfloat16, torch.float16) else latent
        if self.training and not self.ready:
            self.started(wide)
        size = self.group_size if self.signed else 0
        value = from_groups(self.quantize(self._grouped(wide)), latent.shape, size)
        return (value if self.probe is None else self.probe(value)).to(latent.dtype)

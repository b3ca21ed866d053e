"""Networks of 1-bit weights and 1-bit activations: ``BinaryActivation`` to train one, and the packed
layers that :func:`blaq.pack` and :func:`blaq.load` put behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blaq_kernels
from blaq_kernels.autograd import straight_through
from blaq_kernels.reference import signs

from .nn import PackedConv2d, PackedLayer, PackedLinear, run

__all__ = ["BINARY_OF", "BinaryActivation", "PackedBinaryConv2d", "PackedBinaryLinear", "binarize"]


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return signs(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return straight_through(grad, *ctx.saved_tensors)


class BinaryActivation(nn.Module):
    """The sign of every element: -1 where ``input < 0``, else 1, also for -0 and NaN.

    Its gradient goes straight through where ``|input| <= 1`` and is 0 elsewhere. Any shape, any
    floating dtype. In an ``nn.Sequential``, a Linear or Conv2d with 1-bit weights that comes next is
    packed to multiply bits by bits, as in XNOR-Net (Rastegari et al., 2016).

    >>> BinaryActivation()(torch.tensor([-2.0, -0.0, 0.5]))
    tensor([-1.,  1.,  1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return _Sign.apply(input)


class BinaryLayer(PackedLayer):
    """What the two layers share: the weight in the order that kernels read."""

    @staticmethod
    def takes(layer: PackedLayer) -> bool:
        """Whether the codebook and the groups of a packed layer are those of a binary product."""
        return layer.levels == (1.0,) and layer.group_size in (0, -1)

    @classmethod
    def from_packed(cls, layer: PackedLayer) -> BinaryLayer:
        """The layer that takes the signs of its input, of the same tensors."""
        new = cls.like(layer, layer.levels, layer.group_size, layer.dtype)
        new.qweight, new.scale, new.bias = layer.planes(), layer.scale, layer.bias
        new.mapped = layer.mapped
        return new

    def _geometry(self) -> tuple[int, int, int]:
        """Inputs of an output, taps and groups."""
        raise NotImplementedError

    def _wants_repacked(self, qweight: Tensor) -> bool:
        return qweight.is_cpu and bool(blaq_kernels.cpu_capabilities())

    def _reads_planes(self) -> bool:
        return True

    def _repack(self) -> Tensor:
        return torch.ops.blaq.binary_repack.default(self.qweight, *self._geometry())


class PackedBinaryLinear(BinaryLayer, PackedLinear):
    """``nn.Linear`` of the signs of its input, from a 1-bit weight: ``[..., K]`` → ``[..., N]`` in the
    input's dtype, by :func:`blaq.functional.binary_linear`. Arguments are :class:`PackedLinear`'s;
    ``levels`` is ``(1.0,)`` and ``group_size`` 0, -1 or a multiple of 64."""

    @staticmethod
    def takes(layer: PackedLayer) -> bool:
        return layer.levels == (1.0,) and (layer.group_size <= 0 or layer.group_size % 64 == 0)

    def _geometry(self) -> tuple[int, int, int]:
        return self.in_features, 1, 1

    def _wants_repacked(self, qweight: Tensor) -> bool:
        return blaq_kernels.reads_repacked(qweight.device, "binary_linear")

    def forward(self, input: Tensor) -> Tensor:
        input, bias = self._operands(input, -1, "in_features")
        return run(torch.ops.blaq.binary_linear.default, input, self._buffers["qweight"],
                   self._buffers["scale"], bias, self.group_size, self.repacked())


class PackedBinaryConv2d(BinaryLayer, PackedConv2d):
    """``nn.Conv2d`` of the signs of its input, from a 1-bit weight, by
    :func:`blaq.functional.binary_conv2d`; padding with zeros adds nothing. Arguments are
    :class:`PackedConv2d`'s; ``levels`` is ``(1.0,)`` and ``group_size`` 0 or -1."""

    def _geometry(self) -> tuple[int, int, int]:
        height, width = self.kernel_size
        return self.in_channels // self.groups * height * width, height * width, self.groups

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self(input[None])[0]
        input, bias = self._operands(input, -3, "in_channels")
        padding, row, column = self._op_padding, 0, 0
        if self._pad_first is not None:
            left, right, top, bottom = self._pad_first
            if self.padding_mode == "zeros":  # a zero has a sign: pad alike on both sides, and cut
                padding, row, column = (bottom, right), bottom - top, right - left
            else:
                input = F.pad(input, self._pad_first, mode=self.padding_mode)
        output = run(torch.ops.blaq.binary_conv2d.default, input, self._buffers["qweight"],
                     self._buffers["scale"], bias, self.group_size, self.kernel_size, self.stride,
                     padding, self.dilation, self.groups, self.repacked())
        return output[..., row:, column:] if row or column else output


BINARY_OF: dict[type[PackedLayer], type[BinaryLayer]] = {
    PackedLinear: PackedBinaryLinear, PackedConv2d: PackedBinaryConv2d}


def binarize(model: nn.Module) -> dict[PackedLayer, BinaryLayer]:
    """The binary layer for every packed one that stands only behind a ``BinaryActivation``, in an
    ``nn.Sequential``, and has 1-bit weights. The activation stays: its signs are their own signs, and
    the model is unpacked as it was."""
    behind: set[nn.Module] = set()
    elsewhere: set[nn.Module | None] = {model}
    for parent in model.modules():
        children = list(parent._modules.values())
        for before, layer in zip([None, *children], children, strict=False):
            follows = type(parent) is nn.Sequential and type(before) is BinaryActivation
            (behind if follows and layer is not None else elsewhere).add(layer)
    return {layer: BINARY_OF[type(layer)].from_packed(layer) for layer in behind - elsewhere
            if type(layer) in BINARY_OF and BINARY_OF[type(layer)].takes(layer)}

"""Layers that compute from bit-packed weights: ``PackedLinear`` and ``PackedConv2d``.

They take the place of ``nn.Linear`` and ``nn.Conv2d`` and look like them: the same attributes, and
a ``weight`` that decodes on every read. ``qweight`` and ``scale`` are buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

import blaq_kernels
from blaq_kernels.codebook import bits_of, check_levels
from blaq_kernels.reference import matrix_shape, scale_shape

from . import decoded, decoded_conv
from .accuracy import checked, get_accuracy
from .decoded import version
from .encoding import encode
from .memory import page_out
from .planes import Planes
from .quantization import Quantization

__all__ = ["PackedConv2d", "PackedLinear"]

P = TypeVar("P", bound="PackedLayer")


def run(op: Callable[..., Tensor], input: Tensor, qweight: Tensor, scale: Tensor,
        bias: Tensor | None, *others: object) -> Tensor:
    """The op; where no gradient is wanted, past torch's autograd for ops defined in Python, which
    takes 11 µs to find that out."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or (
            torch.is_grad_enabled() and (input.requires_grad or scale.requires_grad
                                         or (bias is not None and bias.requires_grad))):
        return op(input, qweight, scale, bias, *others)
    with torch._C._AutoDispatchBelowAutograd():
        return op(input, qweight, scale, bias, *others)


class PackedLayer(Planes):
    """What the packed layers share: the packed weight, its decoding, and the ways in and out.

    Attributes:
        qweight: uint8 ``[bits, N, ceil(K/8)]``, bit planes of the codes (docs/format.md); ``[bits, N, 0]``
            after :func:`blaq.drop_planes`.
        scale: float32 ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``; float32 it stays, whatever dtype
            the module is cast to (float64 after ``.double()``). ``scale.requires_grad_()`` makes it
            trainable, for an optimizer that is given ``layer.scale``.
        bias: ``[N]`` in the module's dtype, or None.
        levels, bits, group_size: the codebook and the grouping.
        dtype: of ``weight``; casting the module changes it and ``bias``, never the codes.
        folded: whether a norm is part of ``scale`` and ``bias`` (:func:`blaq.fold_norm`).
        mapped: the ``qweight`` that :func:`blaq.load` left in its file, or None.
    """

    FLOAT: ClassVar[type[nn.Module]]
    GEOMETRY: ClassVar[tuple[str, ...]]
    """Constructor arguments, and attributes, that the float layer has too."""

    scale: Tensor
    bias: nn.Parameter | None
    folded: bool = False
    mapped: Tensor | None = None

    _accuracy: str | None = None
    _kept_decoded: decoded.Decoded | None = None

    def __init__(self, weight_shape: Sequence[int], bias: bool, levels: Sequence[float],
                 group_size: int, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        check_levels(type(self).__name__, levels)
        if group_size < -1:
            raise ValueError(f"blaq.{type(self).__name__}: group_size must be 0, -1 or positive, "
                             f"got {group_size}")
        self.weight_shape = tuple(weight_shape)
        self.levels = tuple(float(level) for level in levels)
        self.bits = bits_of(levels)
        self.group_size = group_size
        self.dtype = dtype or torch.get_default_dtype()
        n, k = matrix_shape(weight_shape)
        self.register_buffer("qweight", torch.zeros(self.bits, n, (k + 7) // 8, dtype=torch.uint8,
                                                    device=device))
        self.register_buffer("scale", torch.ones(scale_shape(weight_shape, group_size),
                                                 dtype=torch.float32, device=device))
        self.register_parameter("bias", nn.Parameter(
            torch.zeros(n, device=device, dtype=self.dtype)) if bias else None)

    @property
    def weight(self) -> Tensor:
        """The quantized weight in ``dtype``, decoded anew on every read; not a parameter."""
        flat: Tensor = torch.ops.blaq.unpack.default(
            self.planes(), self.scale.detach(), self.levels, self.group_size,
            matrix_shape(self.weight_shape)[1], self.dtype)
        return flat.reshape(self.weight_shape)

    @property
    def accuracy(self) -> str:
        """``exact``, ``high`` or ``fast`` (:func:`blaq.set_accuracy`); a layer that is given none
        has what all have. None gives it back."""
        return self._accuracy or get_accuracy()

    @accuracy.setter
    def accuracy(self, accuracy: str | None) -> None:
        self._accuracy = None if accuracy is None else checked(type(self).__name__, accuracy)

    def repacked(self) -> Tensor | None:
        """``qweight`` in the order that the fast kernels of its device read, made on first use
        and kept while ``qweight`` stays as it is; None where no such kernel is. Never saved. A graph
        that ``torch.compile`` captures has what an eager call made before, so make one first; an
        exported program has none, and computes exactly."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() and self.lacks_planes:
                raise ValueError(f"blaq.{type(self).__name__}: layer must have its planes to be exported, "
                                 "got one that dropped them; try blaq.restore_planes(model)")
            kept = None if torch.compiler.is_exporting() else self._repacked
            return None if kept is None else kept[2]
        qweight = self._buffers["qweight"]
        if not self._wants_repacked(qweight):
            self.keep_planes()
            return None
        now, kept = version(qweight), self._repacked
        if kept is None or kept[0] is not qweight or kept[1] != now:
            # Two threads may both make it: the same.
            with torch.inference_mode(False), torch.no_grad():  # a graph may save it
                kept = self._repacked = qweight, now, self._repack()
            if qweight is self.mapped:
                page_out(qweight)
        return kept[2]

    def _wants_repacked(self, qweight: Tensor) -> bool:
        return qweight.is_cpu and self.accuracy != "exact" and blaq_kernels.has_int8()

    def _repack(self) -> Tensor:
        return torch.ops.blaq.repack.default(self.qweight)

    def _decoded(self, dtype: torch.dtype,
                 layout: torch.memory_format = torch.contiguous_format) -> Tensor | None:
        """``weight`` in a dtype, kept in the place of the repacked one; None where ``scale`` wants a
        gradient."""
        qweight, scale = self._buffers["qweight"], self._buffers["scale"]
        if scale.requires_grad and torch.is_grad_enabled():
            return None
        kept = self._kept_decoded
        if (kept is None or not kept.is_of(qweight, scale) or kept.weight.dtype is not dtype
                or kept.layout is not layout):
            with torch.inference_mode(False), torch.no_grad():  # a graph may save it
                weight = torch.ops.blaq.unpack.default(
                    self.planes().detach(), scale.detach(), self.levels, self.group_size,
                    matrix_shape(self.weight_shape)[1], dtype
                ).reshape(self.weight_shape).contiguous(memory_format=layout)
            kept = self._kept_decoded = decoded.Decoded(
                qweight, scale, (version(qweight), version(scale)), *self._bounds(dtype),
                self.accuracy, layout, weight)
        return kept.weight

    def _bounds(self, dtype: torch.dtype) -> tuple[int, int]:
        """Of :class:`blaq.decoded.Decoded`; these are for no input."""
        return -1, decoded.ALL

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept_decoded": None}

    @property
    def bytes_repacked(self) -> int:
        """What the layer keeps in memory now beside its tensors, for its kernels."""
        return sum(kept[-1].nbytes for kept in (self._repacked, self._kept_decoded) if kept)

    @classmethod
    def like(cls: type[P], layer: nn.Module, levels: Sequence[float], group_size: int,
             dtype: torch.dtype) -> P:
        """A layer of this geometry, float or packed, whose tensors are still on the meta device."""
        geometry = {name: getattr(layer, name) for name in cls.GEOMETRY}
        packed = cls(**geometry, bias=layer.bias is not None, levels=levels,
                     group_size=group_size, device="meta", dtype=dtype)
        return packed.train(layer.training)

    @classmethod
    def from_float(cls: type[P], layer: nn.Module, quantization: Quantization,
                   name: str = "weight") -> P:
        """Pack a float layer whose weight is quantized; ``bias`` is the same parameter.

        Raises:
            ValueError: a value is not ``level × scale`` bit for bit; the message calls it ``name``.
        """
        levels, group_size = quantization.levels, quantization.group_size
        weight = layer.weight
        qweight = encode(name, weight, levels, group_size, quantization.scale)
        packed = cls.like(layer, levels, group_size, weight.dtype)
        packed.qweight = qweight
        packed.scale = quantization.scale.detach().to(weight.device, copy=True)
        packed.bias = layer.bias
        return packed

    def to_float(self) -> nn.Module:
        """The float layer with the same weight, bit for bit: the inverse of :meth:`from_float`."""
        geometry = {name: getattr(self, name) for name in self.GEOMETRY}
        layer = self.FLOAT(**geometry, bias=self.bias is not None, device="meta", dtype=self.dtype)
        layer.weight = nn.Parameter(self.weight)
        layer.bias = self.bias
        return layer.train(self.training)

    def _operands(self, input: Tensor, dim: int, features: str) -> tuple[Tensor, Tensor | None]:
        """Input and bias in the dtype to compute in: autocast casts them, as it does for the float
        layers; the weight is decoded to the input's dtype by the op. The size is checked here: the
        op sees only K rounded up to bytes."""
        if input.shape[dim] != getattr(self, features):
            raise ValueError(f"blaq.{type(self).__name__}: input must have {features} = "
                             f"{getattr(self, features)} in dimension {dim}, got shape "
                             f"{list(input.shape)}")
        if self.folded and self.training:
            raise ValueError(f"blaq.{type(self).__name__}: layer must be in eval mode, for a norm is "
                             "folded into it, got training mode")
        # By the dict: a call this small is mostly Python, and nn.Module finds attributes last.
        bias = self._parameters["bias"]
        kind = "cpu" if input.is_cpu else input.device.type
        if not torch.is_autocast_enabled(kind):
            return input, bias
        input = input.to(torch.get_autocast_dtype(kind))
        return input, None if bias is None else bias.to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Keeps ``scale`` wide: a scale rounded to 16 bits would change every weight."""
        self.keep_planes()
        self._repacked = self._kept_decoded = None
        scale, probe = self.scale, fn(self.scale.new_empty(0, dtype=self.dtype))
        super()._apply(fn, recurse)
        self.dtype = probe.dtype
        wide = torch.float64 if probe.dtype == torch.float64 else torch.float32
        moved = self.scale if self.scale.dtype == wide else scale.to(self.scale.device, wide)
        if moved is not scale:
            moved = moved.detach().requires_grad_(scale.requires_grad)
        self.scale = moved
        return self

    def get_extra_state(self) -> Tensor:
        """``[group_size, *levels]``, float64, so that a state_dict holds tensors only."""
        return torch.tensor([self.group_size, *self.levels], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuses codes of another codebook, which would load and mean other weights."""
        if state.tolist() != [self.group_size, *self.levels]:
            group_size, *levels = state.tolist()
            raise ValueError(
                f"blaq.{type(self).__name__}: state_dict must have levels {list(self.levels)} and "
                f"group_size {self.group_size}, got {levels} and {group_size:g}")

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.GEOMETRY)
        return (f"{shown}, bias={self.bias is not None}, bits={self.bits}, "
                f"levels=[{', '.join(f'{level:g}' for level in self.levels)}], "
                f"group_size={self.group_size}{', folded' if self.folded else ''}"
                f"{', relu' if getattr(self, 'relu', False) else ''}")


def require_unfolded(op: str, name: str, module: nn.Module) -> None:
    """Raise ValueError for a packed layer that is no longer what was packed."""
    if isinstance(module, PackedLayer) and (module.folded or getattr(module, "relu", False)):
        raise ValueError(f"blaq.{op}: {name or 'model'} must be as it was packed, got one with a norm or "
                         "a ReLU folded into it; try again before blaq.fold_norm")


class PackedLinear(PackedLayer):
    """``nn.Linear`` from a packed weight: ``input [..., K]`` → ``[..., N]`` in the input's dtype.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear`` has them.
        levels: ascending magnitudes of the codebook, at most 8, the largest 1.0.
        group_size: 0 one scale for the tensor, -1 one a row, g > 0 one for each g inputs of a row.

    >>> layer = PackedLinear(8, 2, levels=(1.0,), bias=False)
    >>> layer(torch.ones(1, 8))
    tensor([[8., 8.]])
    """

    FLOAT = nn.Linear
    GEOMETRY = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 levels: Sequence[float], group_size: int = 0, device: Any = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__((out_features, in_features), bias, levels, group_size, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, input: Tensor) -> Tensor:
        eager, kept = not torch.compiler.is_compiling(), self._kept_decoded
        if kept is not None and eager and not self.folded and kept.serves(
                input, self._buffers["qweight"], self._buffers["scale"]):
            try:  # at once, for of a call's 5 µs half is Python
                return F.linear(input, kept.weight, self._parameters["bias"])
            except RuntimeError:  # of another dtype or size, which what follows sees to
                pass
        if self.folded and input.dim() != 2:  # a BatchNorm1d takes dimension 1 for the features
            raise ValueError("blaq.PackedLinear: input must have 2 dimensions, for a norm is folded "
                             f"into the layer, got shape {list(input.shape)}")
        input, bias = self._operands(input, -1, "in_features")
        if (eager and input.is_cpu
                and decoded.takes_linear(input, self.out_features, self.in_features, self.bits,
                                         self.accuracy)):
            weight = self._decoded(input.dtype)
            if weight is not None:
                return decoded.linear(input, weight, bias)
        repacked = self.repacked()  # first: it may make qweight whole
        return run(torch.ops.blaq.packed_linear.default, input, self._buffers["qweight"],
                   self._buffers["scale"], bias, self.levels, self.group_size, repacked, self.accuracy)

    def _bounds(self, dtype: torch.dtype) -> tuple[int, int]:
        uncounted = self.qweight.is_inference() or self.scale.is_inference()  # have no versions
        return super()._bounds(dtype) if uncounted else decoded.bounds(dtype, *self.weight_shape)

    def _wants_repacked(self, qweight: Tensor) -> bool:
        if not qweight.is_cuda:
            return super()._wants_repacked(qweight)
        narrow = self.dtype.itemsize == 2 or torch.is_autocast_enabled("cuda")
        return narrow and blaq_kernels.reads_repacked(qweight.device)


class PackedConv2d(PackedLayer):
    """``nn.Conv2d`` from a packed weight, every padding and ``padding_mode`` included.

    Args:
        in_channels … padding_mode, device, dtype: as ``nn.Conv2d`` has them.
        levels: ascending magnitudes of the codebook, at most 8, the largest 1.0.
        group_size: 0 one scale for the tensor, -1 one for each output channel, g > 0 one for each g
            of an output channel's ``in/groups · kh · kw`` weights.

    Attributes:
        relu: whether negative results become 0 (:func:`blaq.fold_norm`).
    """

    FLOAT = nn.Conv2d
    GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                "groups", "padding_mode")
    transposed = False
    relu: bool = False
    output_padding = (0, 0)

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int | tuple[int, int] = 1, padding: int | str | tuple[int, int] = 0,
                 dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", *, levels: Sequence[float], group_size: int = 0,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        # The float layer, without memory, checks the arguments and brings each to its full form.
        like = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device="meta", dtype=dtype)
        super().__init__(like.weight.shape, bias, levels, group_size, device, dtype)
        for name in self.GEOMETRY:
            setattr(self, name, getattr(like, name))
        self._pad_first, self._op_padding = self._resolve_padding()

    def _resolve_padding(self) -> tuple[list[int] | None, tuple[int, int]]:
        """What ``F.pad`` does first, if anything, and the symmetric zero padding left to the op."""
        before, after = [0, 0], [0, 0]
        if self.padding == "same":  # an even kernel needs one more after than before
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            before = [t // 2 for t in total]
            after = [t - b for t, b in zip(total, before, strict=True)]
        elif self.padding != "valid":
            before = after = list(_pair(self.padding))
        if self.padding_mode == "zeros" and before == after:
            return None, (before[0], before[1])
        return [before[1], after[1], before[0], after[0]], (0, 0)

    def forward(self, input: Tensor) -> Tensor:
        eager, kept = not torch.compiler.is_compiling(), self._kept_decoded
        if (kept is not None and eager and self._pad_first is None and not (self.folded and self.training)
                and kept.serves(input, self._buffers["qweight"], self._buffers["scale"])
                and kept.accuracy == self.accuracy
                and (kept.layout is torch.contiguous_format) == input.is_contiguous()):
            try:  # at once, as PackedLinear does
                return decoded_conv.conv2d(input, kept.weight, self._parameters["bias"], self.stride,
                                           self._op_padding, self.dilation, self.groups, self.relu)
            except RuntimeError:
                pass
        if input.dim() == 3:
            return self(input[None])[0]
        input, bias = self._operands(input, -3, "in_channels")
        if self._pad_first is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._pad_first, mode=mode)
        if eager and input.is_cpu and self._takes_conv(input.dtype):
            weight = self._decoded(input.dtype, decoded_conv.memory_format(input))
            if weight is not None:
                return decoded_conv.conv2d(input, weight, bias, self.stride, self._op_padding,
                                           self.dilation, self.groups, self.relu)
        repacked = self.repacked()  # first: it may make qweight whole
        return run(torch.ops.blaq.packed_conv2d.default, input, self._buffers["qweight"],
                   self._buffers["scale"], bias, self.levels, self.group_size, self.kernel_size,
                   self.stride, self._op_padding, self.dilation, self.groups, repacked,
                   self.accuracy, self.relu)

    def _wants_repacked(self, qweight: Tensor) -> bool:
        # Without groups of inputs, the only 8-bit kernels of convolutions are AVX-512's.
        return super()._wants_repacked(qweight) and (
            self.group_size > 0 or blaq_kernels.int8_kernels() == "AVX-512 VNNI")

    def _bounds(self, dtype: torch.dtype) -> tuple[int, int]:
        uncounted = self.qweight.is_inference() or self.scale.is_inference()
        return super()._bounds(dtype) if uncounted else (decoded.ALL, decoded.ALL)

    def _takes_conv(self, dtype: torch.dtype) -> bool:
        return decoded_conv.takes_conv(dtype, self.weight_shape, self.groups, self.bits, self.group_size,
                                       self.accuracy)

    def _reads_planes(self) -> bool:
        outputs, channels = self.out_channels // self.groups, self.in_channels // self.groups
        narrow = (min(outputs, channels) < decoded_conv.FEW or self._takes_conv(self.dtype)
                  or (self.group_size > 0 and self.groups > 1 and outputs % 16))
        return bool(narrow) or super()._reads_planes()

    def _repack(self) -> Tensor:
        if self.group_size > 0:
            return super()._repack()
        taps = self.kernel_size[0] * self.kernel_size[1]
        return torch.ops.blaq.conv_repack.default(
            self.qweight, self.in_channels // self.groups * taps, taps, self.groups)

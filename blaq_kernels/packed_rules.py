"""Argument rules of the ops on packed weights: ``pack``, ``unpack``, products and their repacked weights;
and the shapes that they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fragments
from .codebook import bits_of, check_levels
from .rules import (
    ACCURACIES,
    FLOAT_DTYPES,
    check_contiguous,
    check_dtype,
    check_group_size,
    check_same_device,
    check_scale,
    is_real,
    require,
)


def check_pack(codes: Tensor, bits: int) -> None:
    op = "pack"
    check_dtype(op, "codes", codes, (torch.uint8,))
    require(codes.dim() >= 1, op, "codes", "have at least 1 dimension", codes.dim())
    check_contiguous(op, "codes", codes)
    require(1 <= bits <= 4, op, "bits", "be 1, 2, 3 or 4", bits)
    if is_real(codes) and codes.numel():
        largest = int(codes.max())
        require(largest < 2**bits, op, "codes", f"be below 2^bits = {2**bits}", largest)


def _check_qweight(op: str, qweight: Tensor, scale: Tensor, levels: Sequence[float],
                   group_size: int, in_features: int, scale_dtypes: Sequence[torch.dtype],
                   may_lack_planes: bool = False) -> None:
    check_levels(op, levels)
    check_group_size(op, group_size)
    check_dtype(op, "qweight", qweight, (torch.uint8,))
    require(qweight.dim() == 3, op, "qweight", "have 3 dimensions [bits, N, ceil(K/8)]",
            list(qweight.shape))
    check_contiguous(op, "qweight", qweight)
    bits = bits_of(levels)
    require(qweight.shape[0] == bits, op, "qweight", f"have {bits} planes for {len(levels)} levels",
            qweight.shape[0])
    require(in_features >= 0, op, "in_features", "be at least 0", in_features)
    bytes_ = -(-in_features // 8)
    require(qweight.shape[2] == bytes_ or (may_lack_planes and qweight.shape[2] == 0), op, "qweight",
            f"have {bytes_} bytes a row for K = {in_features}", qweight.shape[2])
    check_scale(op, "scale", scale, (qweight.shape[1], in_features), group_size, scale_dtypes,
           qweight.device)


def check_unpack(qweight: Tensor, scale: Tensor, levels: Sequence[float], group_size: int,
                 in_features: int, dtype: torch.dtype) -> None:
    op = "unpack"
    _check_qweight(op, qweight, scale, levels, group_size, in_features,
                   (torch.float32, torch.float64))
    names = " or ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
    require(dtype in FLOAT_DTYPES, op, "dtype", f"be {names}", str(dtype).removeprefix("torch."))


def _check_packed_input(op: str, input: Tensor, qweight: Tensor, bias: Tensor | None) -> None:
    check_dtype(op, "input", input, FLOAT_DTYPES)
    check_same_device(op, "input", input, "qweight", qweight)
    if bias is not None:
        check_dtype(op, "bias", bias, (input.dtype,))
        n = qweight.shape[1]
        require(tuple(bias.shape) == (n,), op, "bias", f"have shape [{n}]", list(bias.shape))
        check_same_device(op, "bias", bias, "qweight", qweight)
        check_contiguous(op, "bias", bias)


def _scale_dtypes_for(input: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if input.dtype == torch.float64 else (torch.float32,)


def check_repack(qweight: Tensor) -> None:
    op = "repack"
    check_dtype(op, "qweight", qweight, (torch.uint8,))
    require(qweight.dim() == 3 and 1 <= qweight.shape[0] <= 4, op, "qweight",
            "have shape [bits, N, ceil(K / 8)], bits 1 to 4", list(qweight.shape))
    check_contiguous(op, "qweight", qweight)


def repacked_bytes(bits: int, n: int, row_bytes: int, device: str = "cpu") -> int:
    """Bytes that ``repack`` makes of bit planes. On the CPU 16 rows and 32 columns together, 4 bits a
    digit; on CUDA devices tiles of 16 rows and as many columns as 16 bytes of a lane hold."""
    if device == "cuda":
        return fragments.repacked_bytes(bits, n, row_bytes)
    return (n + 15) // 16 * ((row_bytes + 3) // 4) * (bits if bits <= 2 else 4) * 64


def conv_repacked_shape(bits: int, n: int, in_features: int, taps: int,
                        groups: int) -> tuple[int, ...]:
    """Shape of what ``conv_repack`` makes: group, 16 outputs, tap, registers of 64 bytes."""
    words = -(-in_features // taps // 32) * (bits if bits <= 2 else 4)
    return groups, -(-n // groups // 16), taps, words, 64


def _check_repacked(op: str, repacked: Tensor | None, qweight: Tensor, in_features: int, accuracy: str,
                    shape: tuple[int, ...] | None = None) -> None:
    require(accuracy in ACCURACIES, op, "accuracy", "be 'exact', 'high' or 'fast'", repr(accuracy))
    if repacked is not None:
        check_dtype(op, "repacked", repacked, (torch.uint8,))
        shape = shape or (repacked_bytes(*qweight.shape[:2], -(-in_features // 8),
                                         qweight.device.type),)
        require(tuple(repacked.shape) == shape, op, "repacked", f"have shape {list(shape)}",
                list(repacked.shape))
        check_contiguous(op, "repacked", repacked)


def check_packed_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        levels: Sequence[float], group_size: int, repacked: Tensor | None = None,
                        accuracy: str = "high") -> None:
    op = "packed_linear"
    require(input.dim() >= 1, op, "input", "have at least 1 dimension", input.dim())
    check_dtype(op, "input", input, FLOAT_DTYPES)
    _check_qweight(op, qweight, scale, levels, group_size, input.shape[-1], _scale_dtypes_for(input),
                   repacked is not None and not qweight.is_cuda)
    _check_packed_input(op, input, qweight, bias)
    _check_repacked(op, repacked, qweight, input.shape[-1], accuracy)


def check_packed_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                        groups: int, repacked: Tensor | None = None, accuracy: str = "high",
                        relu: bool = False) -> None:
    op = "packed_conv2d"
    _check_geometry(op, input, kernel_size, stride, padding, dilation, groups)
    _check_conv_weight(op, input, qweight, scale, bias, levels, group_size, kernel_size, stride,
                       padding, dilation, groups, repacked is not None and not qweight.is_cuda)
    taps = kernel_size[0] * kernel_size[1]
    in_features = input.shape[1] // groups * taps
    shape = (None if group_size > 0 else
             conv_repacked_shape(*qweight.shape[:2], in_features, taps, groups))
    _check_repacked(op, repacked, qweight, in_features, accuracy, shape)


def _check_geometry(op: str, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                    padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
    require(input.dim() == 4, op, "input", "have 4 dimensions [batch, channels, height, width]",
            list(input.shape))
    check_dtype(op, "input", input, FLOAT_DTYPES)
    for name, pair, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1),
                              ("padding", padding, 0), ("dilation", dilation, 1)):
        require(len(pair) == 2 and min(pair) >= least, op, name,
                f"be two integers of at least {least}", list(pair))
    require(groups >= 1, op, "groups", "be at least 1", groups)
    channels = input.shape[1]
    require(channels >= 1, op, "input", "have at least 1 channel", channels)
    require(channels % groups == 0, op, "input", f"have channels divisible by groups = {groups}",
            channels)


def _check_conv_weight(op: str, input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                       levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                       stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                       groups: int, may_lack_planes: bool = False) -> None:
    in_features = input.shape[1] // groups * kernel_size[0] * kernel_size[1]
    _check_qweight(op, qweight, scale, levels, group_size, in_features, _scale_dtypes_for(input),
                   may_lack_planes)
    require(qweight.shape[1] % groups == 0, op, "qweight",
            f"have rows divisible by groups = {groups}", qweight.shape[1])
    _check_packed_input(op, input, qweight, bias)
    size = conv_output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    require(size[0] >= 1 and size[1] >= 1, op, "input", "be at least as large as the kernel",
            list(input.shape[2:]))


def check_binary_repack(qweight: Tensor, in_features: int, taps: int, groups: int) -> None:
    _check_repack_by_tap("binary_repack", qweight, 1, in_features, taps, groups)


def check_conv_repack(qweight: Tensor, in_features: int, taps: int, groups: int) -> None:
    _check_repack_by_tap("conv_repack", qweight, 4, in_features, taps, groups)


def check_unrepack(repacked: Tensor, bits: int, n: int, in_features: int) -> None:
    op = "unrepack"
    check_dtype(op, "repacked", repacked, (torch.uint8,))
    check_contiguous(op, "repacked", repacked)
    require(not repacked.is_cuda, op, "repacked", "be on device cpu", repacked.device)
    require(1 <= bits <= 4, op, "bits", "be 1, 2, 3 or 4", bits)
    require(n >= 0, op, "n", "be at least 0", n)
    require(in_features >= 0, op, "in_features", "be at least 0", in_features)
    require(repacked.dim() in (1, 5), op, "repacked", "have 1 dimension or 5", list(repacked.shape))
    shape: tuple[int, ...] = (repacked_bytes(bits, n, -(-in_features // 8)),)
    if repacked.dim() == 5:
        groups, _, taps, *_ = repacked.shape
        require(groups > 0 and n % groups == 0 and taps > 0 and in_features % taps == 0, op, "repacked",
                "have groups that divide n and taps that divide in_features", list(repacked.shape))
        shape = conv_repacked_shape(bits, n, in_features, taps, groups)
    require(tuple(repacked.shape) == shape, op, "repacked", f"have shape {list(shape)}",
            list(repacked.shape))


def _check_repack_by_tap(op: str, qweight: Tensor, most_bits: int, in_features: int, taps: int,
                         groups: int) -> None:
    check_dtype(op, "qweight", qweight, (torch.uint8,))
    check_contiguous(op, "qweight", qweight)
    require(in_features >= 0, op, "in_features", "be at least 0", in_features)
    require(taps >= 1 and in_features % taps == 0, op, "taps",
            f"divide in_features = {in_features}", taps)
    bytes_, bits = -(-in_features // 8), 1 if most_bits == 1 else "bits"
    require(qweight.dim() == 3 and 1 <= qweight.shape[0] <= most_bits
            and qweight.shape[2] == bytes_, op, "qweight", f"have shape [{bits}, N, {bytes_}]",
            list(qweight.shape))
    require(groups >= 1 and qweight.shape[1] % groups == 0, op, "groups",
            f"divide the rows of qweight = {qweight.shape[1]}", groups)


def binary_shape(n: int, in_features: int, taps: int, groups: int) -> tuple[int, ...]:
    """Shape of a 1-bit weight of n rows that is repacked: group, 8 outputs, tap, 64 channels, output."""
    return groups, -(-n // groups // 8), taps, -(-in_features // taps // 64), 8


def _check_binary_repacked(op: str, repacked: Tensor | None, qweight: Tensor, in_features: int,
                           taps: int, groups: int) -> None:
    if repacked is not None:
        check_dtype(op, "repacked", repacked, (torch.int64,))
        check_contiguous(op, "repacked", repacked)
        shape = binary_shape(qweight.shape[1], in_features, taps, groups)
        require(tuple(repacked.shape) == shape, op, "repacked", f"have shape {list(shape)}",
                list(repacked.shape))


def check_binary_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        group_size: int, repacked: Tensor | None = None) -> None:
    op = "binary_linear"
    require(input.dim() >= 1, op, "input", "have at least 1 dimension", input.dim())
    check_dtype(op, "input", input, FLOAT_DTYPES)
    require(group_size >= -1 and (group_size <= 0 or group_size % 64 == 0), op, "group_size",
            "be 0, -1 or a multiple of 64", group_size)
    in_features = input.shape[-1]
    _check_qweight(op, qweight, scale, (1.0,), group_size, in_features, _scale_dtypes_for(input))
    _check_packed_input(op, input, qweight, bias)
    _check_binary_repacked(op, repacked, qweight, in_features, 1, 1)


def check_binary_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        group_size: int, kernel_size: Sequence[int], stride: Sequence[int],
                        padding: Sequence[int], dilation: Sequence[int], groups: int,
                        repacked: Tensor | None = None) -> None:
    op = "binary_conv2d"
    _check_geometry(op, input, kernel_size, stride, padding, dilation, groups)
    require(group_size in (0, -1), op, "group_size", "be 0 or -1", group_size)
    _check_conv_weight(op, input, qweight, scale, bias, (1.0,), group_size, kernel_size, stride,
                       padding, dilation, groups)
    taps = kernel_size[0] * kernel_size[1]
    in_features = input.shape[1] // groups * taps
    _check_binary_repacked(op, repacked, qweight, in_features, taps, groups)


def conv_output_size(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                     padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
           for i in range(2)]
    return out[0], out[1]


def memory_format(input: Tensor) -> torch.memory_format:
    """A convolution answers in its input's layout, as torch's own do."""
    if input.is_contiguous():
        return torch.contiguous_format
    channels_last = input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format

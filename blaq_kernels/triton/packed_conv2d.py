"""torch.ops.blaq.packed_conv2d: the product of packed_linear with the pixels under the kernel, which
are gathered as they are needed: no matrix of them is ever in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import bits_of
from ..packed_rules import check_packed_conv2d, conv_output_size, memory_format
from . import launch
from .contract_case import Case
from .decode import POWERS, TABLE, decode, is_exact, kind_of, load_lanes
from .linear_plans import CONV_LARGE, CONV_SMALL, ConvPlan, conv_plan_for, target_of
from .packed_linear import matmul, plan_for
from .packed_matmul import ROW, SUM_BLOCK, WEIGHT, multiply, scaled_weight, sum_splits_kernel
from .unpack import unpack_weight


@triton.jit
def packed_conv2d_kernel(x, planes, scale, bias, out, part_stride, pixels, height, width, out_height,
                         out_width, x_image, x_channel, x_row, x_col, out_image, out_channel, out_row,
                         out_col, n, channels, k, row_bytes, plane_stride, scale_stride, group_size,
                         tiles, tiles_per_split, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
                         PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr,
                         DILATION_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                         SPLITS: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr,
                         BITS: tl.constexpr, SCALE: tl.constexpr, GROUPED: tl.constexpr,
                         COLS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
                         STAGES: tl.constexpr):
    """``n`` outputs and ``channels`` inputs are those of one of the convolution's groups; a program is
    a tile [ROWS, COLS] of outputs and pixels, of one group and one part of k."""
    dtype: tl.constexpr = x.dtype.element_ty
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = group.to(tl.int64) * n + tl.where(row < n, row, 0)
    pixel = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    column = pixel % out_width
    line = (pixel // out_width) % out_height
    image = pixel // out_width // out_height
    top, left = line * STRIDE_H - PAD_H, column * STRIDE_W - PAD_W
    corner = (x + group.to(tl.int64) * channels * x_channel + image * x_image + top * x_row
              + left * x_col)
    byte = tl.arange(0, BYTES)
    plane_ptrs = planes + rows[:, None] * row_bytes + byte[None, :]
    scale_ptrs = scale + rows[:, None] * scale_stride
    acc = tl.zeros((ROWS, COLS), tl.float32)
    first = split * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tiles), num_stages=STAGES):
        at = tile * BYTES
        lanes = load_lanes(plane_ptrs + at, plane_stride, at + byte[None, :] < row_bytes, BITS)
        for bit in tl.static_range(8):
            tap = 8 * (at + byte) + bit
            channel = tap // (KH * KW)
            down, right = tap // KW % KH * DILATION_H, tap % KW * DILATION_W
            inside = ((tap < k)[:, None] & (pixel < pixels)[None, :]
                      & (top[None, :] + down[:, None] >= 0)
                      & (top[None, :] + down[:, None] < height)
                      & (left[None, :] + right[:, None] >= 0)
                      & (left[None, :] + right[:, None] < width))
            offset = channel.to(tl.int64) * x_channel + down * x_row + right * x_col
            under = tl.load(corner[None, :] + offset[:, None], mask=inside, other=0.0)
            level = decode(lanes[0], lanes[1], lanes[2], bit, BITS, KIND, LEVELS, tl.float32,
                           dtype == tl.float16 and SCALE == "row")
            if SCALE == "weight":
                scales = scale_ptrs
                if GROUPED:
                    scales += tl.minimum(tap // group_size, scale_stride - 1)[None, :]
                level = scaled_weight(level, tl.load(scales), dtype)
            elif dtype != tl.float32:
                level = level.to(dtype)
            acc = multiply(level, under, acc)
    if SCALE == "row":
        acc *= tl.load(scale + rows * scale_stride).to(dtype).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    at = image * out_image + line * out_row + column * out_col
    at = at[None, :] + rows[:, None] * out_channel + split * part_stride
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(row < n)[:, None] & (pixel < pixels)[None, :])


def packed_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                  stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                  groups: int, repacked: Tensor | None = None, accuracy: str = "high",
                  relu: bool = False) -> Tensor:
    """``conv2d`` with ``weight = round(level × scale)`` to the input's dtype.

    Args:
        input: ``[batch, channels, height, width]`` float32, bfloat16, float16 or float64, any layout.
        qweight: uint8 ``[bits, out, ceil(K/8)]``, ``K = channels/groups · kh · kw`` (docs/format.md).
        scale: float32 (float64 for float64 input) ``[1]``, ``[out, 1]`` or ``[out, ceil(K/g)]``.
        bias: ``[out]`` of the input's dtype, or None.
        repacked, accuracy: for CPU kernels; every GPU kernel is exact.
        relu: whether negative results become 0.

    Returns:
        ``[batch, out, height', width']`` in the input's dtype and memory format.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    check_packed_conv2d(input, qweight, scale, bias, levels, group_size, kernel_size, stride, padding,
                        dilation, groups, repacked, accuracy)
    launch.check_device("packed_conv2d", "input", input)
    out_size = conv_output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    n = qweight.shape[1]
    out = torch.empty((input.shape[0], n, *out_size), dtype=input.dtype, device=input.device,
                      memory_format=memory_format(input))
    if out.numel() == 0:
        return out
    k = input.shape[1] // groups * math.prod(kernel_size)
    pixels = input.shape[0] * math.prod(out_size)
    with launch.on_device_of(input):
        if _is_linear(input, kernel_size, stride, padding, groups):
            plan = plan_for(pixels, n, k, group_size, input.dtype, kind_of(levels) != TABLE,
                            target_of(input))
            if plan is not None:
                matmul(input.permute(0, 2, 3, 1).reshape(pixels, k), qweight, scale, bias,
                       tuple(levels), group_size, out.permute(0, 2, 3, 1).view(pixels, n), plan)
                return out.relu_() if relu else out
        plan = conv_plan_for(pixels, n // groups, k, groups, input.dtype, target_of(input))
        reach = sum((side - 1) * step * stride for side, step, stride in
                    zip(kernel_size, dilation, input.stride()[2:], strict=True))
        if plan is None or reach >= 2**31:  # the kernel counts from tap to tap in 32 bits
            weight = unpack_weight(qweight, scale, levels, group_size, k, input.dtype)
            weight = weight.view(n, -1, *kernel_size)
            out = torch.nn.functional.conv2d(input, weight, bias, list(stride), list(padding),
                                             list(dilation), groups)
        else:
            convolve(input, qweight, scale, bias, tuple(levels), group_size, kernel_size, stride,
                     padding, dilation, groups, out, plan)
        return out.relu_() if relu else out


def _is_linear(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
               padding: Sequence[int], groups: int) -> bool:
    """Whether every pixel is a row of a matrix, and its product the output's pixel."""
    return (tuple(kernel_size) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0) and groups == 1
            and memory_format(input) == torch.channels_last)


def convolve(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
             levels: tuple[float, ...], group_size: int, kernel_size: Sequence[int],
             stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
             out: Tensor, plan: ConvPlan) -> None:
    """The implicit product, into ``out``, which is dense in either memory format."""
    n, row_bytes = qweight.shape[1] // groups, qweight.shape[2]
    channels = x.shape[1] // groups
    k = channels * math.prod(kernel_size)
    pixels = out.numel() // out.shape[1]
    kind = kind_of(levels)
    tiles = triton.cdiv(k, 8 * plan.bytes)
    target = out
    if plan.splits > 1:
        target = torch.empty(plan.splits * out.numel(), dtype=torch.float32, device=out.device)
    grid = (triton.cdiv(pixels, plan.cols), triton.cdiv(n, plan.rows), groups * plan.splits)
    packed_conv2d_kernel[grid](
        x, qweight, scale, bias if plan.splits == 1 else None, target,
        out.numel() if plan.splits > 1 else 0, pixels, x.shape[2], x.shape[3], out.shape[2],
        out.shape[3], *x.stride(), *out.stride(), n, channels, k, row_bytes,
        qweight.shape[1] * row_bytes, 0 if group_size == 0 else scale.shape[1], max(group_size, 1),
        tiles, triton.cdiv(tiles, plan.splits), *stride, *padding, *dilation, *kernel_size,
        plan.splits, kind, levels if kind == TABLE else (), bits_of(levels),
        ROW if is_exact(levels, x.dtype) and group_size <= 0 else WEIGHT, group_size > 0, plan.cols,
        plan.rows, plan.bytes, plan.stages, num_warps=plan.warps)
    if plan.splits > 1:
        count = out.numel()
        sum_splits_kernel[(triton.cdiv(count, SUM_BLOCK),)](
            target, bias, out, out.shape[1], out.stride(1), count, plan.splits, SUM_BLOCK, num_warps=4)


def contract() -> list[Case]:
    trips = 16
    integers = ("part_stride", "pixels", "height", "width", "out_height", "out_width", "x_image",
                "x_channel", "x_row", "x_col", "out_image", "out_channel", "out_row", "out_col", "n",
                "channels", "k", "row_bytes", "plane_stride", "scale_stride", "group_size", "tiles",
                "tiles_per_split")
    cases = []
    for bits, plan, splits, budget, architectures in ((1, CONV_SMALL, 1, 25.0, (80, 90, 100, 120)),
                                                      (2, CONV_SMALL, 4, 25.0, (80, 90, 100, 120)),
                                                      (4, CONV_LARGE, 1, 25.0, (90,))):
        pointers = {"x": "*bf16", "planes": "*u8", "scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
        if splits > 1:
            pointers |= {"bias": None, "out": "*fp32"}
        cases.append(Case(
            f"packed_conv2d 3x3 bf16 W{bits}{', k in parts' if splits > 1 else ''}",
            packed_conv2d_kernel, pointers | dict.fromkeys(integers, "i32"),
            {"STRIDE_H": 1, "STRIDE_W": 1, "PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1,
             "KH": 3, "KW": 3, "SPLITS": splits, "KIND": POWERS, "LEVELS": (), "BITS": bits,
             "SCALE": ROW, "GROUPED": False, "COLS": plan.cols, "ROWS": plan.rows,
             "BYTES": plan.bytes, "STAGES": plan.stages},
            plan.rows * 8 * plan.bytes * trips, plan.warps, budget, (trips,), tensor_cores=True,
            architectures=architectures,
            divisible=(*(name for name, kind in pointers.items() if kind), "x_image", "row_bytes",
                       "plane_stride")))
    return cases

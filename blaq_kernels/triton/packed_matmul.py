"""The product of inputs with a weight that is read from its bit planes and decoded in registers.

The weight is the left operand: decoded tiles ``[rows, bytes]`` of one bit position go to the tensor
cores from the registers that they were made in, eight products for a tile of bytes. Inputs are the
right operand, in the same order of k: eight interleaved slices of a contiguous tile, or contiguous
slices of inputs that :func:`interleave` has laid out so once for all rows of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_sums import last_of
from .decode import decode, load_lanes, split8

ROW, TILE, WEIGHT, CHECKED = "row", "tile", "weight", "checked"
SUM_BLOCK = 512


@triton.jit
def _high(x):
    """The eight leading bits of a float32: a bfloat16's."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def multiply(weight, x, acc):
    """``acc + weight @ x``. Float32 inputs meet a bfloat16 weight as the exact sum of three
    bfloat16, and so lose nothing; a float32 weight goes without tensor cores."""
    if weight.dtype == tl.float32:
        acc = tl.dot(weight, x.to(tl.float32), acc, input_precision="ieee")
    elif x.dtype == tl.float32:
        high = tl.where(x == x, _high(x), x)
        rest = tl.where(tl.abs(high) < float("inf"), x - high, 0.0)
        middle = _high(rest)
        acc = tl.dot(weight, (rest - middle).to(tl.bfloat16), acc)
        acc = tl.dot(weight, middle.to(tl.bfloat16), acc)
        acc = tl.dot(weight, high.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(weight, x, acc)
    return acc


@triton.jit
def scaled_weight(level, scale, dtype: tl.constexpr):
    """``round(level × scale)``: the weight as training had it."""
    return (level.to(tl.float32) * scale).to(dtype)


@triton.jit
def _sums(x, planes, scale, rows, cols, plane_stride, k, row_bytes, x_stride, scale_stride, group_size,
          first, last, KIND: tl.constexpr, LEVELS: tl.constexpr, BITS: tl.constexpr,
          SCALE: tl.constexpr, GROUPED: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, BYTES: tl.constexpr, STAGES: tl.constexpr):
    """``weight @ xᵀ`` ``[BN, BM]`` over the tiles first … last of k, without the scales if SCALE is
    by row. GROUPED: 0 a scale for each row at most, 1 for whole bytes, 2 for groups of any size."""
    dtype: tl.constexpr = x.dtype.element_ty
    WHOLE: tl.constexpr = EVEN or INTERLEAVED  # no input is beyond the end of a row
    byte = tl.arange(0, BYTES)
    inner = tl.arange(0, 8 * BYTES)
    plane_ptrs = planes + rows[:, None] * row_bytes + byte[None, :]
    if INTERLEAVED:
        x_ptrs = x + cols[None, :] * x_stride + byte[:, None]
    else:
        x_ptrs = x + cols[:, None] * x_stride + inner[None, :]
    scale_ptrs = scale + rows[:, None] * scale_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        at = tile * BYTES
        if EVEN:
            lanes = load_lanes(plane_ptrs + at, plane_stride, None, BITS)
        else:
            lanes = load_lanes(plane_ptrs + at, plane_stride, at + byte[None, :] < row_bytes, BITS)
        if not INTERLEAVED:
            if WHOLE:
                whole = tl.load(x_ptrs + at * 8)
            else:
                whole = tl.load(x_ptrs + at * 8, mask=at * 8 + inner[None, :] < k, other=0.0)
            slices = split8(whole, BM, BYTES)
        if SCALE == "tile":
            part = tl.zeros((BN, BM), tl.float32)
        else:
            part = acc
        if SCALE == "weight" and GROUPED == 1:
            group = tl.minimum(8 * (at + byte) // group_size, scale_stride - 1)
            byte_scale = tl.load(scale_ptrs + group[None, :])
        for bit in tl.static_range(8):
            level = decode(lanes[0], lanes[1], lanes[2], bit, BITS, KIND, LEVELS, tl.float32,
                           dtype == tl.float16 and SCALE != "weight")
            if SCALE == "weight":
                if GROUPED == 1:
                    level = scaled_weight(level, byte_scale, dtype)
                elif GROUPED == 2:
                    group = (8 * (at + byte) + bit) // group_size
                    group = tl.minimum(group, scale_stride - 1)
                    level = scaled_weight(level, tl.load(scale_ptrs + group[None, :]), dtype)
                else:
                    level = scaled_weight(level, tl.load(scale_ptrs), dtype)
            elif dtype == tl.float32:
                level = level
            else:
                level = level.to(dtype)
            if INTERLEAVED:
                x_slice = tl.load(x_ptrs + (at * 8 + bit * BYTES))
            else:
                x_slice = tl.trans(slices[bit])
            part = multiply(level, x_slice, part)
        if SCALE == "tile":
            group_scale = tl.load(scale_ptrs + at * 8 // group_size)
            acc += part * group_scale.to(dtype).to(tl.float32)
        else:
            acc = part
    return acc


# What only bounds a loop or a mask has no machine code of its own: batches of any size share one.
@triton.jit(do_not_specialize=["m", "tiles", "tiles_per_split"])
def packed_matmul_kernel(x, planes, scale, bias, out, parts, tickets, m, n, k, row_bytes,
                         plane_stride, x_stride, scale_stride, group_size, tiles, tiles_per_split,
                         KIND: tl.constexpr, LEVELS: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr,
                         LOWEST: tl.constexpr, GROUPED: tl.constexpr, INTERLEAVED: tl.constexpr,
                         EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                         BYTES: tl.constexpr, STAGES: tl.constexpr):
    """``out[m, n]`` of one tile; where k is split a part of it, which goes to ``parts[split, m, n]``,
    and the sum of all from the last program of the tile.

    SCALE says when the scales come in: ``row``, once for the sum; ``tile``, once for the sum of a
    tile of k; ``weight``, into every weight, rounded; ``checked``, by row unless that would differ.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    col = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    rows = tl.where(row < n, row, 0)  # what lies beyond is computed and not stored
    cols = tl.where(col < m, col, 0)
    first = tl.program_id(2) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    if SCALE == "row":
        acc = _sums(x, planes, scale, rows, cols, plane_stride, k, row_bytes, x_stride, scale_stride,
                    group_size, first, last, KIND, LEVELS, BITS, "row", GROUPED, INTERLEAVED, EVEN,
                    BM, BN, BYTES, STAGES)
        acc *= tl.load(scale + rows * scale_stride).to(dtype).to(tl.float32)[:, None]
    elif SCALE == "checked":
        # In float16 a small level × scale is subnormal, and rounds unlike the scale.
        row_scale = tl.load(scale + rows * scale_stride)
        if (tl.min(row_scale) * LOWEST >= 2.0**-14) & (tl.max(row_scale) <= 65504.0):
            acc = _sums(x, planes, scale, rows, cols, plane_stride, k, row_bytes, x_stride, scale_stride,
                        group_size, first, last, KIND, LEVELS, BITS, "row", GROUPED, INTERLEAVED,
                        EVEN, BM, BN, BYTES, STAGES)
            acc *= row_scale.to(dtype).to(tl.float32)[:, None]
        else:
            acc = _sums(x, planes, scale, rows, cols, plane_stride, k, row_bytes, x_stride, scale_stride,
                        group_size, first, last, KIND, LEVELS, BITS, "weight", GROUPED,
                        INTERLEAVED, EVEN, BM, BN, BYTES, STAGES)
    else:
        acc = _sums(x, planes, scale, rows, cols, plane_stride, k, row_bytes, x_stride, scale_stride,
                    group_size, first, last, KIND, LEVELS, BITS, SCALE, GROUPED, INTERLEAVED, EVEN,
                    BM, BN, BYTES, STAGES)
    at = col[None, :] * n + row[:, None]
    mask = (row[:, None] < n) & (col[None, :] < m)
    if parts is None:
        _round(acc, bias, rows, out + at, mask)
    else:
        stride, split, splits = m.to(tl.int64) * n, tl.program_id(2), tl.num_programs(2)
        parts += at
        tl.store(parts + split * stride, acc, mask=mask)
        if tickets is not None:
            ticket = tickets + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            if last_of(ticket, splits):
                _round(_sum(parts, mask, stride, splits), bias, rows, out + at, mask)


@triton.jit
def _round(acc, bias, rows, out, mask):
    if bias is not None:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum(parts, mask, stride, splits):
    """Of what the programs of a tile have stored, ``stride`` apart, in the order of k. Registers
    hold a few parts on their way."""
    AT_ONCE: tl.constexpr = 4 if parts.numel <= 1024 else 2
    total = tl.zeros(parts.shape, tl.float32)
    for first in tl.range(0, splits, AT_ONCE, num_stages=1):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(parts, mask=mask & (first + i < splits), other=0.0, cache_modifier=".cg")
            parts += stride
    return total


@triton.jit
def sum_splits_kernel(parts, bias, out, n, inner, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """``out = Σ parts[split] + bias``, always in the same order; ``inner`` is the stride of the ``n``
    outputs."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.load(parts + at, mask=mask)
    for _ in tl.static_range(1, SPLITS):
        parts += count
        total += tl.load(parts + at, mask=mask)
    if bias is not None:
        total += tl.load(bias + at // inner % n, mask=mask).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def interleave_kernel(x, out, m, k, x_stride, out_stride, BYTES: tl.constexpr, ROWS: tl.constexpr):
    """A tile of 8·BYTES inputs as eight runs of BYTES: every eighth element from 0, from 1, …;
    zeros beyond the end of a row."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * (8 * BYTES) + tl.arange(0, 8 * BYTES)
    inside = rows[:, None] < m
    tile = tl.load(x + rows[:, None] * x_stride + at[None, :], mask=inside & (at[None, :] < k),
                   other=0.0)
    runs = tl.permute(tl.reshape(tile, (ROWS, BYTES, 8)), (0, 2, 1))
    tl.store(out + rows[:, None] * out_stride + at[None, :], tl.reshape(runs, (ROWS, 8 * BYTES)),
             mask=inside)

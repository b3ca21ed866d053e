"""torch.ops.blaq.unpack: bit planes to weights, near the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import bits_of
from ..packed_rules import check_unpack
from . import launch
from .contract_case import Case
from .decode import POWERS, TABLE, decode, group_of, join8, kind_of, load_lanes, tile_of_program

ROWS = 8
BYTES = 64  # 512 weights of a row
WARPS = 4


@triton.jit
def unpack_kernel(planes, scale, out, n, k, row_bytes, plane_stride, scale_stride, group_size,
                  across, KIND: tl.constexpr, LEVELS: tl.constexpr, BITS: tl.constexpr,
                  GROUPED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    WIDE: tl.constexpr = scale.dtype.element_ty
    down, along = tile_of_program(across)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    byte = along * BYTES + tl.arange(0, BYTES)[None, :]
    inner = tl.arange(0, 8 * BYTES)[None, :]
    at = along * (8 * BYTES) + inner
    lanes = load_lanes(planes + row * row_bytes + byte, plane_stride,
                       (row < n) & (byte < row_bytes), BITS)
    a, b, c = lanes
    levels = join8(decode(a, b, c, 0, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 1, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 2, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 3, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 4, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 5, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 6, BITS, KIND, LEVELS, WIDE, False),
                   decode(a, b, c, 7, BITS, KIND, LEVELS, WIDE, False), ROWS, BYTES)
    mask = (row < n) & (at < k)
    scales = scale + row * scale_stride
    if GROUPED:
        scales = tl.load(scales + group_of(along * (8 * BYTES), inner, group_size), mask=mask, other=0.0)
    else:
        scales = tl.load(scales, mask=row < n, other=0.0)
    weight = levels.to(WIDE) * scales
    if WIDE == tl.float64 and out.dtype.element_ty != tl.float64:
        weight = weight.to(tl.float32)  # as torch rounds a double to 16 bits
    tl.store(out + row * k + at, weight.to(out.dtype.element_ty), mask=mask)


def unpack(qweight: Tensor, scale: Tensor, levels: Sequence[float], group_size: int,
           in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, in_features]`` in ``dtype``: ``round(level × scale)``, computed in the
    scale's dtype; NaN where a code has no level.

    Args:
        qweight: uint8 ``[bits, N, ceil(in_features/8)]``, contiguous (docs/format.md).
        scale: float32 or float64 ``[1]``, ``[N, 1]`` or ``[N, ceil(in_features/g)]``.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    check_unpack(qweight, scale, levels, group_size, in_features, dtype)
    launch.check_device("unpack", "qweight", qweight)
    with launch.on_device_of(qweight):
        return unpack_weight(qweight, scale, levels, group_size, in_features, dtype)


def unpack_weight(qweight: Tensor, scale: Tensor, levels: Sequence[float], group_size: int,
                  in_features: int, dtype: torch.dtype) -> Tensor:
    """:func:`unpack` of arguments that have been checked."""
    _, n, row_bytes = qweight.shape
    out = torch.empty((n, in_features), dtype=dtype, device=qweight.device)
    if out.numel():
        kind = kind_of(levels)
        across = triton.cdiv(row_bytes, BYTES)
        unpack_kernel[(across * triton.cdiv(n, ROWS),)](qweight, scale, out, n, in_features, row_bytes,
                            n * row_bytes, 0 if group_size == 0 else scale.shape[1], max(group_size, 1),
                            across, kind, tuple(levels) if kind == TABLE else (), bits_of(levels),
                            group_size > 0, ROWS, BYTES, num_warps=WARPS)
    return out


def contract() -> list[Case]:
    types = {"planes": "*u8", "scale": "*fp32", **dict.fromkeys(
        ("n", "k", "row_bytes", "plane_stride", "scale_stride", "group_size", "across"), "i32")}
    return [Case(f"unpack {dtype} W{bits} {'groups' if grouped else 'rows'}", unpack_kernel,
                 types | {"out": f"*{dtype}"},
                 {"KIND": POWERS, "LEVELS": (), "BITS": bits, "GROUPED": grouped, "ROWS": ROWS,
                  "BYTES": BYTES}, ROWS * 8 * BYTES, WARPS, budget)
            for dtype, bits, grouped, budget in (
                ("bf16", 1, False, 12.0), ("bf16", 4, False, 16.0), ("fp32", 2, False, 16.0),
                ("bf16", 4, True, 60.0))]

"""torch.ops.blaq.fake_quantize: nearest level × scale, rounded once to the latent's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import midpoints
from ..reference import matrix_shape
from ..training_rules import check_fake_quantize
from . import launch
from .contract_case import Case
from .decode import group_of, tile_of_program

BLOCK = 1024
WARPS = 4


@triton.jit
def fake_quantize_kernel(latent, scale, out, n, k, group_size, scale_stride, across,
                         LEVELS: tl.constexpr, MIDS: tl.constexpr, GROUPED: tl.constexpr,
                         ROWS: tl.constexpr, COLS: tl.constexpr):
    WIDE: tl.constexpr = scale.dtype.element_ty
    down, along = tile_of_program(across)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    inner = tl.arange(0, COLS)[None, :]
    col = along * COLS + inner
    mask = (row < n) & (col < k)
    at = row * k + col
    w = tl.load(latent + at, mask=mask, other=0.0).to(WIDE)
    scales = scale + row * scale_stride
    if GROUPED:
        scales += group_of(along * COLS, inner, group_size)
    alpha = tl.load(scales, mask=mask if GROUPED else row < n, other=1.0)
    magnitude = tl.abs(w)
    level = tl.full((ROWS, COLS), LEVELS[0], WIDE)
    for i in tl.static_range(len(MIDS)):  # thresholds ascend, so the last one reached decides
        reached = magnitude >= alpha * tl.full((), MIDS[i], WIDE)
        level = tl.where(reached, tl.full((), LEVELS[i + 1], WIDE), level)
    negative = w < 0
    if LEVELS[0] == 0.0:  # of a zero level there is only the positive code
        negative = negative & (level != 0.0)
    value = tl.where(negative, -level, level) * alpha
    if WIDE == tl.float64 and out.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def fake_quantize(latent: Tensor, scale: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    """Nearest level × scale: ties to the larger magnitude, sign(0) = +1.

    Args:
        latent: ``[N, ...]`` float32, bfloat16, float16 or float64, contiguous.
        scale: float32 (float64 for float64) ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``.
        levels: 1 to 128 magnitudes (8 bits).

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    check_fake_quantize(latent, scale, levels, group_size)
    launch.check_device("fake_quantize", "latent", latent)
    out = torch.empty_like(latent)
    n, k = (1, latent.numel()) if group_size == 0 else matrix_shape(latent.shape)
    if latent.numel():
        rows, cols = tile_of(k)
        with launch.on_device_of(latent):
            across = triton.cdiv(k, cols)
            fake_quantize_kernel[(across * triton.cdiv(n, rows),)](
                latent, scale, out, n, k, max(group_size, 1),
                0 if group_size == 0 else scale.shape[1], across, tuple(levels),
                tuple(midpoints(levels)),
                group_size > 0, rows, cols, num_warps=WARPS)
    return out


def tile_of(k: int) -> tuple[int, int]:
    """Rows and columns of a program: as much of a row as there is, then more rows."""
    cols = min(BLOCK, triton.next_power_of_2(k))
    return BLOCK // cols, cols


def contract() -> list[Case]:
    cases = []
    for dtype, levels, group_size, budget in (
            ("fp32", (0.5, 1.0), -1, 20.0), ("bf16", (0.125, 0.25, 0.5, 1.0), -1, 25.0),
            ("fp32", (0.5, 1.0), 32, 60.0)):
        cases.append(Case(
            f"fake_quantize {dtype} {len(levels)} levels group {group_size}", fake_quantize_kernel,
            {"latent": f"*{dtype}", "scale": "*fp32", "out": f"*{dtype}", **dict.fromkeys(
                ("n", "k", "group_size", "scale_stride", "across"), "i32")},
            {"LEVELS": levels, "MIDS": tuple(midpoints(levels)), "GROUPED": group_size > 0,
             "ROWS": 1, "COLS": BLOCK}, BLOCK, WARPS, budget, wide_loads=True))
    return cases

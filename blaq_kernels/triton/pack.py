"""torch.ops.blaq.pack: codes to bit planes, near the speed of memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed_rules import check_pack
from ..reference import matrix_shape
from . import launch
from .contract_case import Case
from .decode import tile_of_program

ROWS = 8
BYTES = 128  # 1024 codes of a row
WARPS = 4


@triton.jit
def pack_kernel(codes, planes, n, k, row_bytes, plane_stride, across, BITS: tl.constexpr,
                ROWS: tl.constexpr, BYTES: tl.constexpr):
    down, along = tile_of_program(across)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    at = along * (8 * BYTES) + tl.arange(0, 8 * BYTES)[None, :]
    byte = along * BYTES + tl.arange(0, BYTES)[None, :]
    code = tl.load(codes + row * k + at, mask=(row < n) & (at < k), other=0).to(tl.int32)
    code = tl.reshape(code, (ROWS, BYTES, 8))
    place = tl.arange(0, 8)[None, None, :]
    for bit in tl.static_range(BITS):
        packed = tl.sum(((code >> bit) & 1) << place, axis=2).to(tl.uint8)
        tl.store(planes + row * row_bytes + byte, packed, mask=(row < n) & (byte < row_bytes))
        planes += plane_stride


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit planes uint8 ``[bits, N, ceil(K/8)]`` of codes, little-endian within a byte.

    Args:
        codes: uint8 ``[N, ...]``, contiguous, each below ``2^bits``. That takes a look at the largest,
            for which the host waits: packing is no part of a captured graph.
        bits: 1 to 4.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    check_pack(codes, bits)
    launch.check_device("pack", "codes", codes)
    n, k = matrix_shape(codes.shape)
    row_bytes = triton.cdiv(k, 8)
    planes = torch.empty((bits, n, row_bytes), dtype=torch.uint8, device=codes.device)
    if planes.numel():
        with launch.on_device_of(codes):
            across = triton.cdiv(row_bytes, BYTES)
            pack_kernel[(across * triton.cdiv(n, ROWS),)](
                codes, planes, n, k, row_bytes, n * row_bytes, across, bits, ROWS, BYTES, num_warps=WARPS)
    return planes


def contract() -> list[Case]:
    types = {"codes": "*u8", "planes": "*u8", "n": "i32", "k": "i32", "row_bytes": "i32",
             "plane_stride": "i32", "across": "i32"}
    return [Case(f"pack W{bits}", pack_kernel, types, {"BITS": bits, "ROWS": ROWS, "BYTES": BYTES},
                 ROWS * 8 * BYTES, WARPS, 3.0 + 5.0 * bits, wide_loads=True) for bits in (1, 4)]

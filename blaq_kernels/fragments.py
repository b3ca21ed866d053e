"""The order in which CUDA kernels read a packed weight, in plain PyTorch: csrc/cuda/fragments.h.

A tile is 16 rows, a unit as many columns as 16 bytes (3 bits: 48) of a lane hold. A lane, ``4g + t``,
has rows ``g`` and ``g + 8`` of a tile, and of every 32 columns the 8 from ``8t`` on, or with 1 bit of every
8 the 2 from ``2t`` on. Its words come in groups of 1 (3 bits: 3); a group has pairs of neighbouring columns,
whose signs and indices have bits of their own (:func:`places`), 16 apart, or 8 with 1 bit. Memory is
``[tile, unit, load, lane, 4 words]``, little-endian; rows and columns past the last are code 0.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["repack", "repacked_bytes"]


def words(bits: int) -> int:
    """32-bit words of a group."""
    return 3 if bits == 3 else 1


def pairs(bits: int) -> int:
    """Pairs of weights in a group."""
    return 16 * words(bits) // bits


def columns(bits: int) -> int:
    """Columns of a unit: four groups, four pairs to a fragment of 16 columns."""
    return 16 * pairs(bits)


def repacked_bytes(bits: int, n: int, row_bytes: int) -> int:
    """Bytes of a repacked weight of ``n`` rows."""
    return -(-n // 16) * -(-8 * row_bytes // columns(bits)) * words(bits) * 512


def places(bits: int, pair: int) -> list[tuple[int, int]]:
    """Word and bit of each bit of the code of a pair's first weight, the lowest first."""
    if bits == 3:
        index = (1 + pair // 8, 14 - pair % 8 * 2)
    else:
        index = (0, 7 - pair if bits == 2 else (7, 10, 4, 1)[pair] if bits == 4 else 0)
    sign = pair % 8 + pair // 8 * 16 if bits == 1 else 0 if (bits, pair) == (4, 3) else 15 - pair
    return [(index[0], index[1] + bit) for bit in range(bits - 1)] + [(0, sign)]


@functools.cache
def _gather(bits: int) -> tuple[Tensor, Tensor]:
    """Row of a tile and column of a unit for every lane, group, pair and half."""
    lane, group, pair, half = torch.meshgrid(*map(torch.arange, (32, 4, pairs(bits), 2)), indexing="ij")
    if bits == 1:
        column = 64 * group + pair % 2 * 32 + pair % 8 // 2 * 8 + lane % 4 * 2 + half
        return lane // 4 + pair // 8 * 8, column
    of_unit = group * pairs(bits) + pair
    fragment, register = of_unit // 4, of_unit % 4
    row = lane // 4 + register % 2 * 8
    column = fragment // 2 * 32 + lane % 4 * 8 + fragment % 2 * 4 + register // 2 * 2 + half
    return row, column


def repack(qweight: Tensor) -> Tensor:
    """Bit planes ``[bits, N, ceil(K/8)]`` in the order of fragments, uint8."""
    bits, n, row_bytes = qweight.shape
    width, count = columns(bits), words(bits)
    tiles, units = -(-n // 16), -(-8 * row_bytes // width)
    shifts = torch.arange(8, device=qweight.device, dtype=torch.uint8)
    planes = (qweight[..., None] >> shifts & 1).reshape(bits, n, 8 * row_bytes)
    planes = torch.nn.functional.pad(planes, (0, units * width - 8 * row_bytes, 0, tiles * 16 - n))
    row, column = (x.to(qweight.device) for x in _gather(bits))
    planes = planes.reshape(bits, tiles, 16, units, width).transpose(2, 3)
    apart = 8 if bits == 1 else 16
    taken = planes[:, :, :, row, column].int()  # [bits, tile, unit, lane, group, pair, half]
    out = torch.zeros(tiles, units, 32, 4, count, dtype=torch.int32, device=qweight.device)
    for pair in range(pairs(bits)):
        for bit, (word, at) in enumerate(places(bits, pair)):
            out[..., word] |= taken[bit, ..., pair, 0] << at | taken[bit, ..., pair, 1] << at + apart
    return out.reshape(tiles, units, 32, count, 4).transpose(2, 3).contiguous().view(torch.uint8).reshape(-1)

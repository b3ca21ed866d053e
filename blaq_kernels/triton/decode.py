"""Bit planes to numbers, eight weights to a byte: the device functions that every packed op shares.

A tile of bytes ``[rows, bytes]`` holds weight ``8·i + bit`` of a row in bit ``bit`` of byte ``i``, so
one bit position at a time is a tile ``[rows, bytes]`` of weights, and decoding is elementwise. The
bytes lie in 16-bit lanes, two to a register: shift, mask and or make two numbers at once, since the
bits of a power-of-two level are those of the code, the sign as it is and the index as exponent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..codebook import bits_of, levels_of

INTERPRETED = triton.knobs.runtime.interpret
_ASM = tl.constexpr(not INTERPRETED)
POWERS, POWERS_AND_ZERO, TABLE = "powers", "powers and zero", "table"


def kind_of(levels: Sequence[float]) -> str:
    """How a codebook's codes are decoded: by their bits, by their bits with 0 for index 0, or by
    selecting among the levels."""
    return _kind_of(tuple(levels))


@functools.lru_cache(256)
def _kind_of(levels: tuple[float, ...]) -> str:
    bits = bits_of(levels)
    if levels == levels_of("pow2", bits):
        return POWERS
    if bits > 1 and levels == levels_of("pow2_zero", bits):
        return POWERS_AND_ZERO
    return TABLE


def is_exact(levels: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether ``round(level × scale) = level × round(scale)`` for every scale: then the scale may
    multiply sums instead of weights. A product of powers of two has its scale's digits, unless it
    is subnormal, which in float16 is near."""
    if dtype in (torch.float32, torch.float64) or len(levels) == 1:
        return True
    return dtype == torch.bfloat16 and kind_of(levels) != TABLE


@triton.jit
def tile_of_program(across):
    """Which tile of a matrix this program has, down and along, if ``across`` tiles make a row: the
    grid has one axis, since its others end at 65535. 64 bits, as offsets need them."""
    at = tl.program_id(0)
    return (at // across).to(tl.int64), (at % across).to(tl.int64)


@triton.jit
def group_of(first, local, group_size):
    """``(first + local) // group_size`` for a long ``first`` and a tile of short ``local``: without
    a 64-bit division for each, which would cost more than all else."""
    return first // group_size + ((first % group_size).to(tl.int32) + local) // group_size


@triton.constexpr_function
def _pair_asm(shift: int, mask: int) -> str:
    # 0xEA is the truth table of (a & b) | c.
    return (f"{{ .reg .b32 t; shl.b32 t, $1, {shift}; "
            f"lop3.b32 $0, t, {mask * 0x00010001:#x}, $2, 0xEA; }}")


@triton.jit
def _place(lanes, into, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """``((lanes << SHIFT) & MASK) | into`` on uint16; the compiler alone would unpack every pair."""
    if _ASM:
        return tl.inline_asm_elementwise(_pair_asm(SHIFT, MASK), "=r,r,r", [lanes, into],
                                         dtype=tl.uint16, is_pure=True, pack=2)
    else:
        return ((lanes << SHIFT) & MASK) | into


@triton.jit
def _load_byte(pointers, mask):
    if mask is None:
        byte = tl.load(pointers)
    else:  # a byte beyond the end is code 0, which every codebook has: finite, and met by zeros
        byte = tl.load(pointers, mask=mask, other=0)
    return byte.to(tl.uint16)


@triton.jit
def load_lanes(planes, plane_stride, mask, BITS: tl.constexpr):
    """Bytes of all planes at the pointers ``planes`` into the lowest one, as uint16 lanes: (sign in
    the high byte and lowest index bit in the low one, second index bit, third)."""
    low = _load_byte(planes, mask)
    second, third = low, low
    # From plane to plane by addition: a multiple of the stride may be more than its 32 bits hold.
    if BITS >= 3:
        planes += plane_stride
        second = _load_byte(planes, mask)
    if BITS >= 4:
        planes += plane_stride
        third = _load_byte(planes, mask)
    if BITS == 1:
        first = low << 8
    else:
        first = (_load_byte(planes + plane_stride, mask) << 8) | low
    return first, second, third


@triton.jit
def _power(first, second, third, BIT: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):
    """Bits of ±2^(index - most): bfloat16, or float16 where HALF."""
    MOST: tl.constexpr = (1 << (BITS - 1)) - 1  # the largest index, whose level is 1
    if HALF:
        level = _place(first, tl.full(first.shape, (15 - MOST) << 10, tl.uint16), 7 - BIT, 0x8000)
        if BITS >= 2:
            level = _place(first, level, 10 - BIT, 0x0400)
        if BITS >= 3:
            level = _place(second, level, 11 - BIT, 0x0800)
        if BITS >= 4:
            level = _place(third, level, 12 - BIT, 0x1000)
    else:  # the sign goes to bit 15, the lowest index bit to bit 7, as far apart as they lie
        BOTH: tl.constexpr = 0x8000 if BITS == 1 else 0x8080
        level = _place(first, tl.full(first.shape, (127 - MOST) << 7, tl.uint16), 7 - BIT, BOTH)
        if BITS >= 3:
            level = _place(second, level, 8 - BIT, 0x0100)
        if BITS >= 4:
            level = _place(third, level, 9 - BIT, 0x0200)
    return level


@triton.jit
def _has_bit(lanes, BIT: tl.constexpr):
    return (lanes & (1 << BIT)) != 0


@triton.constexpr_function
def _level(levels, index: int) -> float:
    return levels[index] if index < len(levels) else math.nan


@triton.jit
def _either(bit, LEVELS: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr):
    """Level INDEX, or the next where the bit is set."""
    low = tl.full(bit.shape, _level(LEVELS, INDEX), WIDE)
    return tl.where(bit, tl.full(bit.shape, _level(LEVELS, INDEX + 1), WIDE), low)


@triton.jit
def _select(first, second, third, BIT: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
            WIDE: tl.constexpr):
    """Signed level of any codebook; NaN for a code that no level has."""
    bit = _has_bit(first, BIT)
    level = _either(bit, LEVELS, 0, WIDE)
    if BITS >= 3:
        high = _has_bit(second, BIT)
        level = tl.where(high, _either(bit, LEVELS, 2, WIDE), level)
    if BITS >= 4:
        upper = tl.where(high, _either(bit, LEVELS, 6, WIDE), _either(bit, LEVELS, 4, WIDE))
        level = tl.where(_has_bit(third, BIT), upper, level)
    return tl.where(_has_bit(first, 8 + BIT), level * -1.0, level)  # -level would be 0 - level: +0 for 0


@triton.jit
def decode(first, second, third, BIT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
           LEVELS: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr):
    """Signed levels of bit position BIT: exact in bfloat16 (float16 where HALF) for powers of two,
    in WIDE for a table."""
    if KIND == "table":
        return _select(first, second, third, BIT, BITS, LEVELS, WIDE)
    else:
        level = _power(first, second, third, BIT, BITS, HALF)
        if KIND == "powers and zero":
            index = first & 0x00FF
            if BITS >= 3:
                index = index | second
            if BITS >= 4:
                index = index | third
            level = tl.where(_has_bit(index, BIT), level, level & 0x8000)
        return level.to(tl.float16 if HALF else tl.bfloat16, bitcast=True)


@triton.jit
def split8(x, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """``[ROWS, 8·BYTES]`` as eight ``[ROWS, BYTES]``: elements 8·i, 8·i + 1, …"""
    even, odd = tl.split(tl.reshape(x, (ROWS, BYTES, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (ROWS, BYTES, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (ROWS, BYTES, 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join8(x0, x1, x2, x3, x4, x5, x6, x7, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Inverse of :func:`split8`."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), (ROWS, 8 * BYTES))

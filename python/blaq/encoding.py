"""From float weights to codes: the scale of a group of values, and the code of each value.

:func:`encode` has the last word: what it returns decodes to the weight, bit for bit, through the op
that inference uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blaq_kernels.codebook import bits_of
from blaq_kernels.reference import (
    SCALE_TINY,
    from_groups,
    quantize_codes,
    scale_shape,
    to_groups,
)

__all__ = ["encode", "recover_scale"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32}
_TINY_BITS, _INF_BITS = 0x0D800000, 0x7F800000  # float32 bits of SCALE_TINY and of infinity


def encode(name: str, weight: Tensor, levels: Sequence[float], group_size: int,
           scale: Tensor) -> Tensor:
    """Packed codes of a quantized weight.

    Args:
        name: what error messages call the weight.
        weight: ``[N, ...]``, float32, bfloat16 or float16.
        levels: ascending magnitudes, at most 8.
        group_size: 0, -1 or g > 0.
        scale: float32, ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``.

    Returns:
        ``qweight``, uint8 ``[bits, N, ceil(K/8)]``, with ``unpack(qweight) == weight`` bit for bit.

    Raises:
        ValueError: a value is not ``level × scale`` rounded to the weight's dtype.
        TypeError: the weight has another dtype.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        got = str(weight.dtype).removeprefix("torch.")
        raise TypeError(f"blaq.pack: {name} must be float32, bfloat16 or float16, got {got}")
    expected = scale_shape(weight.shape, group_size)
    if tuple(scale.shape) != expected or scale.dtype != torch.float32:
        raise ValueError(f"blaq.pack: scale of {name} must be float32 {list(expected)}, got "
                         f"{str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}")
    weight = weight.detach().contiguous()
    scale = scale.detach().to(weight.device).contiguous()
    codes = _codes(weight, levels, group_size, scale)
    qweight: Tensor = torch.ops.blaq.pack.default(codes, bits_of(levels))
    flat = weight.flatten(1)
    decoded = torch.ops.blaq.unpack.default(qweight, scale, list(levels), group_size,
                                            flat.shape[1], weight.dtype)
    as_int = _INT_OF_SIZE[weight.element_size()]
    wrong = (decoded.view(as_int) != flat.view(as_int)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"blaq.pack: {name} must hold ±{'|'.join(f'{level:g}' for level in levels)} × scale in "
            f"every bit, got {flat[row, column].item()!r} in row {row}, column {column} "
            f"({len(wrong)} of {flat.numel()} values differ)")
    return qweight


def _codes(weight: Tensor, levels: Sequence[float], group_size: int, scale: Tensor) -> Tensor:
    """The code whose decoded value is this one. Where two levels round to one value (float16 near
    zero) the upper: only there may a zero have a sign. No match gives code 0, encode finds it."""
    groups = to_groups(weight, group_size)
    index = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
    magnitudes = groups.abs()
    for i, level in enumerate(levels):
        value = (torch.tensor(level, dtype=torch.float32) * scale.reshape(-1, 1)).to(weight.dtype)
        index.masked_fill_(magnitudes == value, i)
    negative = groups.signbit().to(torch.uint8)
    if levels[0] == 0.0:
        negative *= index > 0
    return from_groups((negative << (bits_of(levels) - 1)) | index, weight.shape, group_size)


def recover_scale(weight: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    """A scale for each group of a quantized weight, from its values alone.

    The largest magnitude of a group sits on some level; each choice fixes the level of every other
    value, and each value then confines the scale to an interval of floats, because
    ``round_to_dtype(level × scale)`` never falls as the scale grows. A scale in all intervals
    reproduces the group. The highest such level wins. Where there is none the answer is arbitrary,
    and :func:`encode` refuses it.

    Returns:
        float32, ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``.
    """
    weight = weight.detach().contiguous()
    values = to_groups(weight.float().abs(), group_size)
    valid = to_groups(torch.ones_like(weight, dtype=torch.float32), group_size) > 0
    top = values.amax(1)
    values = torch.where(valid, values, top[:, None])  # a short last group's padding binds nothing
    scale = torch.full_like(top, SCALE_TINY)
    found = torch.zeros_like(top, dtype=torch.bool)
    for level in reversed(levels):
        if level > 0.0 and not found.all():
            center = (top / level).clamp_min(SCALE_TINY)
            low, high = _interval(values, center, levels, weight.dtype)
            fits = (low <= high) & ~found
            inside = center.view(torch.int32).clamp(low, high).view(torch.float32)
            scale = torch.where(fits, inside, scale)
            found |= fits
    return scale.reshape(scale_shape(weight.shape, group_size))


def _interval(values: Tensor, center: Tensor, levels: Sequence[float],
              dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and last scale, as float32 bits, that give every value of a group from its level, the
    nearest at the scale ``center``."""
    index = quantize_codes(values, center[:, None], levels, -1)
    low = torch.full_like(center, _TINY_BITS, dtype=torch.int32)
    high = torch.full_like(center, _INF_BITS - 1, dtype=torch.int32)
    for i, level in enumerate(levels):
        here = index == i
        largest = values.masked_fill(~here, -1.0).amax(1)
        smallest = values.masked_fill(~here, float("inf")).amin(1)
        if level == 0.0:
            high = torch.where(largest > 0.0, low - 1, high)
        else:
            low = torch.maximum(low, _first_scale(level, largest, dtype, torch.ge))
            high = torch.minimum(high, _first_scale(level, smallest, dtype, torch.gt) - 1)
    return low, high


def _first_scale(level: float, target: Tensor, dtype: torch.dtype, compare) -> Tensor:
    """Bits of the smallest scale with ``round_to_dtype(level × scale)`` >= or > target: bisection
    over the float32 bit patterns, which ascend as the floats do."""
    low = torch.full_like(target, _TINY_BITS, dtype=torch.int32)
    high = torch.full_like(low, _INF_BITS)
    factor = torch.tensor(level, dtype=torch.float32)
    for _ in range(31):
        middle = low + (high - low) // 2
        reached = compare((factor * middle.view(torch.float32)).to(dtype).float(), target)
        high = torch.where(reached, middle, high)
        low = torch.where(reached | (low == high), low, middle + 1)
    return high

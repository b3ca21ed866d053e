"""Convolutions with a decoded weight, where torch's own are faster than those with the packed one: what a
pixel's channels cost to prepare must be shared by many products.

Measured against ``F.conv2d`` on a Zen 4 at batches of 1 to 64, both layouts, 1 to 4 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import blaq_kernels

from .decoded import MOST_WEIGHTS

__all__ = ["conv2d", "memory_format", "takes_conv"]

FEW = 16
"""Channels or outputs of a group, below which the kernels that go by pixel leave lanes idle."""
LEAST = {torch.float32: {"fast": 1 << 12, "high": 1 << 13},
         torch.bfloat16: {"fast": 1 << 14, "high": 1 << 15}}
"""Products of a place of the output, a group's, from which on those kernels are the fastest; oneDNN is twice
as fast in bfloat16. In float16 it has no fast convolution here."""
LEAST_OF_ROWS, LEAST_OF_FAST_ROWS = 1 << 18, 1 << 17
"""The same where rows of pixels are multiplied: accuracy ``exact``, groups of inputs, and other processors;
and of those the ones in 8 bits."""


def takes_conv(dtype: torch.dtype, weight_shape: Sequence[int], groups: int, bits: int, group_size: int,
               accuracy: str) -> bool:
    """Whether :func:`conv2d` is the fastest way on the CPU. The batch has no part in it, so that it has
    none in a result."""
    by_pixel = group_size <= 0 and blaq_kernels.int8_kernels() == "AVX-512 VNNI"
    return _takes(dtype, tuple(weight_shape), groups, bits, group_size, accuracy, by_pixel)


@functools.lru_cache
def _takes(dtype: torch.dtype, weight_shape: tuple[int, ...], groups: int, bits: int, group_size: int,
           accuracy: str, by_pixel: bool) -> bool:
    n, channels, height, width = weight_shape
    outputs, products = n // groups, n // groups * channels * height * width
    if dtype not in LEAST or n * channels * height * width > MOST_WEIGHTS:
        return False
    if not by_pixel or accuracy == "exact" or min(channels, outputs) < FEW:
        fast = accuracy == "fast" and group_size > 0
        return products < (LEAST_OF_FAST_ROWS if fast else LEAST_OF_ROWS)
    full = channels / (-(-channels // 32) * 32)  # of the lanes that hold channels
    wide = bits > 1 and accuracy == "high"  # as many instructions again
    if wide and full < 0.75:
        return True
    least = LEAST[dtype][accuracy] * (2 if wide and dtype is torch.bfloat16 else 1)
    return products * full < least


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout that the weight should have: its convolution answers in the input's."""
    if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
           padding: Sequence[int], dilation: Sequence[int], groups: int, relu: bool) -> Tensor:
    """``F.conv2d`` on the CPU, and its ReLU if asked."""
    output = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return output.relu_() if relu else output

"""How a list of weights becomes one launch: a table on the device, a row for each weight, and a map
from programs to rows. Built on the host from shapes, then filled with addresses; both are kept, so a
training loop builds them once.

A weight falls into groups, each with a scale of its own. Groups of at most ``TILE_MOST`` elements are
short: a program holds a tile of them in registers. Longer ones, as a whole tensor mostly is, are cut
into chunks, a program each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from ..reference import matrix_shape

TILE_LEAST, TILE_MOST = 2048, 8192
CHUNK = 2048  # elements of a long group that one program takes; three programs to a multiprocessor
PER_WARP = 512  # elements: 16 a thread
NARROWEST = 16

# Columns of the table: seven addresses, then numbers.
PARAM, GRAD, TRIAL_GRAD, LATENT, EXP_AVG, EXP_AVG_SQ, SCALE = map(tl.constexpr, range(7))
GROUPS = tl.constexpr(7)  # of the weight
LENGTH = tl.constexpr(8)  # elements of a group; the last of a row may be shorter
PER_ROW = tl.constexpr(9)  # groups of a row
ROW = tl.constexpr(10)  # elements of a row
FIRST_BLOCK = tl.constexpr(11)
WIDTH = tl.constexpr(12)  # short: index of the tile's width. long: chunks of a group
FIRST_GROUP = tl.constexpr(13)  # long: among all groups of the list
SCRATCH = tl.constexpr(14)  # long: first element among those of all weights
INDEX = tl.constexpr(15)  # of the weight in the call's lists
COLUMNS = tl.constexpr(16)


@dataclass(frozen=True)
class Shape:
    """A weight as kernels see it."""

    groups: int
    length: int
    per_row: int
    row: int

    @classmethod
    def of(cls, sizes: Sequence[int], group_size: int) -> Shape:
        n, k = matrix_shape(sizes)
        if group_size == 0:
            return cls(1, n * k, 1, n * k)
        per_row = max(1, -(-k // group_size)) if group_size > 0 else 1
        return cls(n * per_row, group_size if group_size > 0 else k, per_row, k)

    @property
    def size(self) -> int:
        return self.groups // self.per_row * self.row


@dataclass(frozen=True, eq=False)
class Part:
    """Weights that one launch takes: of one dtype, all short or all long, all aligned or none."""

    dtype: torch.dtype
    short: bool
    aligned: bool
    indices: tuple[int, ...]  # in the call's lists
    table: np.ndarray  # [weights, COLUMNS]; addresses are zero
    programs: np.ndarray  # [programs]: which row
    tile: int
    widths: tuple[int, ...]  # of short groups, as far as they occur
    groups: int
    elements: int

    @property
    def warps(self) -> int:
        return self.tile // PER_WARP


@lru_cache(maxsize=256)
def parts(weights: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...],
          group_size: int) -> tuple[Part, ...]:
    """The launches of a list of (sizes, dtype, whether every address is a multiple of 16 bytes).
    Weights without elements have no part."""
    sorted_out: dict[tuple[torch.dtype, bool, bool], list[tuple[int, Shape]]] = {}
    for i, (sizes, dtype, aligned) in enumerate(weights):
        shape = Shape.of(sizes, group_size)
        if shape.size:
            short = min(shape.length, shape.row) <= TILE_MOST
            wide = aligned and shape.row % 8 == 0 and (shape.per_row == 1 or shape.length % 8 == 0)
            sorted_out.setdefault((dtype, short, wide), []).append((i, shape))
    return tuple(_part(*key, found) for key, found in sorted_out.items())


def _part(dtype: torch.dtype, short: bool, aligned: bool, found: list[tuple[int, Shape]]) -> Part:
    indices, shapes = zip(*found, strict=True)
    lengths = [max(NARROWEST, triton.next_power_of_2(min(s.length, s.row))) for s in shapes]
    tile = max(TILE_LEAST, *lengths) if short else CHUNK
    widths = tuple(sorted(set(lengths))) if short else ()
    table = np.zeros((len(shapes), COLUMNS.value), dtype=np.int64)
    counts = []
    block = group = element = 0
    for row, index, shape, length in zip(table, indices, shapes, lengths, strict=True):
        width = widths.index(length) if short else -(-min(shape.length, shape.row) // tile)
        count = -(-shape.groups // (tile // length)) if short else shape.groups * width
        row[GROUPS.value:] = (shape.groups, shape.length, shape.per_row, shape.row, block, width,
                              group, element, index)
        block, group, element = block + count, group + shape.groups, element + shape.size
        counts.append(count)
    if max(block, group) >= 2**31:  # what `number` holds; elements are counted in 64 bits
        raise ValueError(f"blaq: group_size must leave less than 2^31 groups in a list, got {group}")
    return Part(dtype, short, aligned, indices, table,
                np.repeat(np.arange(len(shapes), dtype=np.int32), counts), tile, widths, group,
                element)


@triton.jit
def address(entry, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table's row ``entry``."""
    pointer = tl.load(entry + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def number(entry, COLUMN: tl.constexpr):
    """A count from the table's row ``entry``, where 32 bits are enough."""
    return tl.load(entry + COLUMN).to(tl.int32)


@triton.jit
def first_element(group, length, per_row, row, ALIGNED: tl.constexpr):
    """Where groups begin in a weight: more than 2³¹ elements are counted in 64 bits."""
    first = (group // per_row).to(tl.int64) * row + (group % per_row).to(tl.int64) * length
    if ALIGNED:
        first = tl.multiple_of(first, 8)  # here: a hint on the result of a call is lost
    return first

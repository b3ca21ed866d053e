"""How long groups become launches of csrc/cuda/step_kernel.h: a table on the device with a row for
each weight, and maps from blocks to its rows. Built on the host from shapes, then filled with
addresses.
 A group of at most ``WHOLE_MOST`` weights is one block's. Longer ones are cut into parts by the
list's size
alone: some ``PARTS`` of them, so that every multiprocessor has several turns, none of which ends
much later than the others; each leaves a histogram of 10 KB, which is nothing beside the 590 KB
that the smallest part moves. """

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..reference import matrix_shape

LONG_FROM = 8193  # elements of a group; shorter ones fit the registers of a Triton program
WHOLE_MOST = 1 << 15
TILE = 2048  # kTile
PARTS, PART_LEAST = 4096, 8 * TILE
RUN = 64  # most histograms that one block adds up
COLUMNS = ("param", "grad", "trial_grad", "latent", "exp_avg", "exp_avg_sq", "scale", "length",
           "per_row", "row", "first_group", "first_part", "parts", "index", "aligned")
ADDRESSES = 7  # the first columns


@dataclass(frozen=True)
class Shape:
    """Groups of a weight: ``length`` elements each, ``per_row`` in a row of ``row`` elements."""

    groups: int
    length: int
    per_row: int
    row: int

    @classmethod
    @lru_cache(maxsize=4096)  # every call asks for those of its weights
    def of(cls, sizes: Sequence[int], group_size: int) -> Shape:
        n, k = matrix_shape(sizes)
        if group_size == 0:
            n, k = 1, n * k
        per_row = max(1, -(-k // group_size)) if group_size > 0 else 1
        return cls(n * per_row, min(group_size, k) if group_size > 0 else k, per_row, k)


@dataclass(frozen=True, eq=False)
class Part:
    """Weights that one sequence of launches takes: of one dtype, every group whole or every one
    cut.

    Attributes:
        indices: in the call's lists.
        table: ``[weights, COLUMNS]``, int64; addresses are zero.
        programs: int32: row of each part, row of each group, then the runs (first part, how many).
        size: elements of a part.
    """

    dtype: torch.dtype
    whole: bool
    indices: tuple[int, ...]
    table: np.ndarray
    programs: np.ndarray
    size: int
    parts: int
    groups: int
    runs: int


def is_long(sizes: Sequence[int], group_size: int) -> bool:
    """Whether a scale of this weight spans more than a Triton program takes."""
    shape = Shape.of(sizes, group_size)
    return shape.groups > 0 and shape.length >= LONG_FROM


def is_short(sizes: Sequence[int], group_size: int) -> bool:
    """Whether a Triton program takes its groups; a weight without elements has none."""
    shape = Shape.of(sizes, group_size)
    return shape.groups > 0 and 0 < shape.length < LONG_FROM


@lru_cache(maxsize=256)
def parts(weights: tuple[tuple[int, tuple[int, ...], torch.dtype, bool], ...],
          group_size: int, cut: bool = False) -> tuple[Part, ...]:
    """The launches of a list of (index, sizes, dtype, whether every address is a multiple of 16).
    With ``cut`` no group is whole."""
    found: dict[tuple[torch.dtype, bool], list[tuple[int, Shape, bool]]] = {}
    for index, sizes, dtype, aligned in weights:
        shape = Shape.of(sizes, group_size)
        if shape.groups and shape.length:
            whole = not cut and shape.length <= WHOLE_MOST
            found.setdefault((dtype, whole), []).append((index, shape, aligned))
    return tuple(_part(*key, shapes) for key, shapes in found.items())


def _part(dtype: torch.dtype, whole: bool, weights: list[tuple[int, Shape, bool]]) -> Part:
    reach = 7  # elements by which the first part of a group may begin before it
    longest = max(shape.length for _, shape, _ in weights) + reach
    total = sum(shape.groups * shape.length for _, shape, _ in weights)
    size = longest if whole else max(PART_LEAST, -(-total // PARTS))
    size = -(-size // TILE) * TILE
    table = np.zeros((len(weights), len(COLUMNS)), dtype=np.int64)
    groups = np.array([shape.groups for _, shape, _ in weights])
    cuts = np.array([-(-(shape.length + reach) // size) for _, shape, _ in weights])
    first_group, first_part = (np.cumsum(n) - n for n in (groups, groups * cuts))
    for row, (index, shape, aligned), *rest in zip(table, weights, first_group, first_part, cuts,
                                                  strict=True):
        row[ADDRESSES:] = (shape.length, shape.per_row, shape.row, *rest, index, aligned)
    count = int((groups * cuts).sum())
    if count >= 2**31:
        raise ValueError(f"blaq: group_size must leave less than 2^31 parts of groups, got {count}")
    rows = np.arange(len(weights), dtype=np.int32)
    runs = [(first + group * cut + run, min(RUN, cut - run))
            for n, first, cut in zip(groups.tolist(), first_part.tolist(), cuts.tolist(),
                                     strict=True)
            if cut > RUN for group in range(n) for run in range(0, cut, RUN)]
    programs = np.concatenate([np.repeat(rows, groups * cuts), np.repeat(rows, groups),
                               np.array(runs, dtype=np.int32).reshape(-1)])
    return Part(dtype, whole, tuple(index for index, _, _ in weights), table, programs, size, count,
                int(groups.sum()), len(runs))

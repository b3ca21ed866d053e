"""How a packed product is cut into programs, and when the vendor's product is the better one: data,
by shape and architecture. Nothing is tuned when a program runs.

Reasons, counted and not yet measured:

* Up to 16 rows the weight's bytes are all that matters. Few weights a program and k split among
  programs keep the whole GPU loading; the last program of a tile sums its parts, in a fixed order. Of
  the larger tiles from 65 rows on, that would take it longer than a launch of its own takes the GPU.
* Beyond, a program's tile of inputs is the traffic: a tile of ``rows`` outputs reads each input once
  for ``rows`` weights, so ``rows`` grows with m. Inputs are interleaved once, for k·m·4 bytes.
* Decoding once and calling torch.matmul adds ``(bits/8 + 2)·n·k`` bytes, at 4.3 TB/s and 16 bits
  0.5 ps a weight; products by Triton take maybe a quarter longer than cuBLAS, at 790 TFLOP/s 0.6 fs a
  weight and row. The two meet near m = 800, on GPUs without ``wgmma`` earlier.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

FEW = 64  # rows: up to here k is split more finely, and the last program of a tile adds its parts up
LEAST_TILES = 4  # of k for a program: fewer are over before its loads overlap


@dataclass(frozen=True)
class Target:
    """What a plan depends on: compute capability, major number, and multiprocessors."""

    major: int
    processors: int


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        cols, rows: inputs (of m) and outputs (of n) of a program.
        bytes: of a row's plane in a tile of k, which holds eight times as many weights.
        splits: parts of k, each a program's.
        interleaved: whether inputs are laid out beforehand.
    """

    cols: int
    rows: int
    bytes: int
    warps: int
    stages: int
    interleaved: bool
    splits: int = 1

    @property
    def sums_by_tile(self) -> bool:
        """Whether registers hold a tile's sums beside all sums: 64 of each in a thread."""
        return self.cols * self.rows <= 64 * 32 * self.warps


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.major, properties.multi_processor_count)


def target_of(x: torch.Tensor) -> Target:
    """Where ``x`` is; an H200 in the interpreter."""
    return _device_target(x.get_device()) if x.is_cuda else Target(9, 132)


DECODE = Plan(cols=16, rows=64, bytes=32, warps=4, stages=4, interleaved=False)
HOPPER = (
    (64, Plan(cols=64, rows=128, bytes=32, warps=8, stages=3, interleaved=True)),
    (256, Plan(cols=128, rows=128, bytes=16, warps=8, stages=4, interleaved=True)),
    (1536, Plan(cols=256, rows=128, bytes=16, warps=8, stages=3, interleaved=True)),
)
OTHERS = (
    (64, Plan(cols=64, rows=64, bytes=32, warps=4, stages=2, interleaved=True)),
    (256, Plan(cols=64, rows=128, bytes=32, warps=8, stages=2, interleaved=True)),
)
# Each of the eight unrolled products gets sums of its own in tensor memory, which 128 × 64 would fill.
BLACKWELL = OTHERS[:1]
TABLE = {8: OTHERS, 9: HOPPER, 10: BLACKWELL, 12: OTHERS}
PROGRAMS = 4  # on a multiprocessor, for k to be split no further


@functools.lru_cache(4096)
def plan_for(m: int, n: int, k: int, group_size: int, dtype: torch.dtype, exact: bool,
             target: Target) -> Plan | None:
    """The plan of a product ``[m, k] × [n, k]``; None is decoding once and torch.matmul.

    ``exact``: the codebook's levels are numbers of 16 bits.
    """
    if dtype == torch.float64:
        return None
    if min(m, n) == 0:
        return DECODE  # nothing will be launched
    if m <= DECODE.cols:
        plan = DECODE
    elif dtype == torch.float32:  # three products for one: the vendor's float32 is as fast
        return None
    else:
        table = TABLE.get(target.major, OTHERS)
        at = next((i for i, (most, _) in enumerate(table) if m <= most), None)
        if at is None:
            return None
        plan = table[at][1]
        if plan.cols > 128 and 2 * _programs(plan, m, n) <= target.processors:
            plan = table[at - 1][1]  # twice the programs, rather than parts
    if group_size > 0 and exact and plan.sums_by_tile:
        while plan.bytes > 16 and group_size % (8 * plan.bytes):
            plan = replace(plan, bytes=plan.bytes // 2)
    programs = _programs(plan, m, n)
    tiles = -(-k // (8 * plan.bytes))
    wanted = -(-PROGRAMS * target.processors // programs) if m <= FEW else target.processors // programs
    return replace(plan, splits=max(1, min(wanted, tiles // LEAST_TILES, 16)))


def _programs(plan: Plan, m: int, n: int) -> int:
    return -(-n // plan.rows) * -(-m // plan.cols)


@dataclass(frozen=True)
class ConvPlan:
    """One launch of the implicit product: as :class:`Plan`, ``cols`` pixels and ``rows`` outputs."""

    cols: int
    rows: int
    bytes: int
    warps: int
    stages: int
    splits: int = 1


CONV_SMALL = ConvPlan(cols=32, rows=64, bytes=16, warps=4, stages=2)
CONV_LARGE = ConvPlan(cols=64, rows=128, bytes=16, warps=8, stages=2)
CONV_LEAST_ROWS = 16  # fewer outputs in a group fill no tile: depthwise convolutions, above all
CONV_MOST_OPERATIONS = 3e9
"""From here on decoding once and the vendor's convolution are taken to be faster: a gather costs some
12 instructions an input, which holds the implicit product near a third of the tensor cores' rate,
against two thirds; decoding costs a launch and ``(bits/8 + 2)·n·k`` bytes, 3 µs together."""


@functools.lru_cache(4096)
def conv_plan_for(pixels: int, n: int, k: int, groups: int, dtype: torch.dtype,
                  target: Target) -> ConvPlan | None:
    """The plan of a convolution with ``n`` outputs in each group; None is decoding once and
    torch's convolution."""
    if dtype == torch.float64 or n < CONV_LEAST_ROWS:
        return None
    if 2.0 * pixels * n * k * groups > CONV_MOST_OPERATIONS:
        return None
    large = -(-n // CONV_LARGE.rows) * -(-pixels // CONV_LARGE.cols) * groups >= 2 * target.processors
    plan = CONV_LARGE if large and target.major == 9 else CONV_SMALL
    programs = -(-n // plan.rows) * -(-pixels // plan.cols) * groups
    tiles = -(-k // (8 * plan.bytes))
    wanted = -(-PROGRAMS * target.processors // programs)
    return replace(plan, splits=max(1, min(wanted, tiles // LEAST_TILES, 16)))

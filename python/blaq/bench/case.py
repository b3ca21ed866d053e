"""What a case is, and what running one gives: rows that a table, a file or a plot shows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import blaq_kernels

from ..codebook import levels_of
from .peers import PEERS
from .timing import Timing, measure

__all__ = ["BLAQ", "FLOOR", "Case", "Result", "Row", "Table", "Variant", "run_case"]

BLAQ = "blaq"
FLOOR = "memory floor"
FLOOR_MOST_BYTES = 384 << 20
"""From here on time grows with bytes (with 32 MB of L3: 47 GB/s at 96 MiB, 28 at 384, 30 at 768):
a larger floor is measured on this much and scaled."""
SWEPT_BYTES = 128 << 20
"""Four times the largest L3 of what this was measured on."""
PAUSE_SECONDS = 0.02
"""Until the threads of one library no longer spin when another's begin: torch's do for 5 ms."""
AXES = ("dtype", "bits", "group_size", "method")


@dataclass(frozen=True)
class Case:
    """One op on one kind of input.

    Attributes:
        op: name in the tables.
        size: numbers that the op's table names, such as M, N, K.
        dtype: of activations or params; scales and moments are float32.
        bits, method: None where the op has no such argument.
        group_size: 0 there.
    """

    op: str
    size: tuple[int, ...]
    dtype: str = "float32"
    bits: int | None = None
    group_size: int = 0
    method: str | None = None

    @property
    def name(self) -> str:
        parts = [self.op, "x".join(map(str, self.size)), self.dtype]
        parts += [] if self.bits is None else [f"{self.bits}-bit"]
        parts += [f"group {self.group_size}"] if self.group_size else []
        parts += [self.method] if self.method and self.bits != 1 else []
        return " ".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16,
                "float16": torch.float16}[self.dtype]

    @property
    def levels(self) -> tuple[float, ...]:
        """The paper's codebook at this width."""
        return levels_of("pow2", self.bits or 1)


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work.

    Attributes:
        name: ``blaq`` for the op under test.
        call: does it once, on tensors that it keeps.
        bytes: the least it must read and write; 0 where nobody counted.
        error: of its result against float64: norm of the difference over norm of the result.
    """

    name: str
    call: Callable[[], object]
    bytes: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Table:
    """The cases of one op.

    Attributes:
        dims: what the numbers of a size are.
        sizes: default sizes.
        build: ``build(case, full)`` makes the tensors and returns the variants, the op's own first;
            ``full`` adds those that take seconds.
        operations: of one call, as its matrix product counts them; 0 where memory is all.
        axes: default values of each argument that the op has, by name in ``Case``.
        ops: ops of ``torch.ops.blaq`` that it times; by default the one of its name.
    """

    op: str
    dims: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    build: Callable[[Case, bool], Sequence[Variant]]
    operations: Callable[[Case], int] = lambda case: 0
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ops: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """What serves the ops on CPU tensors."""
        serving = blaq_kernels.serving()
        return ", ".join(dict.fromkeys(serving[op] for op in self.ops or (self.op,)))

    def cases(self, sizes: Sequence[tuple[int, ...]] = (), **chosen: Sequence[Any]) -> list[Case]:
        """Every combination of sizes and axes; what is chosen takes the place of the defaults."""
        axes = {name: chosen.get(name) or self.axes[name] for name in AXES if name in self.axes}
        found = []
        for size in sizes or self.sizes:
            for values in itertools.product(*axes.values()):
                case = Case(self.op, size, **dict(zip(axes, values, strict=True)))
                # One level has one solution: both methods run the same code.
                if not (case.bits == 1 and case.method != axes.get("method", (None,))[0]):
                    found.append(case)
        return found


@dataclass(frozen=True)
class Row:
    """What one variant of one case did; the columns of the files.

    Attributes:
        backend: what serves the op; empty for an alternative.
        threads: torch's.
        cache: ``resident``, tensors are where the last call left them, or ``stream``, in memory.
        rounds, repeats: samples, and calls in each.
        median_us, p20_us, p80_us, min_us: microseconds of one call.
        ratio: this variant's time over blaq's, median over the rounds: above 1, blaq is faster.
        bytes, gb_per_s: least traffic and the rate that it means.
        operations, gop_per_s: multiplications and additions, and their rate.
        of_floor: time of moving blaq's bytes by ``a.add_(b)``, over blaq's time.
        error: against float64, see :class:`Variant`.
    """

    case: str
    op: str
    variant: str
    backend: str
    size: str
    dtype: str
    bits: int | None
    group_size: int | None
    method: str | None
    threads: int
    cache: str
    rounds: int
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    min_us: float
    ratio: float
    bytes: int
    gb_per_s: float | None
    operations: int
    gop_per_s: float | None
    of_floor: float | None
    error: float | None


@dataclass(frozen=True)
class Result:
    """A case that has run."""

    case: Case
    timings: dict[str, Timing]
    rows: tuple[Row, ...]

    def ratio(self, variant: str, other: str) -> float:
        """Time of a variant over that of another."""
        return self.timings[variant].over(self.timings[other])

    def error(self, variant: str) -> float:
        """Error of a variant; NaN where it has none."""
        error = next(row.error for row in self.rows if row.variant == variant)
        return math.nan if error is None else error


def run_case(case: Case, table: Table, rounds: int = 20, full: bool = False,
             stream: bool = False) -> Result:
    """Make the case's tensors, time its variants and the memory floor, interleaved; with ``stream``
    after other data went through the caches, so that weights come from memory."""
    if full:
        torch.compiler.reset()  # else a later case meets the recompile limit and runs eagerly
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        variants = list(table.build(case, full))
    floor, scale = _floor(variants[0].bytes)
    with torch.no_grad():
        timings = measure({v.name: v.call for v in [*variants, floor]}, rounds,
                          before=_sweeper() if stream else None,
                          pause=PAUSE_SECONDS if any(v.name in PEERS for v in variants) else 0.0)
    seconds = tuple(s * scale for s in timings[FLOOR].seconds)
    timings[FLOOR] = Timing(seconds, timings[FLOOR].repeats)
    rows = tuple(_row(case, table, v, timings, stream) for v in [*variants, floor])
    return Result(case, timings, rows)


def _sweeper() -> Callable[[], object]:
    """Fills the caches of every thread's core with something else."""
    other = torch.zeros(SWEPT_BYTES // 4)
    return functools.partial(Tensor.add_, other, 1)


def _floor(nbytes: int) -> tuple[Variant, float]:
    """``a.add_(b)`` reads two numbers and writes one; in place, so that no line is fetched only to
    be overwritten. Returned with what its time must be multiplied by."""
    count = max(1, min(nbytes, FLOOR_MOST_BYTES) // 12)
    a, b = torch.ones(count), torch.ones(count)
    call = functools.partial(Tensor.add_, a, b, alpha=1e-9)
    return Variant(FLOOR, call, nbytes), max(1.0, nbytes / FLOOR_MOST_BYTES)


def _row(case: Case, table: Table, variant: Variant, timings: dict[str, Timing],
         stream: bool) -> Row:
    timing, own = timings[variant.name], timings[BLAQ]
    operations = 0 if variant.name == FLOOR else table.operations(case)
    mine = variant.name == BLAQ
    return Row(
        case=case.name, op=case.op, variant=variant.name, backend=table.backend if mine else "",
        size="x".join(map(str, case.size)), dtype=case.dtype, bits=case.bits,
        group_size=case.group_size if "group_size" in table.axes else None, method=case.method,
        threads=torch.get_num_threads(), cache="stream" if stream else "resident",
        rounds=len(timing.seconds), repeats=timing.repeats,
        median_us=timing.median * 1e6, p20_us=timing.p20 * 1e6,
        p80_us=timing.p80 * 1e6, min_us=min(timing.seconds) * 1e6, ratio=timing.over(own),
        bytes=variant.bytes,
        gb_per_s=variant.bytes / timing.median * 1e-9 if variant.bytes else None,
        operations=operations,
        gop_per_s=operations / timing.median * 1e-9 if operations else None,
        of_floor=timings[FLOOR].over(own) if mine else None, error=variant.error)

"""A call of csrc/cuda/step_entry.h: its fields by name, and the scratch memory of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plan import COLUMNS, RUN, Part

BINS = 1264  # kBins
OPS = ("fused_trial", "fused_step", "solve")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Native:
    """The compiled kernels: those of ``_C``, or in tests the host emulation.

    Attributes:
        integers, numbers: names of a call's fields, in order; the levels follow the numbers.
        run: starts the kernels of a call.
        emulated: on tensors of the CPU.
    """

    integers: tuple[str, ...]
    numbers: tuple[str, ...]
    run: Callable[[Sequence[int], Sequence[float]], None]
    emulated: bool = False

    @classmethod
    def of(cls, integers: str, numbers: str, columns: str,
           run: Callable[[Sequence[int], Sequence[float]], None], emulated: bool = False) -> Native:
        if tuple(columns.split()) != COLUMNS:
            raise RuntimeError(f"blaq_kernels._C must have the columns {COLUMNS}, got {columns}")
        return cls(tuple(integers.split()), tuple(numbers.split()), run, emulated)

    def __call__(self, fields: Mapping[str, Any], levels: Sequence[float]) -> None:
        """``fields``: tensors (None for none), ints and floats; what is not given is 0."""
        unknown = fields.keys() - {*self.integers, *self.numbers}
        if unknown:
            raise TypeError(f"a call has no field {', '.join(sorted(unknown))}")
        integers = [_integer(fields.get(name)) for name in self.integers]
        integers[self.integers.index("levels")] = len(levels)
        self.run(integers, [*(float(fields.get(name, 0.0)) for name in self.numbers), *levels])


_native: Native | None = None


def kernels() -> Native:
    """Those of ``_C``, where it was built with CUDA."""
    global _native
    if _native is None:
        from .. import _C

        _native = Native.of(_C.cuda_call_integers(), _C.cuda_call_numbers(),
                            _C.cuda_table_columns(), _C.cuda_call)
    return _native


def _integer(x: Any) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else int(x or 0)


def log_of(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def maps(part: Part, programs: Tensor) -> dict[str, Any]:
    """The fields that say where the part's blocks find what they work on."""
    rows, groups, runs = programs.split([part.parts, part.groups, 2 * part.runs])
    return {"row_of_part": rows, "row_of_group": groups, "runs": runs, "parts": part.parts,
            "groups": part.groups, "run_count": part.runs, "part": part.size, "run": RUN,
            "whole": part.whole, "dtype": DTYPES.index(part.dtype)}


def scratch(part: Part, device: torch.device, op: str, several: bool,
            flips: bool) -> dict[str, Tensor]:
    """Memory between the launches; torch's allocator keeps it from call to call, and in a graph for
    it. ``several``: levels."""
    def new(wanted: bool, count: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(count, dtype=dtype, device=device) if wanted else None

    solves, cut = op == "solve", not part.whole
    eighths = part.parts * part.size // 8  # a word for eight codes, or a byte for eight signs
    signs, codes = not solves and not several, op == "fused_step" and several and flips
    found = {"sums": new(cut, 2 * part.parts, torch.float64),
             "bins": new(cut and several, 2 * BINS * part.parts, torch.float32),
             "scales": new(True, part.groups, torch.float32),
             "mean": new(solves, part.groups, torch.float32),
             "w": new(op == "fused_trial" and several, 8 * eighths, torch.float32),
             "marks": new(signs or codes, eighths * (1 if signs else 4), torch.uint8)}
    return {name: x for name, x in found.items() if x is not None}

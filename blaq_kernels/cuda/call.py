"""``torch.ops.blaq_cuda.step_call`` (csrc/cuda/step_entry.h): what it takes, its fields by name,
and the scratch memory of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cuda, triton
from ..schemas import SCHEMAS
from . import plan
from .plan import RUN, Part

INTEGERS = ("op", "dtype", "whole", "table", "row_of_part", "row_of_group", "runs", "parts",
            "groups", "run_count", "part", "run", "lr", "step", "backtrack", "grad_scale",
            "found_inf", "doubles", "max_iter", "exact", "flips", "sums", "bins", "scales", "w",
            "places", "marks", "start", "codes", "curvature", "mean", "levels")
NUMBERS = ("beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "clip")  # levels follow
BINS = 1264  # kBins
OPS = ("fused_trial", "fused_step", "solve")
GROUP_SIZE = {op: [argument.split()[1] for argument in SCHEMAS[op].split(", ")].index("group_size")
              for op in ("fused_trial", "fused_step")}  # its place among the arguments
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where tests have the host emulation run the kernels, on tensors of the CPU.
emulation: Callable[[Sequence[int], Sequence[float]], None] | None = None


def serves(weights: Sequence[Tensor], group_size: int) -> bool:
    """Whether the kernels here take a call: some group is long, the device is one that they have
    code for, and Triton takes the short groups that may be among them."""
    if not weights or not (emulation or cuda.covers(weights[0].device)):
        return False
    lengths = {plan.Shape.of(x.shape, group_size).length for x in weights if x.numel()}
    short = any(length < plan.LONG_FROM for length in lengths)
    long = any(length >= plan.LONG_FROM for length in lengths)
    return long and not (short and triton.unavailable())


def run(like: Tensor, fields: Mapping[str, Any], levels: Sequence[float]) -> None:
    """Starts the kernels of a call on the device of ``like``.

    Args:
        fields: tensors (None for none), ints and floats; what is not given is 0.
    """
    fields = {**fields, "levels": len(levels)}
    unknown = fields.keys() - {*INTEGERS, *NUMBERS}
    if unknown:
        raise TypeError(f"a call has no field {', '.join(sorted(unknown))}")
    integers = [_integer(fields.get(name)) for name in INTEGERS]
    numbers = [*(float(fields.get(name, 0.0)) for name in NUMBERS), *levels]
    if emulation is not None:
        emulation(integers, numbers)
    else:
        torch.ops.blaq_cuda.step_call.default(like, integers, numbers)


def _integer(x: Any) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else int(x or 0)


def log_of(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def maps(part: Part, table: Tensor, programs: Tensor) -> dict[str, Any]:
    """The fields that say where the part's blocks find what they work on."""
    rows, groups, runs = programs.split([part.parts, part.groups, 2 * part.runs])
    return {"table": table, "row_of_part": rows, "row_of_group": groups, "runs": runs,
            "parts": part.parts, "groups": part.groups, "run_count": part.runs, "part": part.size,
            "run": RUN, "whole": part.whole, "dtype": DTYPES.index(part.dtype)}


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
             "w": new(op == "fused_trial" and several and not cut, 8 * eighths, torch.float32),
             "places": new(not solves and several and cut, 8 * eighths, torch.uint8),
             "marks": new(signs or codes, eighths * (1 if signs else 4), torch.uint8)}
    return {name: x for name, x in found.items() if x is not None}

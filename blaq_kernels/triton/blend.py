"""torch.ops.blaq.blend: ``a · current + (1 - a) · trial``, Eqs. 9 and 10 of BLAQ (AAAI 2024)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..training_rules import check_blend
from . import launch
from .contract_case import Case

BLOCK = 1024
WARPS = 4


@triton.jit
def blend_kernel(current, trial, out, n, a: tl.float64, one_minus_a: tl.float64, WIDE: tl.constexpr,
                 BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(current + at, mask=mask).to(WIDE)
    y = tl.load(trial + at, mask=mask).to(WIDE)
    blended = tl.full([1], a, WIDE) * x + tl.full([1], one_minus_a, WIDE) * y
    tl.store(out + at, blended.to(out.dtype.element_ty), mask=mask)


def blend(current: Tensor, trial: Tensor, backtrack: float) -> Tensor:
    """``backtrack · current + (1 - backtrack) · trial``; ``backtrack = 1`` returns ``current`` exactly.

    Args:
        current, trial: contiguous, of one shape, device and dtype (float32, bfloat16, float16 or
            float64). 16-bit floats are computed in float32 and rounded once.
        backtrack: in (0, 1].

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    check_blend(current, trial, backtrack)
    launch.check_device("blend", "current", current)
    if backtrack == 1.0:
        return current.clone()
    out = torch.empty_like(current)
    n = current.numel()
    if n:
        wide = tl.float64 if current.dtype == torch.float64 else tl.float32
        with launch.on_device_of(current):
            blend_kernel[(triton.cdiv(n, BLOCK),)](
                current, trial, out, n, backtrack, 1.0 - backtrack, wide, BLOCK, num_warps=WARPS)
    return out


def contract() -> list[Case]:
    return [Case(f"blend {dtype}", blend_kernel,
                 {"current": f"*{dtype}", "trial": f"*{dtype}", "out": f"*{dtype}", "n": "i64",
                  "a": "fp64", "one_minus_a": "fp64"},
                 {"WIDE": tl.float32, "BLOCK": BLOCK}, BLOCK, WARPS, budget, wide_loads=True)
            for dtype, budget in (("fp32", 10.0), ("bf16", 10.0))]

"""torch.ops.blaq.scaled_update: ``latent - grad ⊘ curvature``, Eqs. 6 and 8 of BLAQ (AAAI 2024)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..training_rules import check_scaled_update
from . import launch
from .contract_case import Case

BLOCK = 1024  # 8 elements a thread: two 128-bit loads of each float32 input
WARPS = 4


@triton.jit
def scaled_update_kernel(latent, grad, curvature, out, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    w = tl.load(latent + at, mask=mask).to(WIDE)
    g = tl.load(grad + at, mask=mask).to(WIDE)
    d = tl.load(curvature + at, mask=mask, other=1.0).to(WIDE)
    if WIDE == tl.float32:
        ratio = tl.div_rn(g, d)  # / would be the fast one
    else:
        ratio = g / d
    tl.store(out + at, (w - ratio).to(out.dtype.element_ty), mask=mask)


def scaled_update(latent: Tensor, grad: Tensor, curvature: Tensor) -> Tensor:
    """``latent - grad / curvature``, element by element.

    Args:
        latent, grad, curvature: contiguous, of one shape, device and dtype (float32, bfloat16,
            float16 or float64). 16-bit floats are computed in float32 and rounded once.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    check_scaled_update(latent, grad, curvature)
    launch.check_device("scaled_update", "latent", latent)
    out = torch.empty_like(latent)
    n = latent.numel()
    if n:
        wide = tl.float64 if latent.dtype == torch.float64 else tl.float32
        with launch.on_device_of(latent):
            scaled_update_kernel[(triton.cdiv(n, BLOCK),)](
                latent, grad, curvature, out, n, wide, BLOCK, num_warps=WARPS)
    return out


def contract() -> list[Case]:
    return [Case(f"scaled_update {dtype}", scaled_update_kernel,
                 {"latent": f"*{dtype}", "grad": f"*{dtype}", "curvature": f"*{dtype}",
                  "out": f"*{dtype}", "n": "i64"},
                 {"WIDE": tl.float32, "BLOCK": BLOCK}, BLOCK, WARPS, budget, wide_loads=True)
            for dtype, budget in (("fp32", 40.0), ("bf16", 40.0))]

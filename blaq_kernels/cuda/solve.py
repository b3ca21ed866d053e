"""torch.ops.blaq.solve where a scale spans a long group, Eqs. 5 and 7 of BLAQ (AAAI 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import triton
from ..device import aligned, on_device_of, stream_of
from ..reference import SCALE_TINY, scale_shape
from ..schemas import check_solve
from ..tables import tables
from . import call, plan
from .fused import ENGINE


def solve(latent: Tensor, curvature: Tensor, init_scale: Tensor | None, levels: Sequence[float],
          group_size: int, max_iter: int, method: str) -> tuple[Tensor, Tensor]:
    """Codes β and scales α that minimise ``½ Σ d (w - α β)²`` group by group: arguments, result and
    errors are those of Triton's ``solve``, which groups of at most 8192 weights go to. An
    alternation's sums are a histogram's, so its scale is the reference's to about 1e-3.
    """
    check_solve(latent, curvature, init_scale, levels, group_size, max_iter, method)
    ENGINE.check_device("solve", "latent", latent)
    if plan.is_short(latent.shape, group_size):
        plan.require_triton("solve", plan.Shape.of(latent.shape, group_size).length)
        return triton.function("solve")(latent, curvature, init_scale, levels, group_size,
                                        max_iter, method)
    codes = torch.empty_like(latent, dtype=torch.uint8)
    scale = latent.new_full(scale_shape(latent.shape, group_size), SCALE_TINY)
    weight = (0, tuple(latent.shape), latent.dtype, aligned(latent, curvature, codes))
    found = plan.parts((weight,), group_size, True)
    if found:
        part, = found
        columns = ((), (), (), (latent.data_ptr(),), (), (), (scale.data_ptr(),))
        with on_device_of(latent):
            table, programs = tables.get(part, latent.device, columns)
            memory = call.scratch(part, latent.device, "solve", len(levels) > 1, False)
            call.kernels()(
                {**call.maps(part, programs), **memory, "op": call.OPS.index("solve"),
                 "table": table, "codes": codes, "curvature": curvature, "start": init_scale,
                 "max_iter": max_iter, "exact": method == "exact",
                 "stream": stream_of(latent.device)}, levels)
    return codes, scale

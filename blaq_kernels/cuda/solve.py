"""torch.ops.blaq.solve where a scale spans a long group, Eqs. 5 and 7 of BLAQ (AAAI 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..device import aligned, on_device_of
from ..reference import SCALE_TINY, scale_shape
from ..tables import tables
from ..training_rules import check_solve
from . import call, plan

__all__ = ["solve"]


def solve(otherwise: Callable[..., tuple[Tensor, Tensor]], latent: Tensor, curvature: Tensor,
          init_scale: Tensor | None, levels: Sequence[float], group_size: int, max_iter: int,
          method: str) -> tuple[Tensor, Tensor]:
    """Codes and scales that minimise ``sum of curvature * (latent - scale * level)^2`` by groups.

    Args:
        otherwise: serves groups of at most 8192 weights, and devices without kernels.
        latent, curvature: finite float32 of one shape, contiguous, on one device.
        init_scale: where ``alternating`` begins; None for the weighted mean of |latent|.
        levels: ascending magnitudes of the codebook, the largest 1.
        group_size: 0 for one scale, -1 for one a row, g for one for each g inputs of a row.
        max_iter: most alternations. Their sums are a histogram's: a scale is the reference's to
            about 3e-3 / sqrt(n / 10^4), of n weights, where it begins far away.
        method: ``alternating``, or ``exact``: the global minimum to within 0.1 %.

    Returns:
        Codes, uint8 of the latent's shape, and scale, float32.

    Raises:
        ValueError: an argument breaks a rule; the message names it. Finite values are looked for,
            which waits for the device.
    """
    args = (latent, curvature, init_scale, levels, group_size, max_iter, method)
    if not call.serves([latent], group_size):
        return otherwise(*args)
    check_solve(*args)
    codes = torch.empty_like(latent, dtype=torch.uint8)
    scale = latent.new_full(scale_shape(latent.shape, group_size), SCALE_TINY)
    weight = (0, tuple(latent.shape), latent.dtype, aligned(latent, curvature, codes))
    part, = plan.parts((weight,), group_size, True)
    columns = ((), (), (), (latent.data_ptr(),), (), (), (scale.data_ptr(),))
    with on_device_of(latent):
        table, programs = tables.get(part, latent.device, columns)
        call.run(latent, {
            **call.maps(part, table, programs),
            **call.scratch(part, latent.device, "solve", len(levels) > 1, False),
            "op": call.OPS.index("solve"), "codes": codes, "curvature": curvature,
            "start": init_scale, "max_iter": max_iter, "exact": method == "exact"}, levels)
    return codes, scale

"""torch.ops.blaq.solve: codes and scales of a weight, Eqs. 5 and 7 of BLAQ (AAAI 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import SCALE_TINY, scale_shape
from ..tables import tables
from ..training_rules import check_solve
from . import launch
from .alternate import ALONE
from .long_groups import code_long_groups, sum_long_groups
from .plan import Part, parts
from .settle import Workspace
from .short_groups import solve_short_groups


def solve(latent: Tensor, curvature: Tensor, init_scale: Tensor | None, levels: Sequence[float],
          group_size: int, max_iter: int, method: str) -> tuple[Tensor, Tensor]:
    """Codes β and scales α that minimise ``½ Σ d (w - α β)²`` group by group.

    Args:
        latent, curvature: finite float32 of one shape, contiguous, on one device.
        init_scale: where ``alternating`` begins; None for the weighted mean of |latent|.
        levels: ascending magnitudes of the codebook, the largest 1.
        group_size: 0 for one scale, -1 for one a row, g for one for each g inputs of a row.
        max_iter: most alternations.
        method: ``alternating``, or ``exact``: the global minimum to within 0.1 %.

    Returns:
        Codes, uint8 of the latent's shape, and scale, float32.

    Raises:
        ValueError: an argument breaks a rule; the message names it. Finite values are looked for,
            which waits for the device.
    """
    check_solve(latent, curvature, init_scale, levels, group_size, max_iter, method)
    launch.check_device("solve", "latent", latent)
    codes = torch.empty_like(latent, dtype=torch.uint8)
    scale = latent.new_empty(scale_shape(latent.shape, group_size))
    inputs = (latent, curvature, codes, scale)
    aligned = launch.aligned(latent, curvature, codes)
    found = parts(((tuple(latent.shape), latent.dtype, aligned),), group_size)
    if not found:
        scale.fill_(SCALE_TINY)
        return codes, scale
    part, = found
    addresses = ((), (), (), (latent.data_ptr(),), (), (), (scale.data_ptr(),))
    levels, exact = tuple(levels), method == "exact" and len(levels) > 1
    with launch.on_device_of(latent):
        table, programs = tables.get(part, latent.device, addresses)
        if part.short:
            # The weighted mean is an alternation of its own, where no scale is given.
            solve_short_groups[(programs.numel(),)](
                table, programs, curvature, codes, init_scale, max_iter + (init_scale is None),
                levels, exact, part.tile, part.widths, part.aligned, num_warps=part.warps)
        else:
            _solve_long(part, table, programs, inputs, init_scale, levels, max_iter, exact)
    return codes, scale


def _solve_long(part: Part, table: Tensor, programs: Tensor, inputs: tuple[Tensor, ...],
                init_scale: Tensor | None, levels: tuple[float, ...], max_iter: int,
                exact: bool) -> None:
    _, curvature, codes, _ = inputs
    work = Workspace.of(part, table.device, False, False, exact)
    active = torch.zeros(part.groups, dtype=torch.int32, device=table.device)
    grid, tile = (programs.numel(),), {"TILE": part.tile, "ALIGNED": part.aligned,
                                       "num_warps": part.warps}

    def sum_pass(first: bool = False, searches: bool = False) -> None:
        sum_long_groups[grid](
            table, programs, curvature, init_scale if first and not exact else None, work.records,
            work.runs, work.bins if searches else None, work.states, active, work.tickets, first,
            levels, ALONE, searches, work.copies, **tile)

    sum_pass(first=True)
    if exact:
        sum_pass(searches=True)
        sum_pass()
    elif len(levels) > 1:
        for _ in range(max_iter - (init_scale is not None)):
            sum_pass()
    code_long_groups[grid](table, programs, codes, work.states, levels, **tile)

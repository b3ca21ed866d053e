"""Host side of the passes over long groups that find their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .histogram import BINS, bin_histogram
from .long_groups import STATES, sum_long_groups
from .plan import Part

REFITS = 2  # of an exact scale, by true sums where the histogram had bins
MOST_BINS = 1 << 22  # of all groups and copies


@dataclass(frozen=True)
class Workspace:
    """Memory between the passes over one part; torch's allocator keeps it from call to call."""

    w: Tensor | None
    d: Tensor | None
    codes: Tensor | None
    partial: Tensor  # [4, programs]: of each chunk
    states: Tensor  # [groups, STATES]
    counters: Tensor  # [2, groups, rounded up] int32, zero: active, tickets

    @classmethod
    def of(cls, part: Part, device: torch.device, keeps_d: bool, keeps_w: bool,
           keeps_codes: bool) -> Workspace:
        def scratch(wanted: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.empty(part.elements, dtype=dtype, device=device) if wanted else None

        return cls(scratch(keeps_w, torch.float32), scratch(keeps_d, torch.float32),
                   scratch(keeps_codes, torch.uint8),
                   torch.empty(4 * len(part.programs), device=device),
                   torch.empty(part.groups * STATES.value, device=device),
                   torch.zeros(2, -(-part.groups // 4) * 4, dtype=torch.int32, device=device))

    def sums(self) -> tuple[Tensor, ...]:
        """Arguments of every kernel that moves a scale."""
        return self.partial, self.states, self.counters[0], self.counters[1]


def copies_of(groups: int) -> int:
    """Copies of each histogram, so that programs seldom add to one address at once."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or n * groups * BINS.value <= MOST_BINS)


def settle(work: Workspace, table: Tensor, programs: Tensor, levels: tuple[float, ...], exact: bool,
           passes: int, tile: dict[str, Any]) -> None:
    """From the scales that a first pass left: ``passes`` alternations, or an exact search."""
    grid = (programs.numel(),)
    if exact:
        groups = work.counters.shape[1]
        copies = copies_of(groups)
        device = table.device
        bins = torch.zeros(groups * copies * BINS.value, dtype=torch.int64, device=device)
        suffix = torch.empty(groups * 2 * BINS.value, dtype=torch.float64, device=device)
        bin_histogram[grid](table, programs, work.w, work.d, work.states, work.counters[0],
                            work.counters[1], bins, suffix, copies, levels, **tile)
        passes = REFITS
    for _ in range(passes):
        sum_long_groups[grid](table, programs, work.w, work.d, None, *work.sums(), False, levels,
                              False, **tile)

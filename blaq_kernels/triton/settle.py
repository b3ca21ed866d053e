"""Host side of the passes over long groups that find their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from .alternate import ALONE
from .chunk_sums import RECORD
from .histogram import BINS, bin_histogram
from .long_groups import STATES, sum_long_groups
from .plan import Part

REFITS = 2  # of an exact scale, by true sums where the histogram had bins
MOST_BINS = 1 << 22  # of all groups and copies

_zeros: dict[tuple[torch.device, int], Tensor] = {}


def zeros(device: torch.device, count: int) -> Tensor:
    """Zeros, int32, that kernels leave zero: one array for all calls of a stream, which follow each
    other. A graph has its own, filled by the graph, for other streams may run beside it."""
    if devices.capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, devices.stream_of(device)
    found = _zeros.get(key)
    if found is None or found.numel() < count:
        found = _zeros[key] = torch.zeros(2 * count, dtype=torch.int32, device=device)
    return found


@dataclass(frozen=True)
class Workspace:
    """Memory between the passes over one part; torch's allocator keeps it from call to call."""

    w: Tensor | None
    d: Tensor | None
    codes: Tensor | None
    records: Tensor  # [programs, RECORD]
    runs: Tensor  # [programs, RECORD] float64, those of a run in the row of its first program
    states: Tensor  # [groups, STATES]
    active: Tensor | None  # [groups] int32, zero
    tickets: Tensor  # [programs + groups] int32, zero, and left so

    @classmethod
    def of(cls, part: Part, device: torch.device, keeps_d: bool, keeps_w: bool, keeps_codes: bool,
           searches: bool) -> Workspace:
        def scratch(wanted: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.empty(part.elements, dtype=dtype, device=device) if wanted else None

        programs = len(part.programs)
        return cls(scratch(keeps_w, torch.float32), scratch(keeps_d, torch.float32),
                   scratch(keeps_codes, torch.uint8),
                   torch.empty(programs * RECORD.value, device=device),
                   torch.empty(programs * RECORD.value, dtype=torch.float64, device=device),
                   torch.empty(part.groups * STATES.value, device=device),
                   torch.zeros(part.groups, dtype=torch.int32, device=device) if searches else None,
                   zeros(device, programs + part.groups))

    def sums(self) -> tuple[Tensor | None, ...]:
        """Arguments of every kernel that moves a scale."""
        return self.records, self.runs, self.states, self.active, self.tickets


def copies_of(groups: int) -> int:
    """Copies of each histogram, so that programs seldom add to one address at once."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or n * groups * BINS.value <= MOST_BINS)


def settle(work: Workspace, table: Tensor, programs: Tensor, levels: tuple[float, ...], exact: bool,
           passes: int, tile: dict[str, Any]) -> None:
    """From the scales that a first pass left: ``passes`` alternations, or an exact search."""
    grid = (programs.numel(),)
    if exact:
        groups = work.states.numel() // STATES.value
        copies = copies_of(groups)
        device = table.device
        bins = torch.zeros(groups * copies * BINS.value, dtype=torch.int64, device=device)
        suffix = torch.empty(groups * 2 * BINS.value, dtype=torch.float64, device=device)
        bin_histogram[grid](table, programs, work.w, work.d, work.states, work.active,
                            work.tickets, bins, suffix, copies, levels, **tile)
        passes = REFITS
    for _ in range(passes):
        sum_long_groups[grid](table, programs, work.w, work.d, None, *work.sums(), False, levels,
                              ALONE, False, **tile)

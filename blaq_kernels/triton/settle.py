"""Host side of the passes over long groups that find their scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_sums import RECORD
from .histogram import BINS, UNITS
from .plan import Part
from .workspace import zeros

MOST_BINS = 1 << 22  # of all groups and copies


@dataclass(frozen=True)
class Workspace:
    """Memory of the passes over one part; torch's allocator keeps it from call to call."""

    w: Tensor | None
    codes: Tensor | None
    records: Tensor  # [programs, RECORD]
    runs: Tensor  # [programs, RECORD] float64, those of a run in the row of its first program
    bins: Tensor | None  # [groups, copies, UNITS, BINS] int64, zero, and left so
    states: Tensor  # [groups]: scales
    tickets: Tensor  # [programs + groups] int32, zero, and left so
    copies: int

    @classmethod
    def of(cls, part: Part, device: torch.device, keeps_w: bool, keeps_codes: bool,
           searches: bool) -> Workspace:
        def scratch(wanted: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.empty(part.elements, dtype=dtype, device=device) if wanted else None

        programs, copies = len(part.programs), copies_of(part.groups)
        bins = part.groups * copies * UNITS.value * BINS.value
        return cls(scratch(keeps_w, torch.float32), scratch(keeps_codes, torch.uint8),
                   torch.empty(programs * RECORD.value, device=device),
                   torch.empty(programs * RECORD.value, dtype=torch.float64, device=device),
                   zeros(device, bins, torch.int64) if searches else None,
                   torch.empty(part.groups, device=device),
                   zeros(device, programs + part.groups, torch.int32), copies)


def copies_of(groups: int) -> int:
    """Copies of each histogram, so that programs seldom add to one address at once."""
    return next(n for n in (8, 4, 2, 1)
                if n == 1 or n * groups * UNITS.value * BINS.value <= MOST_BINS)

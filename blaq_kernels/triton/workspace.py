"""Memory that kernels find as they left it, kept from call to call: one for all calls of a stream,
which follow each other. A graph has its own, made and filled by the graph, for other streams may run
beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import device as devices

_zeros: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


def zeros(device: torch.device, count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that kernels leave zero."""
    if devices.capturing(device):
        return torch.zeros(count, dtype=dtype, device=device)
    key = device, devices.stream_of(device), dtype
    found = _zeros.get(key)
    if found is None or found.numel() < count:
        found = _zeros[key] = devices.kept_empty(count, dtype, device).zero_()
    return found


class Splits(NamedTuple):
    """Where programs leave their parts of a sum.

    Attributes:
        parts: float32, in any state.
        tickets: int32, one for each tile of sums, zero.
    """

    parts: Tensor
    tickets: Tensor


_splits: dict[tuple[torch.device, int], Splits] = {}


def splits_of(device: torch.device, parts: int, tickets: int) -> Splits:
    """Memory for at least so many parts and tickets."""
    if devices.capturing(device):
        return Splits(torch.empty(parts, device=device), zeros(device, tickets, torch.int32))
    key = device, devices.stream_of(device)
    found = _splits.get(key)
    if found is None or found.parts.numel() < parts or found.tickets.numel() < tickets:
        grown = found.parts if found else torch.empty(0)
        if grown.numel() < parts:
            grown = devices.kept_empty(parts, torch.float32, device)
        found = _splits[key] = Splits(grown, zeros(device, tickets, torch.int32))
    return found

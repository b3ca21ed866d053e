"""Tables that say what a launch works on, uploaded once and kept on the device from call to
call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import device as devices

KEPT = 64  # tables and maps: some eight for each list of an optimizer


class Part(Protocol):
    """Weights that are launched together.

    Attributes:
        indices: in the call's lists.
        table: int64 ``[weights, columns]``, the addresses first, which are zero.
        programs: which row of the table each program, or block, works on.
    """

    @property
    def indices(self) -> tuple[int, ...]: ...
    @property
    def table(self) -> np.ndarray: ...
    @property
    def programs(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Upload:
    """An array on a device, what it came from, and the stream that knows it to be there."""

    there: Tensor
    source: Tensor  # pinned; a graph that captured the copy reads it again with every replay
    stream: int
    part: Part  # whose id is in the key: must stay its own


class Tables:
    """Arrays on the device, kept by what is in them; the least recently used go first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, Upload] = OrderedDict()
        self._captured: dict[int, Upload] = {}

    def get(self, part: Part, device: torch.device, columns: Sequence[Sequence[int]],
            key: object = None) -> tuple[Tensor, Tensor]:
        """Table and program map of a part. ``columns``: the addresses, of whole lists, in the order
        of the table's columns; an empty one stays zero. ``key``: an object that stands for them,
        where comparing so many takes too long."""
        def table() -> np.ndarray:
            values = part.table.copy()
            for c, column in enumerate(columns):
                if column:
                    values[:, c] = [column[i] for i in part.indices]
            return values

        # The map is long and has no address: gradients that move from step to step leave it there.
        key = tuple(map(tuple, columns)) if key is None else key
        return (self._there((id(part), device, key), part, device, table),
                self._there((id(part), device), part, device, lambda: part.programs))

    def _there(self, key: object, part: Part, device: torch.device,
               values: Callable[[], np.ndarray]) -> Tensor:
        stream = devices.stream_of(device)
        found = self._kept.get(key)
        if devices.capturing(device):
            # A graph reads it as often as it is replayed, so it stays. One that the graph itself
            # uploads is not there before a replay: other calls must not find it.
            found = found or _upload(values(), device, stream, part)
            self._captured[id(found)] = found
            return found.there
        if found is None or found.stream != stream:  # another may not have waited for the copy
            found = self._kept[key] = _upload(values(), device, stream, part)
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found.there


def _upload(values: np.ndarray, device: torch.device, stream: int, part: Part) -> Upload:
    """A copy, without waiting for the device."""
    source = torch.from_numpy(values)
    if device.type != "cuda":
        return Upload(source, source, stream, part)
    source = source.pin_memory()
    return Upload(source.to(device, non_blocking=True), source, stream, part)


tables = Tables()

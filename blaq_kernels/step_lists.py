"""What the step ops do on a GPU before they launch: a list of weights is checked once, planned once
and then known by its addresses. Whose kernels run is the engine's to say: those of Triton, or of
CUDA C++."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import device as devices
from .flat import separate
from .rules import require
from .tables import KEPT, Part, tables
from .training_rules import check_flips

# (sizes, dtype, whether every address is a multiple of 16) of each.
Weights = tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]


@dataclass(slots=True)  # frozen, it would take 1.5 µs more to make
class Stage:
    """One call of a step op, its arguments checked; ``lists`` in the order of the table's
    columns."""

    lists: tuple[Sequence[Tensor], ...]
    lr: Tensor
    step: Tensor
    backtrack: Tensor | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    levels: tuple[float, ...]
    group_size: int
    max_iter: int
    exact: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    flips: Tensor | None = None

    @property
    def commits(self) -> bool:
        return self.backtrack is not None

    @property
    def blends(self) -> bool:
        return len(self.lists[2]) > 0


class Engine(Protocol):
    """Kernels of one kind."""

    def check_device(self, op: str, name: str, x: Tensor) -> None:
        """Raise ValueError unless the kernels can run where ``x`` is."""

    def plan(self, op: str, weights: Weights, group_size: int) -> tuple[Part, ...]:
        """The launches of a list; those of a weight without elements are none."""

    def launch(self, stage: Stage, part: Part, table: Tensor, programs: Tensor,
               scalars: Sequence[Tensor | None], kept: dict[Part, Any]) -> None:
        """Start one part's. ``scalars``: lr, step, backtrack, grad_scale, found_inf on the device.
        ``kept`` stays with the list and its settings."""


@dataclass(eq=False)
class Known:
    """Lists that have passed their rules.

    Attributes:
        shapes, dtypes: of every tensor; all are contiguous.
        addresses: of every list, in the order of the table's columns.
        parts: the launches.
        settings: those that have passed with these lists, and what an engine keeps for a part with
            them.
    """

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    addresses: list[list[int]]
    parts: tuple[Part, ...]
    settings: dict[object, dict[Part, Any]] = field(default_factory=dict)


_known: OrderedDict[object, Known] = OrderedDict()
NUMBERS = frozenset((float, int, str, type(None)))
MOST_SETTINGS = 64  # of a list: a schedule may change one with every step


def run(engine: Engine, op: str, rules: Callable[..., None], lists: Sequence[Sequence[Tensor]],
        rest: Sequence[Any], stage: Stage) -> None:
    """Raises what ``rules(*lists, *rest)`` raises, then launches the stage, part by part.

    Lists that have passed are known by addresses, layouts and dtypes, which is all that the rules
    look at: for 161 weights the rules take most of a call. Settings that have not been seen with
    them are looked at beside the first tensor of each list.
    """
    params = stage.lists[0]
    tensors = [x for tensors in stage.lists for x in tensors]
    # Hashed are numbers alone: to hash shapes and dtypes takes longer than to compare them.
    key = (engine, op, stage.group_size, params[0].device if params else None,
           *map(len, stage.lists), *map(Tensor.data_ptr, tensors))
    settings = (*[x if type(x) in NUMBERS else _setting(x) for x in rest], _setting(stage.flips),
                _value(stage.backtrack))
    known = _known.get(key)
    if known is not None and not (
            all(map(Tensor.is_contiguous, tensors))
            and known.shapes == [x.shape for x in tensors]
            and known.dtypes == [x.dtype for x in tensors]):
        known = None
    if known is None or settings not in known.settings:
        rules(*(lists if known is None else _firsts(lists, stage)), *rest)
        if stage.flips is not None:
            check_flips(op, stage.flips, len(params))
        if not params:
            return
        _check_devices(engine, op, stage)
        if known is None:
            known = _known[key] = _plan(engine, op, stage, tensors)
            if len(_known) > KEPT:  # the first come; to note each use would hash the key again
                _known.popitem(last=False)
        if len(known.settings) >= MOST_SETTINGS:
            known.settings.clear()
        known.settings[settings] = {}
    device, kept = params[0].device, known.settings[settings]
    here = [None if x is None else devices.on_same_device(x, device)
            for x in (stage.lr, stage.step, stage.backtrack, stage.grad_scale, stage.found_inf)]
    with devices.on_device_of(params[0]):
        if stage.flips is not None:
            stage.flips.zero_()
        for part in known.parts:
            table, programs = tables.get(part, device, known.addresses, known)
            engine.launch(stage, part, table, programs, here, kept)


def _firsts(lists: Sequence[Sequence[Tensor]], stage: Stage) -> list[Sequence[Tensor]]:
    """The first tensor of each list that the rules take: states are the last of them."""
    params = stage.lists[0]
    states = separate(params, stage.group_size, *stage.lists[3:])
    return [tensors[:1] for tensors in (*lists[:-len(states)], *states)]


def _setting(x: Any) -> Any:
    """What rules and compiled code depend on; of a scalar tensor not the value."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, x.is_contiguous()
    return tuple(x) if isinstance(x, list) else x


def _value(x: Tensor | None) -> float | None:
    """Of a scalar, where that takes no waiting: its rules look at it too."""
    return x.item() if x is not None and x.is_cpu and x.dim() == 0 else None


def _plan(engine: Engine, op: str, stage: Stage, tensors: list[Tensor]) -> Known:
    lists = (*stage.lists[:3], *separate(stage.lists[0], stage.group_size, *stage.lists[3:]))
    addresses = [[x.data_ptr() for x in tensors] for tensors in lists]
    weights = tuple(
        (tuple(p.shape), p.dtype, all(column[i] % 16 == 0 for column in addresses[:6] if column))
        for i, p in enumerate(stage.lists[0]))
    return Known([x.shape for x in tensors], [x.dtype for x in tensors], addresses,
                 engine.plan(op, weights, stage.group_size))


def _check_devices(engine: Engine, op: str, stage: Stage) -> None:
    params = stage.lists[0]
    engine.check_device(op, "params[0]", params[0])
    device = params[0].device
    for i, param in enumerate(params):
        require(param.device == device, op, f"params[{i}]", f"be on params[0]'s device {device}",
                param.device)
    scalars = {"lr": stage.lr, "step": stage.step, "backtrack": stage.backtrack,
               "grad_scale": stage.grad_scale, "found_inf": stage.found_inf}
    for name, x in scalars.items():
        ok = x is None or x.device == device or (x.device.type == "cpu" and x.dim() == 0)
        require(ok, op, name, f"be on params[0]'s device {device}", x.device if not ok else None)
    if stage.flips is not None:
        require(stage.flips.device == device, op, "flips", f"be on params[0]'s device {device}",
                stage.flips.device)

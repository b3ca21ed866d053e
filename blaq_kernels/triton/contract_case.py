"""One specialisation of a kernel, and what its machine code must keep to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """What ``python -m blaq_kernels.triton.contract`` compiles and counts.

    Attributes:
        name: one line of the table.
        kernel: the ``triton.jit`` function.
        types: type of every argument that is no constant, in Triton's words (``*fp32``, ``i64``);
            None for an argument that is not given.
        constants: value of every ``constexpr`` argument.
        elements: elements that one program works on.
        warps: warps of one program.
        budget: most instructions an element, in lane instructions: those of a thread divided by the
            elements of a thread.
        trips: how often the body of each loop counts, by where it begins; the last also for others.
        wide_loads: whether 128-bit global loads must be there.
        tensor_cores: whether HMMA or HGMMA must be there.
        divisible: arguments that are multiples of 16; all pointers and integers, if not given.
        stages: ``num_stages``.
        ticket: whether instructions are counted up to where programs end that take no last ticket: the
            rest is for one of 64, and one of a group.
        architectures: compute capabilities that it is launched on.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | None]
    constants: Mapping[str, Any]
    elements: int
    warps: int
    budget: float
    trips: tuple[int, ...] = (1,)
    wide_loads: bool = False
    tensor_cores: bool = False
    divisible: tuple[str, ...] | None = None
    stages: int = field(default=1)
    ticket: bool = False
    architectures: tuple[int, ...] = (80, 90, 100, 120)

"""The two step ops in Triton's kernels: what is launched for a part of a list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..step_lists import Stage, Weights
from . import launch
from .alternate import ALONE, AROUND, NEAR
from .long_groups import step_long_groups, write_long_groups
from .plan import Part, parts
from .settle import Workspace, copies_of
from .short_groups import step_short_groups

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Triton:
    """The engine of :mod:`..step_lists`."""

    def check_device(self, op: str, name: str, x: Tensor) -> None:
        launch.check_device(op, name, x)

    def plan(self, op: str, weights: Weights, group_size: int) -> tuple[Part, ...]:
        return parts(weights, group_size)

    def launch(self, stage: Stage, part: Part, table: Tensor, programs: Tensor,
               scalars: Sequence[Tensor | None], kept: dict[Part, Any]) -> None:
        if part not in kept:
            kept[part] = (_short if part.short else _Long)(stage, part)
        kept[part](table, programs, *scalars, stage.flips)


ENGINE = Triton()


def _hyper(stage: Stage) -> tuple[Any, ...]:
    """Arguments that every update kernel takes, from beta1 to clip."""
    clip = stage.clip if stage.commits and stage.clip > 0 else None
    moments = [x for beta in stage.betas
               for x in (beta, 1.0 - beta, math.log(beta) if beta > 0 else -math.inf)]
    return (*moments, stage.eps, stage.weight_decay, clip)


def _short(stage: Stage, part: Part) -> launch.Launch:
    return launch.Launch(
        step_short_groups, (len(part.programs), 1, 1), *_hyper(stage), stage.max_iter,
        TYPES[part.dtype], stage.commits, stage.blends, stage.levels, stage.exact, part.tile,
        part.widths, part.aligned, num_warps=part.warps)


class _Long:
    """The launches of long groups, and which memory they ask for between each other."""

    def __init__(self, stage: Stage, part: Part) -> None:
        several = len(stage.levels) > 1
        self._part, self._exact = part, stage.exact and several
        self._keeps_w, self._keeps_codes = not stage.commits, stage.flips is not None and several
        octaves = NEAR if self._exact else AROUND if several else ALONE
        grid, dtype = (len(part.programs), 1, 1), TYPES[part.dtype]
        self._step = launch.Launch(
            step_long_groups, grid, *_hyper(stage), stage.max_iter, dtype, stage.commits,
            stage.blends, stage.levels, octaves, self._exact, copies_of(part.groups), part.tile,
            part.aligned, num_warps=part.warps)
        self._write = launch.Launch(write_long_groups, grid, dtype, stage.commits, stage.levels,
                                    part.tile, part.aligned, num_warps=part.warps)

    def __call__(self, table: Tensor, programs: Tensor, *here: Tensor | None) -> None:
        work = Workspace.of(self._part, table.device, self._keeps_w, self._keeps_codes, self._exact)
        self._step(table, programs, *here, work.w, work.codes, work.records, work.runs, work.bins,
                   work.states, work.tickets)
        *_, found_inf, flips = here
        self._write(table, programs, found_inf, flips, work.w, work.codes, work.states)

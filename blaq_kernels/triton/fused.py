"""The two step ops in Triton's kernels: what is launched for a part of a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import step_lists
from ..step_lists import Stage, Weights
from . import launch
from .alternate import ALONE, AROUND, NEAR
from .long_groups import step_long_groups, write_long_groups
from .plan import Part, parts
from .settle import Workspace
from .short_groups import step_short_groups

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Triton:
    """The engine of :mod:`..step_lists`."""

    def check_device(self, op: str, name: str, x: Tensor) -> None:
        launch.check_device(op, name, x)

    def plan(self, op: str, weights: Weights, group_size: int) -> tuple[Part, ...]:
        return parts(weights, group_size)

    def launch(self, stage: Stage, part: Part, table: Tensor, programs: Tensor,
               scalars: Sequence[Tensor | None], kept: dict[Part, launch.Launch]) -> None:
        if not part.short:
            _run_long(stage, part, table, programs, scalars)
            return
        if part not in kept:
            kept[part] = _short(stage, part)
        kept[part](table, programs, *scalars, stage.flips)


ENGINE = Triton()


def run(op: str, rules: Callable[..., None], lists: Sequence[Sequence[Tensor]], rest: Sequence[Any],
        stage: Stage) -> None:
    step_lists.run(ENGINE, op, rules, lists, rest, stage)


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


def _run_long(stage: Stage, part: Part, table: Tensor, programs: Tensor,
              here: Sequence[Tensor | None]) -> None:
    several = len(stage.levels) > 1
    exact = stage.exact and several
    work = Workspace.of(part, table.device, not stage.commits, stage.flips is not None and several,
                        exact)
    octaves = NEAR if exact else AROUND if several else ALONE
    grid, dtype = (programs.numel(),), TYPES[part.dtype]
    tile = {"TILE": part.tile, "ALIGNED": part.aligned, "num_warps": part.warps}
    step_long_groups[grid](
        table, programs, *here, stage.flips, *_hyper(stage), stage.max_iter, work.w, work.codes,
        work.records, work.runs, work.bins, work.states, work.tickets, dtype, stage.commits,
        stage.blends, stage.levels, octaves, exact, work.copies, **tile)
    write_long_groups[grid](table, programs, here[-1], stage.flips, work.w, work.codes, work.states,
                            dtype, stage.commits, stage.levels, **tile)

"""The two step ops in CUDA C++: long groups in the kernels of csrc/cuda/step_kernel.h, short ones
in Triton's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cuda
from ..rules import require
from ..step_lists import Engine, Stage, Weights
from ..tables import Part
from . import call, plan


class Cuda:
    """The engine of :mod:`..step_lists`."""

    def check_device(self, op: str, name: str, x: Tensor) -> None:
        there = call.emulation is not None or (x.is_cuda and cuda.covers(x.device))
        require(there, op, name, "be on a CUDA device that the kernels have code for", x.device)

    def plan(self, op: str, weights: Weights, group_size: int) -> tuple[Part, ...]:
        long = tuple((i, *weight) for i, weight in enumerate(weights)
                     if plan.is_long(weight[0], group_size))
        short: tuple[Part, ...] = ()
        if any(plan.is_short(sizes, group_size) for sizes, _, _ in weights):
            short = tuple(p for p in _triton().plan(op, weights, group_size) if p.short)
        return (*plan.parts(long, group_size), *short)

    def launch(self, stage: Stage, part: Part, table: Tensor, programs: Tensor,
               scalars: Sequence[Tensor | None], kept: dict[Part, Any]) -> None:
        if not isinstance(part, plan.Part):
            _triton().launch(stage, part, table, programs, scalars, kept)
            return
        lr, step, backtrack, grad_scale, found_inf = scalars
        op = "fused_step" if stage.commits else "fused_trial"
        several, flips = len(stage.levels) > 1, stage.flips is not None
        doubles = sum(1 << bit for bit, x in enumerate((lr, step, backtrack))
                      if x is not None and x.dtype == torch.float64)
        beta1, beta2 = stage.betas
        call.run(table, {
            **call.maps(part, table, programs),
            **call.scratch(part, table.device, op, several, flips), "op": call.OPS.index(op),
            "lr": lr, "step": step, "backtrack": backtrack, "grad_scale": grad_scale,
            "found_inf": found_inf, "doubles": doubles, "max_iter": stage.max_iter,
            "exact": stage.exact, "flips": stage.flips, "beta1": beta1, "beta2": beta2,
            "log_beta1": call.log_of(beta1), "log_beta2": call.log_of(beta2), "eps": stage.eps,
            "weight_decay": stage.weight_decay, "clip": stage.clip if stage.commits else 0.0,
        }, stage.levels)


def _triton() -> Engine:
    from ..triton import fused

    return fused.ENGINE


ENGINE = Cuda()

"""Cases of the training ops: the fused steps against AdamW, the equations against eager torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blaq_kernels import flat, reference

from ..optim import BLAQ as BLAQOptimizer
from .case import BLAQ, Case, Table, Variant

__all__ = ["ADAMW", "COMPILED", "TABLES"]

ADAMW = "AdamW(fused=True)"
COMPILED = "reference, compiled"
REFERENCE = "reference"
BACKTRACK = 0.6
HYPER: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01,
                         "clip": 1.0}
LR = 1e-3
STALE = 1.01
"""Scales start 1 % off their optimum, as a step of training leaves them: an alternation that began
at its end would have nothing to do."""

Lists = dict[str, list[Tensor]]


def make_state(case: Case) -> Lists:
    """Tensor lists that the step ops take, in a state that training could have reached."""
    count, elements = case.size
    ops = torch.ops.blaq
    lists: Lists = {name: [] for name in ("params", "grads", "trial_grads", "latents", "exp_avgs",
                                          "exp_avg_sqs", "scales")}
    for _ in range(count):
        latent = torch.randn(elements) * 0.3
        codes, scale = ops.solve(latent, torch.ones(elements), None, case.levels, case.group_size,
                                 5, "alternating")
        lists["latents"].append(latent)
        lists["scales"].append(scale * STALE)
        param = reference.dequantize(codes, scale, case.levels, case.group_size)
        lists["params"].append(param.to(case.torch_dtype))
        for name in ("grads", "trial_grads"):
            lists[name].append((torch.randn(elements) * 1e-2).to(case.torch_dtype))
        lists["exp_avgs"].append(torch.randn(elements) * 1e-3)
        lists["exp_avg_sqs"].append(torch.rand(elements) * 1e-4)
    return lists


def _flattened(state: Lists) -> Lists:
    """The same, as the optimizer keeps it: each state in one tensor for all weights."""
    def whole(tensors: list[Tensor]) -> list[Tensor]:
        joined = flat.joined(flat.join(tensors))
        return tensors if joined is None else [joined]

    return state | {name: whole(state[name]) for name in flat.STATES}


def _tail(case: Case) -> dict[str, Any]:
    return {**HYPER, "levels": case.levels, "group_size": case.group_size, "max_iter": 5,
            "method": case.method, "lr": torch.tensor(LR), "step": torch.tensor(100.0)}


def _trial(op: Callable[..., None], state: Lists, case: Case) -> Callable[[], None]:
    lists = {name: tensors for name, tensors in state.items() if name != "trial_grads"}
    return partial(op, **lists, **_tail(case))


def _step(op: Callable[..., None], state: Lists, case: Case) -> Callable[[], None]:
    flips = torch.zeros(len(state["params"]), dtype=torch.int64)
    return partial(op, **state, **_tail(case), backtrack=torch.tensor(BACKTRACK), flips=flips)


def _both(trial: Callable[[], object], step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        trial()
        step()

    return run


def _with_grads(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(tensor.clone()) for tensor in tensors]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _adamw(state: Lists) -> Variant:
    params = _with_grads(state["params"], state["grads"])
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=HYPER["weight_decay"], fused=True)
    size = params[0].element_size()  # its moments have the params' dtype
    return Variant(ADAMW, optimizer.step, 7 * size * sum(p.numel() for p in params))


def _optimizer(case: Case, state: Lists) -> Variant:
    """The whole optimizer, with its checks for non-finite gradients."""
    params = _with_grads([w.to(case.torch_dtype) for w in state["latents"]], state["grads"])
    groups = [{"params": params, "bits": case.bits}]
    optimizer = BLAQOptimizer(groups, lr=LR, backtrack=BACKTRACK, group_size=case.group_size,
                              method=case.method or "alternating", clip=HYPER["clip"],
                              weight_decay=HYPER["weight_decay"])
    return Variant("blaq.BLAQ", _both(optimizer.trial_step, optimizer.step))


def _fused(parts: str, case: Case, full: bool) -> list[Variant]:
    """``parts``: ``trial``, ``step`` or ``both``. Least traffic for each element: the trial reads a
    gradient and three float32 states and writes a param; the step reads one gradient more and
    writes the states too."""
    def variant(name: str, trial: Callable[..., None], step: Callable[..., None]) -> Variant:
        state = make_state(case) if name != BLAQ else _flattened(make_state(case))
        calls = {"trial": _trial(trial, state, case), "step": _step(step, state, case)}
        calls["both"] = _both(calls["trial"], calls["step"])
        return Variant(name, calls[parts], nbytes if name == BLAQ else 0)

    size = torch.empty(0, dtype=case.torch_dtype).element_size()
    each = {"trial": 2 * size + 12, "step": 3 * size + 24, "both": 5 * size + 36}[parts]
    nbytes = each * case.size[0] * case.size[1]
    ops = torch.ops.blaq
    variants = [variant(BLAQ, ops.fused_trial.default, ops.fused_step.default)]
    if parts == "both":
        variants.append(_optimizer(case, make_state(case)))
    variants.append(_adamw(make_state(case)))
    if full:
        variants.append(variant(COMPILED, torch.compile(reference.fused_trial),
                                torch.compile(reference.fused_step)))
    return variants


def _scaled_update(case: Case, full: bool) -> list[Variant]:
    latent, grad, curvature = (0.5 + torch.rand(case.size, dtype=case.torch_dtype)
                               for _ in range(3))
    op, nbytes = torch.ops.blaq.scaled_update.default, 4 * latent.nbytes
    variants = [Variant(BLAQ, lambda: op(latent, grad, curvature), nbytes),
                Variant("latent - grad / curvature", lambda: latent - grad / curvature),
                Variant("torch.addcdiv", lambda: torch.addcdiv(latent, grad, curvature, value=-1),
                        nbytes)]
    if full:
        compiled = torch.compile(reference.scaled_update)
        variants.append(Variant(COMPILED, lambda: compiled(latent, grad, curvature), nbytes))
    return variants


def _blend(case: Case, full: bool) -> list[Variant]:
    current, trial = (torch.rand(case.size, dtype=case.torch_dtype) for _ in range(2))
    op, nbytes, a = torch.ops.blaq.blend.default, 3 * current.nbytes, BACKTRACK
    variants = [Variant(BLAQ, lambda: op(current, trial, a), nbytes),
                Variant("a * current + (1 - a) * trial", lambda: a * current + (1 - a) * trial),
                Variant("torch.lerp", lambda: torch.lerp(trial, current, a), nbytes)]
    if full:
        compiled = torch.compile(reference.blend)
        variants.append(Variant(COMPILED, lambda: compiled(current, trial, a), nbytes))
    return variants


def _solve(case: Case, full: bool) -> list[Variant]:
    latent, curvature = torch.randn(case.size), torch.rand(case.size) + 0.01
    nbytes = latent.nbytes + curvature.nbytes + latent.numel()

    def variant(name: str, solve: Callable[..., object]) -> Variant:
        return Variant(name, partial(solve, latent, curvature, None, case.levels, case.group_size,
                                     10, case.method), nbytes)

    variants = [variant(BLAQ, torch.ops.blaq.solve.default), variant(REFERENCE, reference.solve)]
    if full:
        variants.append(variant(COMPILED, torch.compile(reference.solve)))
    return variants


_LISTS: dict[str, Any] = {
    "dims": ("TENSORS", "ELEMENTS"), "sizes": ((16, 625_000), (200, 100)),
    "axes": {"dtype": ("float32",), "bits": (1, 2, 4), "group_size": (0,),
             "method": ("alternating", "exact")}}
_ELEMENTS: dict[str, Any] = {
    "dims": ("ELEMENTS",), "sizes": ((10_000,), (1_000_000,), (10_000_000,)),
    "axes": {"dtype": ("float32",)}}

TABLES = {table.op: table for table in (
    Table("fused_trial", build=partial(_fused, "trial"), **_LISTS),
    Table("fused_step", build=partial(_fused, "step"), **_LISTS),
    Table("trial_and_step", build=partial(_fused, "both"), ops=("fused_trial", "fused_step"),
          **_LISTS),
    Table("scaled_update", build=_scaled_update, **_ELEMENTS),
    Table("blend", build=_blend, **_ELEMENTS),
    Table("solve", ("N", "K"), ((256, 256), (1024, 1024)), _solve,
          axes={"bits": (1, 2, 4), "group_size": (0,), "method": ("alternating", "exact")}),
)}

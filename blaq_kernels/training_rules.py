"""Argument rules of the ops that train: ``scaled_update``, ``blend``, ``solve``, ``fused_trial``,
``fused_step``, ``fake_quantize``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import flat
from .codebook import check_levels
from .flat import STATES, is_flat, state_shapes
from .rules import (
    FLOAT_DTYPES,
    METHODS,
    PARAM_DTYPES,
    check_contiguous,
    check_dtype,
    check_group_size,
    check_like,
    check_scale,
    is_real,
    require,
)

MAX_FAKE_QUANTIZE_LEVELS = 128  # 8 bits: sign and 7 bits of index


def check_scaled_update(latent: Tensor, grad: Tensor, curvature: Tensor) -> None:
    op = "scaled_update"
    check_dtype(op, "latent", latent, FLOAT_DTYPES)
    check_contiguous(op, "latent", latent)
    check_like(op, "grad", grad, "latent", latent, (latent.dtype,))
    check_like(op, "curvature", curvature, "latent", latent, (latent.dtype,))


def check_blend(current: Tensor, trial: Tensor, backtrack: float) -> None:
    op = "blend"
    check_dtype(op, "current", current, FLOAT_DTYPES)
    check_contiguous(op, "current", current)
    check_like(op, "trial", trial, "current", current, (current.dtype,))
    require(0.0 < backtrack <= 1.0, op, "backtrack", "be in (0, 1]", backtrack)


def _check_solver(op: str, levels: Sequence[float], group_size: int, max_iter: int,
                  method: str) -> None:
    check_levels(op, levels)
    check_group_size(op, group_size)
    require(max_iter >= 1, op, "max_iter", "be at least 1", max_iter)
    require(method in METHODS, op, "method", "be 'alternating' or 'exact'", repr(method))


def check_solve(latent: Tensor, curvature: Tensor, init_scale: Tensor | None,
                levels: Sequence[float], group_size: int, max_iter: int, method: str) -> None:
    op = "solve"
    check_dtype(op, "latent", latent, (torch.float32,))
    check_contiguous(op, "latent", latent)
    check_like(op, "curvature", curvature, "latent", latent, (torch.float32,))
    _check_solver(op, levels, group_size, max_iter, method)
    if init_scale is not None:
        check_scale(op, "init_scale", init_scale, latent.shape, group_size, (torch.float32,),
               latent.device)
    for name, x in (("latent", latent), ("curvature", curvature)):
        if is_real(x):
            bad = x[~x.isfinite()]
            require(bad.numel() == 0, op, name, "be finite", bad[:1].tolist())
    if is_real(latent) and is_real(curvature) and latent.numel():  # sums of curvature × latent stay finite
        steepest = curvature.abs().max().item()
        require(max(1.0, latent.abs().max().item()) * steepest < 2.0**120, op, "curvature",
                "stay below 2^120 / max(1, |latent|)", steepest)


def _check_step_scalars(op: str, lr: Tensor, step: Tensor, beta1: float, beta2: float, eps: float,
                        weight_decay: float, clip: float) -> None:
    for name, value in (("lr", lr), ("step", step)):
        check_dtype(op, name, value, (torch.float32, torch.float64))
        require(value.dim() == 0, op, name, "be a 0-dim tensor", list(value.shape))
    require(0.0 <= beta1 < 1.0, op, "beta1", "be in [0, 1)", beta1)
    require(0.0 <= beta2 < 1.0, op, "beta2", "be in [0, 1)", beta2)
    require(eps >= 0.0, op, "eps", "be at least 0", eps)
    require(weight_decay >= 0.0, op, "weight_decay", "be at least 0", weight_decay)
    require(clip >= 0.0, op, "clip", "be at least 0 (0 is off)", clip)


def _check_flat(op: str, name: str, x: Tensor, size: int, device: torch.device) -> None:
    check_dtype(op, name, x, (torch.float32,))
    require(tuple(x.shape) == (size,), op, name, f"have shape [{size}] for all params",
            list(x.shape))
    require(x.device == device, op, name, f"be on params[0]'s device {device}", x.device)
    check_contiguous(op, name, x)


def _check_lists(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    params = lists["params"]
    for name, tensors in lists.items():
        require(len(tensors) == len(params), op, name, f"have as many tensors as params ({len(params)})",
                len(tensors))
    for i, param in enumerate(params):
        check_dtype(op, f"params[{i}]", param, PARAM_DTYPES)
        check_contiguous(op, f"params[{i}]", param)
        for name, tensors in lists.items():
            if name in ("grads", "trial_grads"):
                check_like(op, f"{name}[{i}]", tensors[i], f"params[{i}]", param, (param.dtype,))
            elif name not in ("params", "scales"):
                check_like(op, f"{name}[{i}]", tensors[i], f"params[{i}]", param, (torch.float32,))


def _check_overlap(op: str, written: dict[str, Sequence[Tensor]],
                   read: dict[str, Sequence[Tensor]]) -> None:
    """No written tensor may share memory with another tensor of the call (real tensors only)."""
    spans = []
    for writes, lists in ((True, written), (False, read)):
        for name, tensors in lists.items():
            for i, x in enumerate(tensors):
                if x.numel():
                    start = x.data_ptr()
                    spans.append((start, start + x.numel() * x.element_size(), writes, f"{name}[{i}]"))
    spans.sort(key=lambda span: span[0])
    reach = None
    for span in spans:
        if reach is not None and span[0] < reach[1] and (span[2] or reach[2]):
            require(False, op, span[3], "not overlap another tensor of the call", reach[3])
        if reach is None or span[1] > reach[1]:
            reach = span


def _check_fused(op: str, written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor]],
                 levels: Sequence[float], group_size: int, grad_scale: Tensor | None,
                 found_inf: Tensor | None) -> None:
    lists = {**written, **read}
    params = lists["params"]
    for name in STATES:
        if is_flat(lists[name], params):
            shapes = state_shapes(name, params, group_size)
            _check_flat(op, f"{name}[0]", lists[name][0], flat.length(shapes), params[0].device)
            lists[name] = flat.split(lists[name][0], shapes)
    _check_lists(op, lists)
    for i, (param, scale) in enumerate(zip(lists["params"], lists["scales"], strict=True)):
        check_scale(op, f"scales[{i}]", scale, param.shape, group_size, (torch.float32,), param.device)
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None:
            check_dtype(op, name, value, (torch.float32,))
            require(value.numel() == 1, op, name, "have one element", value.numel())
    if all(is_real(x) for x in lists["params"]):
        _check_overlap(op, written, read)


def check_fused_trial(params, grads, latents, exp_avgs, exp_avg_sqs, scales, lr, step, beta1, beta2,
                      eps, weight_decay, clip, levels, group_size, max_iter, method,
                      grad_scale=None, found_inf=None) -> None:
    op = "fused_trial"
    _check_step_scalars(op, lr, step, beta1, beta2, eps, weight_decay, clip)
    _check_solver(op, levels, group_size, max_iter, method)
    read = {"grads": grads, "latents": latents, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
            "scales": scales}
    _check_fused(op, {"params": params}, read, levels, group_size, grad_scale, found_inf)


def check_fused_step(params, grads, trial_grads, latents, exp_avgs, exp_avg_sqs, scales, lr, step,
                     backtrack, beta1, beta2, eps, weight_decay, clip, levels, group_size, max_iter,
                     method, grad_scale=None, found_inf=None, flips=None) -> None:
    op = "fused_step"
    _check_step_scalars(op, lr, step, beta1, beta2, eps, weight_decay, clip)
    check_dtype(op, "backtrack", backtrack, (torch.float32, torch.float64))
    require(backtrack.dim() == 0, op, "backtrack", "be a 0-dim tensor", list(backtrack.shape))
    if is_real(backtrack) and backtrack.device.type == "cpu":
        value = backtrack.item()
        require(0.0 < value <= 1.0, op, "backtrack", "be in (0, 1]", value)
        require(len(trial_grads) > 0 or value == 1.0 or not params, op, "trial_grads",
                "be given where backtrack < 1", "none")
    _check_solver(op, levels, group_size, max_iter, method)
    read = {"grads": grads} | ({"trial_grads": trial_grads} if len(trial_grads) else {})
    written = {"params": params, "latents": latents, "exp_avgs": exp_avgs,
               "exp_avg_sqs": exp_avg_sqs, "scales": scales}
    _check_fused(op, written, read, levels, group_size, grad_scale, found_inf)
    if flips is not None:
        check_flips(op, flips, len(params))


def check_flips(op: str, flips: Tensor, count: int) -> None:
    check_dtype(op, "flips", flips, (torch.int64,))
    require(tuple(flips.shape) == (count,), op, "flips", f"have shape [{count}]", list(flips.shape))
    check_contiguous(op, "flips", flips)


def check_fake_quantize(latent: Tensor, scale: Tensor, levels: Sequence[float],
                        group_size: int) -> None:
    op = "fake_quantize"
    check_dtype(op, "latent", latent, FLOAT_DTYPES)
    check_contiguous(op, "latent", latent)
    check_levels(op, levels, MAX_FAKE_QUANTIZE_LEVELS)
    check_group_size(op, group_size)
    wide = torch.float64 if latent.dtype == torch.float64 else torch.float32
    check_scale(op, "scale", scale, latent.shape, group_size, (wide,), latent.device)

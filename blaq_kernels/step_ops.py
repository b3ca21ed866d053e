"""``fused_trial`` and ``fused_step`` on a GPU, whichever engine's kernels run: the two stages of
BLAQ (AAAI 2024) for a list of weights, Eqs. 6 and 5, and Eqs. 9, 10, 8 and 7."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .step_lists import Engine, Stage, run
from .training_rules import check_fused_step, check_fused_trial


def fused_trial(engine: Engine, params: Sequence[Tensor], grads: Sequence[Tensor],
                latents: Sequence[Tensor], exp_avgs: Sequence[Tensor],
                exp_avg_sqs: Sequence[Tensor], scales: Sequence[Tensor], lr: Tensor, step: Tensor,
                beta1: float, beta2: float, eps: float, weight_decay: float, clip: float,
                levels: Sequence[float], group_size: int, max_iter: int, method: str,
                grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """Writes the trial weights ω̂* into ``params`` and changes nothing else; nothing at all where
    ``found_inf`` is set. ``clip`` has no part in stage 1.

    Args:
        params: written; float32, bfloat16 or float16, contiguous, on one device.
        grads: as the params. latents, exp_avgs, exp_avg_sqs: float32 of the same shapes.
        scales: float32 ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``: where the alternation begins.
            Each of these four may be one tensor for all params (flat.py).
        lr, step, grad_scale, found_inf: read on the device, when the kernel runs.

    Raises:
        ValueError: an argument breaks a rule; the message names it, and nothing has changed.
    """
    rest = (lr, step, beta1, beta2, eps, weight_decay, clip, levels, group_size, max_iter, method,
            grad_scale, found_inf)
    checked = (params, grads, latents, exp_avgs, exp_avg_sqs, scales)
    lists = (params, grads, (), latents, exp_avgs, exp_avg_sqs, scales)
    run(engine, "fused_trial", check_fused_trial, checked, rest, Stage(
        lists, lr, step, None, (beta1, beta2), eps, weight_decay, clip, tuple(levels), group_size,
        max_iter, method == "exact", grad_scale, found_inf))


def fused_step(engine: Engine, params: Sequence[Tensor], grads: Sequence[Tensor],
               trial_grads: Sequence[Tensor], latents: Sequence[Tensor],
               exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], scales: Sequence[Tensor],
               lr: Tensor, step: Tensor, backtrack: Tensor, beta1: float, beta2: float, eps: float,
               weight_decay: float, clip: float, levels: Sequence[float], group_size: int,
               max_iter: int, method: str, grad_scale: Tensor | None = None,
               found_inf: Tensor | None = None, flips: Tensor | None = None) -> None:
    """Blends, commits moments, latents and scales, and writes ω̂ into ``params``.
 Without ``trial_grads``, or where ``backtrack`` is 1 when the kernel runs, it is LAQ. Where
    ``found_inf`` is set nothing changes but ``params``, which go back to the codes of (latent,
    scale).

    Args:
        params, latents, exp_avgs, exp_avg_sqs, scales: written; dtypes and shapes as `fused_trial`.
        grads, trial_grads: as the params; ``trial_grads`` may be empty.
        lr, step, backtrack, grad_scale, found_inf: read on the device, when the kernel runs.
        flips: int64 ``[len(params)]``: receives the number of codes that this step changed.

    Raises:
        ValueError: an argument breaks a rule; the message names it, and nothing has changed.
    """
    lists = (params, grads, trial_grads, latents, exp_avgs, exp_avg_sqs, scales)
    rest = (lr, step, backtrack, beta1, beta2, eps, weight_decay, clip, levels, group_size,
            max_iter, method, grad_scale, found_inf)
    run(engine, "fused_step", check_fused_step, lists, rest, Stage(
        lists, lr, step, backtrack, (beta1, beta2), eps, weight_decay, clip, tuple(levels),
        group_size, max_iter, method == "exact", grad_scale, found_inf, flips))

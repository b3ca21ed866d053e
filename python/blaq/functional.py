"""The ops of ``torch.ops.blaq`` as typed Python functions: the same kernels, one name lookup less.

Shapes: a weight is ``[N, K]`` (a conv weight counts as ``[out, in·kh·kw]``, a vector as one row).
``group_size`` 0 is one scale for the tensor, -1 one for each row, g > 0 one for each g inputs of a
row; ``scale`` is then ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``. ``levels`` are a codebook's
ascending magnitudes, the largest 1.0 (:func:`blaq.levels_of`). Equations are BLAQ's (arXiv
2401.16760).

A broken rule raises ``blaq.<op>: <argument> must <rule>, got <value>`` before anything is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import blaq_kernels  # noqa: F401  (defines torch.ops.blaq)

__all__ = ["binary_conv2d", "binary_linear", "binary_repack", "blend", "conv_repack", "fake_quantize", "fused_step",
           "fused_trial", "pack", "packed_conv2d", "packed_linear", "repack", "scaled_update", "solve", "unpack",
           "unrepack"]

_ops = torch.ops.blaq


def scaled_update(latent: Tensor, grad: Tensor, curvature: Tensor) -> Tensor:
    """Eqs. 6 and 8: ``latent - grad / curvature``, elementwise.

    Args:
        latent: floating point, any shape, contiguous.
        grad: like ``latent``.
        curvature: like ``latent``, positive: D = (sqrt(v̂) + eps) / lr.
    """
    return _ops.scaled_update.default(latent, grad, curvature)


def blend(current: Tensor, trial: Tensor, backtrack: float) -> Tensor:
    """Eqs. 9 and 10: ``backtrack · current + (1 - backtrack) · trial``.

    Args:
        current: floating point, any shape, contiguous: gradient or curvature at ω̂.
        trial: like ``current``: the same at the trial weights.
        backtrack: the paper's a, in (0, 1]; 1 returns ``current``.
    """
    return _ops.blend.default(current, trial, backtrack)


def solve(latent: Tensor, curvature: Tensor, levels: Sequence[float], group_size: int = 0,
          init_scale: Tensor | None = None, max_iter: int = 5,
          method: str = "alternating") -> tuple[Tensor, Tensor]:
    """Eqs. 5 and 7: codes and scale that minimise ``½ Σ d (w - scale · level)²``, group by group.

    Args:
        latent: float32, ``[N, ...]``, contiguous.
        curvature: like ``latent``: the weights d; values below 1e-8 count as 1e-8.
        levels: 1 to 8 magnitudes.
        init_scale: float32, shape of ``scale``: warm start; None: the weighted mean of |w|.
        max_iter: most alternations; no part at 1 bit and for ``exact``.
        method: ``alternating`` (the paper's) or ``exact`` (the global minimum, within 0.1 %).

    Returns:
        codes, uint8, like ``latent``; scale, float32.
    """
    return _ops.solve.default(latent, curvature, init_scale, levels, group_size, max_iter, method)


def fused_trial(params: Sequence[Tensor], grads: Sequence[Tensor], latents: Sequence[Tensor],
                exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
                scales: Sequence[Tensor], *, lr: Tensor, step: Tensor, beta1: float, beta2: float,
                eps: float, weight_decay: float, clip: float, levels: Sequence[float],
                group_size: int, max_iter: int, method: str, grad_scale: Tensor | None = None,
                found_inf: Tensor | None = None) -> None:
    """Stage 1 for a list of tensors: writes the trial weights ω̂* = solve(ω*, D), nothing else.

    Args:
        params: float32, bfloat16 or float16, contiguous; **written**.
        grads: like ``params``: gradients at ω̂.
        latents, exp_avgs, exp_avg_sqs: float32, shapes of ``params``: ω, m, v before this step.
        scales: float32: warm start of the solve. Each of these four may be one flat tensor instead,
            for all params (blaq_kernels/flat.py): a call costs less.
        lr, step: 0-dim, float32 or float64; ``step`` counts this step, from 1.
        beta1, beta2, eps, weight_decay: AdamW's; the decay is decoupled.
        clip: no part in stage 1.
        grad_scale, found_inf: as in torch's fused Adam; with ``found_inf`` set nothing is written.
    """
    _ops.fused_trial.default(params, grads, latents, exp_avgs, exp_avg_sqs, scales, lr, step, beta1,
                             beta2, eps, weight_decay, clip, levels, group_size, max_iter, method,
                             grad_scale, found_inf)


def fused_step(params: Sequence[Tensor], grads: Sequence[Tensor], trial_grads: Sequence[Tensor],
               latents: Sequence[Tensor], exp_avgs: Sequence[Tensor],
               exp_avg_sqs: Sequence[Tensor], scales: Sequence[Tensor], *, lr: Tensor, step: Tensor,
               backtrack: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
               clip: float, levels: Sequence[float], group_size: int, max_iter: int, method: str,
               grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
               flips: Tensor | None = None) -> None:
    """Stage 2 for a list of tensors: Eqs. 9, 10, 8, 7; without ``trial_grads`` a step of LAQ.

    Args:
        params, latents, exp_avgs, exp_avg_sqs, scales: as in :func:`fused_trial`; all **written**.
        grads: like ``params``: gradients at ω̂.
        trial_grads: like ``params``: gradients at the trial weights; empty for LAQ.
        backtrack: 0-dim, float32 or float64: the paper's a, in (0, 1].
        clip: latents stay in [-clip, clip]; 0 is off.
        grad_scale, found_inf: as in torch's fused Adam; with ``found_inf`` set nothing changes but
            for ``params``, which return from trial weights to the codes of (latent, scale).
        flips: int64, ``[len(params)]``; **written**: codes that this step changed.
    """
    _ops.fused_step.default(params, grads, trial_grads, latents, exp_avgs, exp_avg_sqs, scales, lr,
                            step, backtrack, beta1, beta2, eps, weight_decay, clip, levels,
                            group_size, max_iter, method, grad_scale, found_inf, flips)


def fake_quantize(latent: Tensor, scale: Tensor, levels: Sequence[float],
                  group_size: int = 0) -> Tensor:
    """Nearest level × scale, rounded once to ``latent``'s dtype.

    The gradient passes straight through to ``latent``; to ``scale`` it is exact for held codes.

    Args:
        latent: floating point, ``[N, ...]``, contiguous.
        scale: float32 (float64 for a float64 ``latent``), positive.
        levels: 1 to 128 magnitudes.
    """
    return _ops.fake_quantize.default(latent, scale, levels, group_size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit planes, uint8 ``[bits, N, ceil(K/8)]``, of codes, uint8 ``[N, ...]``, contiguous."""
    return _ops.pack.default(codes, bits)


def unpack(qweight: Tensor, scale: Tensor, levels: Sequence[float], group_size: int,
           in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight ``[N, in_features]``: level × scale, rounded once to ``dtype``.

    Args:
        qweight: uint8, ``[bits, N, ceil(in_features/8)]``, contiguous.
        scale: float32 or float64.
    """
    return _ops.unpack.default(qweight, scale, levels, group_size, in_features, dtype)


def repack(qweight: Tensor) -> Tensor:
    """The weight in the order that fast CPU kernels read; made once, never saved.

    Args:
        qweight: uint8, ``[bits, N, ceil(K/8)]``, contiguous.

    Returns:
        uint8, one dimension: about as many bytes as ``qweight`` (a third more for 3 bits).
    """
    return _ops.repack.default(qweight)


def packed_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  levels: Sequence[float], group_size: int = 0, repacked: Tensor | None = None,
                  accuracy: str = "high") -> Tensor:
    """``input @ weight.T + bias`` from a bit-packed weight; gradients to input, scale and bias.

    Args:
        input: ``[..., K]``, floating point.
        qweight: uint8, ``[bits, N, ceil(K/8)]``, contiguous.
        scale: float32 (float64 for a float64 ``input``).
        bias: ``[N]``, dtype of ``input``.
        repacked: :func:`repack` of ``qweight``; without it every kernel is exact. On the CPU it may stand
            for a ``qweight`` of ``[bits, N, 0]``.
        accuracy: error that a kernel may make, relative, on Gaussian data: ``exact`` (that of
            float32), ``high`` (4e-4, less than bfloat16's) or ``fast`` (1e-2: 8-bit inputs). A
            processor or codebook without such a kernel is served by a more exact one.

    Returns:
        ``[..., N]``, dtype of ``input``.
    """
    return _ops.packed_linear.default(input, qweight, scale, bias, levels, group_size, repacked,
                                      accuracy)


def packed_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                  stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
                  dilation: Sequence[int] = (1, 1), groups: int = 1, repacked: Tensor | None = None,
                  accuracy: str = "high", relu: bool = False) -> Tensor:
    """``conv2d`` with a bit-packed weight ``[out, in/groups · kh · kw]``.

    Args:
        input: ``[batch, channels, height, width]``, floating point, contiguous or channels-last.
        qweight: uint8, ``[bits, out, ceil(K/8)]``, contiguous.
        scale: float32 (float64 for a float64 ``input``).
        bias: ``[out]``, dtype of ``input``.
        repacked: :func:`conv_repack` of ``qweight``, or its :func:`repack` where ``group_size`` > 0;
            without it every kernel is exact. On the CPU it may stand for a ``qweight`` of
            ``[bits, out, 0]``.
        accuracy: as :func:`packed_linear` has it.
        relu: whether negative results become 0.
    """
    return _ops.packed_conv2d.default(input, qweight, scale, bias, levels, group_size, kernel_size,
                                      stride, padding, dilation, groups, repacked, accuracy, relu)


def conv_repack(qweight: Tensor, in_features: int, taps: int = 1, groups: int = 1) -> Tensor:
    """A convolution's weight in the order that fast CPU kernels read; made once, never saved.

    Args:
        qweight: uint8, ``[bits, N, ceil(in_features/8)]``, contiguous.
        taps: ``kh · kw``; they divide ``in_features``.
        groups: of the convolution.

    Returns:
        uint8, ``[groups, ceil(N/groups/16), taps, registers, 64]``: as many bytes as ``qweight`` (a third
        more for 3 bits) where channels are a multiple of 32 and outputs of 16, else rounded up to them.
    """
    return _ops.conv_repack.default(qweight, in_features, taps, groups)


def unrepack(repacked: Tensor, bits: int, n: int, in_features: int) -> Tensor:
    """The bit planes, uint8 ``[bits, n, ceil(in_features/8)]``, of a weight in the order of CPU kernels.

    Args:
        repacked: what :func:`repack` or :func:`conv_repack` made of planes of this shape, on the CPU.
    """
    return _ops.unrepack.default(repacked, bits, n, in_features)


def binary_repack(qweight: Tensor, in_features: int, taps: int = 1, groups: int = 1) -> Tensor:
    """The 1-bit weight in the order that the binary ops read; made once, never saved.

    Args:
        qweight: uint8, ``[1, N, ceil(in_features/8)]``, contiguous.
        taps: of the convolution, ``kh · kw``; they divide ``in_features``.
        groups: of the convolution.

    Returns:
        int64, ``[groups, ceil(N/groups/8), taps, ceil(in_features/taps/64), 8]``.
    """
    return _ops.binary_repack.default(qweight, in_features, taps, groups)


def binary_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  group_size: int = 0, repacked: Tensor | None = None) -> Tensor:
    """``sign(input) @ weight.T + bias`` from a 1-bit weight, by xor and a count of bits: the product of
    XNOR-Net (Rastegari et al., 2016).

    The sign is -1 where ``input < 0``, else 1: also for -0 and NaN. Its gradient is straight through
    to inputs in [-1, 1]; scale and bias get the true one.

    Args:
        input: ``[..., K]``, floating point.
        qweight: uint8, ``[1, N, ceil(K/8)]``, contiguous.
        scale: float32 (float64 for a float64 ``input``).
        bias: ``[N]``, dtype of ``input``.
        group_size: 0, -1 or a multiple of 64.
        repacked: :func:`binary_repack` of ``qweight``; without it every call makes it.

    Returns:
        ``[..., N]``, dtype of ``input``.
    """
    return _ops.binary_linear.default(input, qweight, scale, bias, group_size, repacked)


def binary_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  group_size: int, kernel_size: Sequence[int], stride: Sequence[int] = (1, 1),
                  padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
                  repacked: Tensor | None = None) -> Tensor:
    """``conv2d(sign(input), weight)`` from a 1-bit weight; signs and gradients as in
    :func:`binary_linear`. Padding is 0 and adds nothing.

    Args:
        input: ``[batch, channels, height, width]``, floating point, contiguous or channels-last.
        qweight: uint8, ``[1, out, ceil(K/8)]``, ``K = in/groups · kh · kw``, contiguous.
        scale: float32 (float64 for a float64 ``input``).
        bias: ``[out]``, dtype of ``input``.
        group_size: 0 or -1.
        repacked: :func:`binary_repack` of ``qweight``; without it every call makes it.
    """
    return _ops.binary_conv2d.default(input, qweight, scale, bias, group_size, kernel_size, stride,
                                      padding, dilation, groups, repacked)

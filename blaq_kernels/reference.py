"""The truth: every op in plain PyTorch, written from the equations, one function per op.

Nothing here is fast. Kernels are compared with these functions: codes exactly, floats by error
budget. Equation numbers are those of BLAQ (AAAI 2024, arXiv 2401.16760); docs/algorithm.md lists
what the paper leaves open and how it is resolved here.

A weight counts as a matrix ``[N, K]``: ``N = shape[0]`` and ``K`` the rest (a vector is one row).
``group_size`` 0 is one scale for the tensor, -1 one for each row, g > 0 one for each g inputs of a
row; ``scale`` then has shape ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import fragments
from .codebook import bits_of, midpoints
from .flat import separate
from .shapes import matrix_shape, scale_shape

CURVATURE_FLOOR = 1e-8
SCALE_TINY = 2.0**-100  # scale of an all-zero group: positive, and level × scale is a normal float
ALTERNATING_TOLERANCE = 1e-6


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """View a weight as ``[groups, group]``; a short last group is padded with zeros."""
    n, k = matrix_shape(x.shape)
    if group_size == 0:
        return x.reshape(1, n * k)
    x = x.reshape(n, k)
    if group_size == -1:
        return x
    padding = -k % group_size
    return torch.nn.functional.pad(x, (0, padding)).reshape(-1, group_size)


def from_groups(groups: Tensor, shape: Sequence[int], group_size: int) -> Tensor:
    """Inverse of :func:`to_groups`."""
    n, k = matrix_shape(shape)
    if group_size > 0:
        groups = groups.reshape(n, -(-k // group_size) * group_size)[:, :k].contiguous()
    return groups.reshape(shape)


def scaled_update(latent: Tensor, grad: Tensor, curvature: Tensor) -> Tensor:
    """Eqs. 6 and 8: ``latent - grad ⊘ curvature`` (the printed ∘ is a fault)."""
    return latent - grad / curvature


def blend(current: Tensor, trial: Tensor, backtrack: float) -> Tensor:
    """Eqs. 9 and 10: ``a · current + (1 - a) · trial``; ``a = 1`` returns ``current`` exactly."""
    if backtrack == 1.0:
        return current.clone()
    return backtrack * current + (1.0 - backtrack) * trial


def quantize_codes(latent: Tensor, scale: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    """Nearest level of ``latent / scale``: ties to the larger magnitude, sign(0) = +1.

    The comparison is ``|w| >= midpoint · scale``, one rounding: codes are a pure function of
    (latent, scale), the same in every kernel. A zero magnitude has one code, the positive one.
    """
    w = to_groups(latent, group_size)
    alpha = scale.to(w.dtype).reshape(-1, 1)
    index = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    for mid in midpoints(levels):
        index += (w.abs() >= alpha * mid).to(torch.uint8)
    negative = (w < 0).to(torch.uint8)
    if levels[0] == 0.0:
        negative *= index > 0
    codes = (negative << (bits_of(levels) - 1)) | index
    return from_groups(codes, latent.shape, group_size)


def code_values(codes: Tensor, levels: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Signed level of each code; a code that no level has is NaN, never a wrong number."""
    sign_bit = bits_of(levels) - 1
    unused = [math.nan] * ((1 << sign_bit) - len(levels))
    magnitudes = torch.tensor([*levels, *unused], dtype=dtype, device=codes.device)
    values = magnitudes[(codes & ((1 << sign_bit) - 1)).long()]
    return torch.where((codes >> sign_bit) == 1, -values, values)


def dequantize(codes: Tensor, scale: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    """``level × scale`` in the scale's dtype: the one formula, used by training and by unpacking."""
    values = to_groups(code_values(codes, levels, scale.dtype), group_size)
    return from_groups(values * scale.reshape(-1, 1), codes.shape, group_size)


def objective(latent: Tensor, curvature: Tensor, codes: Tensor, scale: Tensor,
              levels: Sequence[float], group_size: int) -> Tensor:
    """``E = ½ Σ d (w - α β)²`` of every group, in float64."""
    error = latent.double() - dequantize(codes, scale.double(), levels, group_size)
    floored = curvature.double().clamp_min(CURVATURE_FLOOR)
    return 0.5 * to_groups(floored * error.square(), group_size).sum(1)


def solve(latent: Tensor, curvature: Tensor, init_scale: Tensor | None, levels: Sequence[float],
          group_size: int, max_iter: int, method: str) -> tuple[Tensor, Tensor]:
    """Eqs. 5 and 7: codes β and scale α that minimise ``½ Σ d (w - α β)²`` group by group.

    ``alternating`` ends when α moves by less than 1e-6 relative or after ``max_iter``; ``exact`` is
    the global minimiser, by sorting every threshold. One level is closed form either way. Sums are
    float64, ``scale`` float32; the codes are those of the returned scale.
    """
    w = to_groups(latent, group_size).double().abs()
    d = to_groups(curvature.double().clamp_min(CURVATURE_FLOOR), group_size)
    valid = to_groups(torch.ones_like(latent, dtype=torch.float64), group_size)
    d = d * valid
    if len(levels) == 1:
        alpha = (d * w).sum(1) / d.sum(1)
    elif method == "exact":
        alpha = _exact_scale(w, d, levels)
    else:
        alpha = _alternating_scale(w, d, init_scale, levels, max_iter)
    scale = alpha.float()
    scale = torch.where(scale > SCALE_TINY, scale, torch.full_like(scale, SCALE_TINY))
    scale = scale.reshape(scale_shape(latent.shape, group_size))
    return quantize_codes(latent, scale, levels, group_size), scale


def _alternating_scale(w: Tensor, d: Tensor, init_scale: Tensor | None, levels: Sequence[float],
                       max_iter: int) -> Tensor:
    magnitudes = torch.tensor(levels, dtype=w.dtype, device=w.device)
    thresholds = torch.tensor(midpoints(levels), dtype=w.dtype, device=w.device)
    alpha = (d * w).sum(1) / d.sum(1)
    if init_scale is not None:
        alpha = init_scale.to(w.dtype).reshape(-1)
    running = torch.ones_like(alpha, dtype=torch.bool)
    for _ in range(max_iter):
        beta = magnitudes[(w[..., None] >= alpha[:, None, None] * thresholds).sum(-1)]
        denominator = (d * beta.square()).sum(1)
        # Every weight on a zero level: α has no say in E; smaller is where E can fall.
        refit = torch.where(denominator > 0, (d * beta * w).sum(1) / denominator, alpha / 2)
        moved = (refit - alpha).abs() > ALTERNATING_TOLERANCE * alpha
        alpha = torch.where(running, refit, alpha)
        running &= moved
        if not running.any():
            break
    return alpha


def _exact_scale(w: Tensor, d: Tensor, levels: Sequence[float]) -> Tensor:
    """For a fixed β the best E is ``½ (Σ d w² - A²/B)``, A = Σ dβ|w|, B = Σ dβ². As α falls, weights
    cross thresholds one by one: sort the crossings, take prefix sums, keep the largest A²/B."""
    best = []
    for row, weight in zip(w, d, strict=True):
        crossings, gain_a, gain_b = [], [], []
        for low, high, mid in zip(levels, levels[1:], midpoints(levels), strict=False):
            crossings.append(row / mid)
            gain_a.append(weight * row * (high - low))
            gain_b.append(weight * (high**2 - low**2))
        order = torch.cat(crossings).argsort(descending=True)
        start_a, start_b = levels[0] * (weight * row).sum(), levels[0] ** 2 * weight.sum()
        a = torch.cat([start_a[None], start_a + torch.cat(gain_a)[order].cumsum(0)])
        b = torch.cat([start_b[None], start_b + torch.cat(gain_b)[order].cumsum(0)])
        gain = torch.where(b > 0, a.square() / b, torch.zeros_like(b))
        # Of equally good scales, as α and α/2 are in pow2, the larger: it comes first.
        at = (gain >= gain.max() * (1 - 1e-12)).int().argmax()
        best.append(torch.where(b[at] > 0, a[at] / b[at], torch.zeros_like(b[at])))
    return torch.stack(best) if best else w.new_zeros(0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit planes ``[bits, N, ceil(K/8)]`` of codes ``[N, ...]``, little-endian within a byte."""
    n, k = matrix_shape(codes.shape)
    flat = torch.nn.functional.pad(codes.reshape(n, k), (0, -k % 8)).reshape(n, (k + 7) // 8, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=codes.device)
    planes = [(((flat >> b) & 1) * weights).sum(-1, dtype=torch.uint8) for b in range(bits)]
    return torch.stack(planes)


def unpack_codes(qweight: Tensor, in_features: int) -> Tensor:
    """Codes ``[N, in_features]``: the exact inverse of :func:`pack`."""
    bits, n, row_bytes = qweight.shape
    positions = torch.arange(8, dtype=torch.uint8, device=qweight.device)
    planes = (qweight[..., None] >> positions) & 1
    planes = planes.reshape(bits, n, row_bytes * 8)[..., :in_features]
    codes = torch.zeros(n, in_features, dtype=torch.uint8, device=qweight.device)
    for b in range(bits):
        codes |= planes[b] << b
    return codes


def unpack(qweight: Tensor, scale: Tensor, levels: Sequence[float], group_size: int,
           in_features: int, dtype: torch.dtype) -> Tensor:
    """Quantized weight ``[N, in_features]``: ``round_to_dtype(level × scale)``."""
    codes = unpack_codes(qweight, in_features)
    return dequantize(codes, scale, levels, group_size).to(dtype)


def fake_quantize(latent: Tensor, scale: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    """Nearest level × scale, rounded once to the latent's dtype; the gradient is in autograd.py."""
    wide = latent.to(scale.dtype)
    codes = quantize_codes(wide, scale, levels, group_size)
    return dequantize(codes, scale, levels, group_size).to(latent.dtype)


def _moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float,
             beta2: float) -> tuple[Tensor, Tensor]:
    return (beta1 * exp_avg + (1 - beta1) * grad,
            beta2 * exp_avg_sq + (1 - beta2) * (grad * grad))


def _curvature(exp_avg_sq: Tensor, step: float, beta2: float, eps: float) -> Tensor:
    """lr · D = sqrt(v̂) + eps. The learning rate cancels in every solve, so it is kept out: lr = 0,
    as a warm-up has it, then needs no division by zero."""
    return (exp_avg_sq / (1 - beta2**step)).sqrt() + eps


def _target(latent: Tensor, exp_avg: Tensor, curvature: Tensor, lr: float, step: float,
            beta1: float, weight_decay: float) -> Tensor:
    """Eqs. 6 and 8, with decoupled weight decay: ``(1 - lr·λ) ω - lr · m̂ / (lr · D)``."""
    decayed = latent * (1 - lr * weight_decay)
    return decayed - lr * (exp_avg / (1 - beta1**step)) / curvature


def _unscaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    grad = grad.float()
    return grad if grad_scale is None else grad / grad_scale.float()


def _skips(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf.item() != 0)


def fused_trial(params, grads, latents, exp_avgs, exp_avg_sqs, scales, lr, step, beta1, beta2, eps,
                weight_decay, clip, levels, group_size, max_iter, method, grad_scale=None,
                found_inf=None) -> None:
    """Stage 1: writes ω̂* = solve(ω*, D) into ``params`` and changes nothing else. ``clip`` has no
    part in stage 1: Eq. 6 does not clip."""
    if _skips(found_inf):
        return
    latents, exp_avgs, exp_avg_sqs, scales = separate(params, group_size, latents, exp_avgs,
                                                      exp_avg_sqs, scales)
    rate, count = lr.item(), step.item()
    for i, param in enumerate(params):
        exp_avg, exp_avg_sq = _moments(_unscaled(grads[i], grad_scale), exp_avgs[i], exp_avg_sqs[i],
                                       beta1, beta2)
        curvature = _curvature(exp_avg_sq, count, beta2, eps)
        target = _target(latents[i], exp_avg, curvature, rate, count, beta1, weight_decay)
        codes, scale = solve(target, curvature, scales[i], levels, group_size, max_iter, method)
        param.copy_(dequantize(codes, scale, levels, group_size))


def fused_step(params, grads, trial_grads, latents, exp_avgs, exp_avg_sqs, scales, lr, step,
               backtrack, beta1, beta2, eps, weight_decay, clip, levels, group_size, max_iter,
               method, grad_scale=None, found_inf=None, flips=None) -> None:
    """Stage 2, from ω^t again: blend (Eqs. 9, 10), commit the moments, Eq. 8, Eq. 7.

    Without ``trial_grads`` it is LAQ. With ``found_inf`` set nothing changes, but for ``params``,
    which go back to the codes of (latent, scale) that a trial may have overwritten. ``flips[i]``
    becomes the number of codes that this step changed.
    """
    latents, exp_avgs, exp_avg_sqs, scales = separate(params, group_size, latents, exp_avgs,
                                                      exp_avg_sqs, scales)
    rate, count, a = lr.item(), step.item(), backtrack.item()
    skip = _skips(found_inf)
    for i, param in enumerate(params):
        old_codes = quantize_codes(latents[i], scales[i], levels, group_size)
        if skip:
            param.copy_(dequantize(old_codes, scales[i], levels, group_size))
        else:
            grad = _unscaled(grads[i], grad_scale)
            curvature = _curvature(_moments(grad, exp_avgs[i], exp_avg_sqs[i], beta1, beta2)[1],
                                   count, beta2, eps)
            if len(trial_grads):
                trial = _unscaled(trial_grads[i], grad_scale)
                trial_sq = _moments(trial, exp_avgs[i], exp_avg_sqs[i], beta1, beta2)[1]
                curvature = blend(curvature, _curvature(trial_sq, count, beta2, eps), a)  # Eq. 10
                grad = blend(grad, trial, a)  # Eq. 9
            exp_avg, exp_avg_sq = _moments(grad, exp_avgs[i], exp_avg_sqs[i], beta1, beta2)
            target = _target(latents[i], exp_avg, curvature, rate, count, beta1, weight_decay)
            if clip > 0:
                target = target.clamp(-clip, clip)
            codes, scale = solve(target, curvature, scales[i], levels, group_size, max_iter, method)
            exp_avgs[i].copy_(exp_avg)
            exp_avg_sqs[i].copy_(exp_avg_sq)
            latents[i].copy_(target)
            scales[i].copy_(scale)
            param.copy_(dequantize(codes, scale, levels, group_size))
            if flips is not None:
                flips[i] = (codes != old_codes).sum()
        if skip and flips is not None:
            flips[i] = 0


def repack(qweight: Tensor) -> Tensor:
    """Bit planes in the order that CPU kernels read: for 16 rows and 32 columns ``words`` registers,
    as many as bits (3 count as 4); the dword of a lane has 8 digits of 4 bits of its row, digit i of
    register p the codes of columns 4i + p + words · j, the first lowest. Rows past the last are it.
    On CUDA devices the order of tensor cores: fragments.py."""
    if qweight.is_cuda:
        return fragments.repack(qweight)
    bits, n, row_bytes = qweight.shape
    return _registers(unpack_codes(qweight, row_bytes * 8), bits).reshape(-1)


def _registers(codes: Tensor, bits: int) -> Tensor:
    """``[tiles of 16 rows, registers, 64]`` of codes ``[N, K]``: see :func:`repack`."""
    words = bits if bits <= 2 else 4
    n, k = codes.shape
    rows = torch.arange((n + 15) // 16 * 16, device=codes.device).clamp(max=max(n - 1, 0))
    codes = torch.nn.functional.pad(codes, (0, -k % 32))[rows].long()
    tiles = codes.reshape(len(rows) // 16, 16, codes.shape[1] // 32, 8, 4 // words, words)
    term, digit = (torch.arange(count, device=codes.device) for count in (4 // words, 8))
    digits = (tiles << (term * words)[:, None]).sum(-2)
    dwords = (digits << (4 * digit)[:, None]).sum(-2).permute(0, 2, 3, 1)
    byte = torch.arange(4, device=codes.device)
    return ((dwords[..., None] >> (8 * byte)) & 255).to(torch.uint8).flatten(1, 2).flatten(2)


def packed_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  levels: Sequence[float], group_size: int, repacked: Tensor | None = None,
                  accuracy: str = "high") -> Tensor:
    """``input @ unpack(qweight).T + bias``, the weight as training had it in the input's dtype."""
    qweight = planes_of(qweight, repacked, input.shape[-1])
    weight = unpack(qweight, scale, levels, group_size, input.shape[-1], input.dtype)
    return torch.nn.functional.linear(input, weight, bias)


def packed_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                  stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                  groups: int, repacked: Tensor | None = None, accuracy: str = "high",
                  relu: bool = False) -> Tensor:
    """``conv2d`` with the unpacked weight ``[out, in/groups, kh, kw]``, and its ReLU if asked."""
    channels = input.shape[1] // groups
    in_features = channels * kernel_size[0] * kernel_size[1]
    qweight = planes_of(qweight, repacked, in_features)
    weight = unpack(qweight, scale, levels, group_size, in_features, input.dtype)
    weight = weight.reshape(qweight.shape[1], channels, *kernel_size)
    output = torch.nn.functional.conv2d(input, weight, bias, list(stride), list(padding),
                                        list(dilation), groups)
    return output.relu() if relu else output


def conv_repack(qweight: Tensor, in_features: int, taps: int, groups: int) -> Tensor:
    """Bit planes in the order that CPU kernels convolve by: ``[groups, N/groups/16, taps, registers,
    64]``, the channels of a tap being the columns of :func:`repack`. Two bits are two registers of 1-bit
    codes, for they are the sum of two signs: ``±high = a ± b`` and ``±low = a - (±b)``."""
    bits, n, _ = qweight.shape
    codes = unpack_codes(qweight, in_features).reshape(groups, n // groups, in_features // taps, taps)
    planes = [codes] if bits != 2 else [codes >> 1, (codes >> 1) ^ (~codes & 1)]
    return torch.stack([torch.stack([
        torch.cat([_registers(plane[group, ..., tap], bits if bits > 2 else 1) for plane in planes], 1)
        for tap in range(taps)], 1) for group in range(groups)])


def unrepack(repacked: Tensor, bits: int, n: int, in_features: int) -> Tensor:
    """Bit planes ``[bits, n, ceil(in_features/8)]``: the inverse of :func:`repack` and
    :func:`conv_repack`, whose shape says which made it."""
    if repacked.dim() == 5:
        groups, _, taps, words, _ = repacked.shape
        channels, parts = in_features // taps, bits if bits == 2 else 1
        by_tap = repacked.transpose(1, 2).reshape(groups * taps, -1, parts, words // parts * 64)
        codes = torch.stack([torch.stack([
            _codes(x[:, part].reshape(-1), n // groups, channels, bits if bits > 2 else 1)
            for part in range(parts)]) for x in by_tap])  # [groups · taps, parts, N/groups, channels]
        codes = codes[:, 0] if parts == 1 else codes[:, 0] << 1 | codes[:, 0] ^ codes[:, 1] ^ 1
        codes = codes.reshape(groups, taps, n // groups, channels).permute(0, 2, 3, 1)
        return pack(codes.reshape(n, in_features), bits)
    columns = -(-in_features // 8) * 8
    return pack(_codes(repacked, n, columns, bits), bits)


def _codes(registers: Tensor, n: int, k: int, bits: int) -> Tensor:
    """Codes ``[n, k]``: the inverse of :func:`_registers`."""
    words = bits if bits <= 2 else 4
    digits = registers.reshape(-(-n // 16), -1, words, 16, 4)
    digits = torch.stack([digits & 15, digits >> 4], -1).reshape(*digits.shape[:-1], 8)
    term = torch.arange(4 // words, device=registers.device)
    codes = digits[..., None] >> (term * words).to(torch.uint8) & (1 << words) - 1
    codes = codes.permute(0, 3, 1, 4, 5, 2)  # tile, lane, 32 columns, digit, term, register
    return codes.reshape(codes.shape[0] * 16, -1)[:n, :k]


def planes_of(qweight: Tensor, repacked: Tensor | None, in_features: int) -> Tensor:
    """``qweight``; where it has no planes, for ``repacked`` stands for them, those."""
    if repacked is None or qweight.shape[2] or not in_features:
        return qweight
    return torch.ops.blaq.unrepack.default(repacked, *qweight.shape[:2], in_features)


def signs(input: Tensor) -> Tensor:
    """-1 where ``input < 0``, else 1: also for -0 and NaN."""
    return torch.where(input < 0, -1.0, 1.0).to(input.dtype)


def binary_repack(qweight: Tensor, in_features: int, taps: int, groups: int) -> Tensor:
    """The bits of a 1-bit weight as words of 64 input channels: ``[groups, N/groups/8, taps,
    channels/64, 8]``, the last the outputs of a block. Outputs past the last are it; bits past the last
    channel are 0."""
    n, channels = qweight.shape[1] // groups, in_features // taps
    blocks, words = -(-n // 8), -(-channels // 64)
    rows = torch.arange(blocks * 8, device=qweight.device).clamp(max=max(n - 1, 0))
    bits = unpack_codes(qweight, in_features).long().reshape(groups, n, channels, taps)[:, rows]
    bits = torch.nn.functional.pad(bits, (0, 0, 0, words * 64 - channels))
    bits = bits.reshape(groups, blocks, 8, words, 64, taps)
    place = torch.arange(64, device=qweight.device)[:, None]
    return (bits << place).sum(4).permute(0, 1, 4, 3, 2).contiguous()


def binary_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  group_size: int, repacked: Tensor | None = None) -> Tensor:
    """``packed_linear`` of the input's signs: XNOR-Net's product (Rastegari et al., 2016)."""
    return packed_linear(signs(input), qweight, scale, bias, (1.0,), group_size)


def binary_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  group_size: int, kernel_size: Sequence[int], stride: Sequence[int],
                  padding: Sequence[int], dilation: Sequence[int], groups: int,
                  repacked: Tensor | None = None) -> Tensor:
    """``packed_conv2d`` of the input's signs; padding is 0, so it adds nothing."""
    return packed_conv2d(signs(input), qweight, scale, bias, (1.0,), group_size, kernel_size, stride,
                         padding, dilation, groups)

"""THE list of ops in ``torch.ops.blaq``: schema, argument rules and fake, side by side.

Path of a call: ``torch.ops.blaq.<op>`` (here) → the kernel that ``dispatch.py`` registered for the
device → ``csrc/cpu/<op>.cpp``, or ``reference.py`` where no kernel is loaded. Gradients are in
``autograd.py``. A rule stands here for fakes and the reference, and in ``csrc/checks.h`` for C++;
``tests/test_errors.py`` holds the two to the same words.

Every message reads ``blaq.<op>: <argument> must <rule>, got <value>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import flat, fragments
from .codebook import bits_of, check_levels
from .flat import STATES, is_flat, state_shapes
from .shapes import matrix_shape, scale_shape

LIBRARY = torch.library.Library("blaq", "DEF")
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*PARAM_DTYPES, torch.float64)
METHODS = ("alternating", "exact")
MAX_FAKE_QUANTIZE_LEVELS = 128  # 8 bits: sign and 7 bits of index

# Latents, moments and scales of a step may each come in one flat tensor for all params: flat.py.
# Hyper-parameters that both step ops end with. lr and step are 0-dim float tensors, so that neither
# enters a compile key; `grad_scale` and `found_inf` mean what they mean in torch's fused Adam.
_STEP_TAIL = (
    "Tensor lr, Tensor step, {backtrack}float beta1, float beta2, float eps, float weight_decay, "
    "float clip, float[] levels, int group_size, int max_iter, str method, "
    "Tensor? grad_scale=None, Tensor? found_inf=None"
)

ACCURACIES = ("exact", "high", "fast")

SCHEMAS = {
    "scaled_update": "(Tensor latent, Tensor grad, Tensor curvature) -> Tensor",
    "blend": "(Tensor current, Tensor trial, float backtrack) -> Tensor",
    "solve": "(Tensor latent, Tensor curvature, Tensor? init_scale, float[] levels, int group_size, "
    "int max_iter, str method) -> (Tensor codes, Tensor scale)",
    "fused_trial": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] latents, Tensor[] exp_avgs, "
    "Tensor[] exp_avg_sqs, Tensor[] scales, " + _STEP_TAIL.format(backtrack="") + ") -> ()",
    "fused_step": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] trial_grads, "
    "Tensor(b!)[] latents, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] scales, "
    + _STEP_TAIL.format(backtrack="Tensor backtrack, ")
    + ", Tensor(f!)? flips=None) -> ()",
    "fake_quantize": "(Tensor latent, Tensor scale, float[] levels, int group_size) -> Tensor",
    "pack": "(Tensor codes, int bits) -> Tensor",
    "unpack": "(Tensor qweight, Tensor scale, float[] levels, int group_size, int in_features, "
    "ScalarType dtype) -> Tensor",
    "repack": "(Tensor qweight) -> Tensor",
    "packed_linear": "(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, float[] levels, "
    "int group_size, Tensor? repacked=None, str accuracy='high') -> Tensor",
    "packed_conv2d": "(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, float[] levels, "
    "int group_size, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, Tensor? repacked=None, str accuracy='high', bool relu=False) -> Tensor",
    "conv_repack": "(Tensor qweight, int in_features, int taps, int groups) -> Tensor",
    "unrepack": "(Tensor repacked, int bits, int n, int in_features) -> Tensor",
    "binary_repack": "(Tensor qweight, int in_features, int taps, int groups) -> Tensor",
    "binary_linear": "(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, int group_size, "
    "Tensor? repacked=None) -> Tensor",
    "binary_conv2d": "(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, int group_size, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "Tensor? repacked=None) -> Tensor",
}

# What kernels in CUDA C++ take a call of a training op as: call.py says which numbers these are.
STEP_CALL = "(Tensor like, int[] integers, float[] numbers) -> ()"


def require(condition: bool, op: str, argument: str, rule: str, value: object) -> None:
    """Raise ``blaq.<op>: <argument> must <rule>, got <value>`` unless the condition holds."""
    if not condition:
        raise ValueError(f"blaq.{op}: {argument} must {rule}, got {value}")


def _dtype_in(op: str, name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
    require(x.dtype in allowed, op, name, f"be {names}", str(x.dtype).removeprefix("torch."))


def _contiguous(op: str, name: str, x: Tensor) -> None:
    require(x.is_contiguous(), op, name, "be contiguous", f"strides {list(x.stride())}")


def _same_shape(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(x.shape == other.shape, op, name, f"have the shape of {other_name} {list(other.shape)}",
            list(x.shape))


def _same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(x.device == other.device, op, name, f"be on {other_name}'s device {other.device}",
            x.device)


def _like(op: str, name: str, x: Tensor, other_name: str, other: Tensor,
          dtypes: Sequence[torch.dtype]) -> None:
    _dtype_in(op, name, x, dtypes)
    _same_shape(op, name, x, other_name, other)
    _same_device(op, name, x, other_name, other)
    _contiguous(op, name, x)


def _group_size(op: str, group_size: int) -> None:
    require(group_size >= -1, op, "group_size", "be 0, -1 or positive", group_size)


def _scale(op: str, name: str, scale: Tensor, weight_shape: Sequence[int], group_size: int,
           dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    _dtype_in(op, name, scale, dtypes)
    expected = scale_shape(weight_shape, group_size)
    require(tuple(scale.shape) == expected, op, name, f"have shape {list(expected)}",
            list(scale.shape))
    require(scale.device == device, op, name, f"be on device {device}", scale.device)
    _contiguous(op, name, scale)


def check_scaled_update(latent: Tensor, grad: Tensor, curvature: Tensor) -> None:
    op = "scaled_update"
    _dtype_in(op, "latent", latent, FLOAT_DTYPES)
    _contiguous(op, "latent", latent)
    _like(op, "grad", grad, "latent", latent, (latent.dtype,))
    _like(op, "curvature", curvature, "latent", latent, (latent.dtype,))


def check_blend(current: Tensor, trial: Tensor, backtrack: float) -> None:
    op = "blend"
    _dtype_in(op, "current", current, FLOAT_DTYPES)
    _contiguous(op, "current", current)
    _like(op, "trial", trial, "current", current, (current.dtype,))
    require(0.0 < backtrack <= 1.0, op, "backtrack", "be in (0, 1]", backtrack)


def _check_solver(op: str, levels: Sequence[float], group_size: int, max_iter: int,
                  method: str) -> None:
    check_levels(op, levels)
    _group_size(op, group_size)
    require(max_iter >= 1, op, "max_iter", "be at least 1", max_iter)
    require(method in METHODS, op, "method", "be 'alternating' or 'exact'", repr(method))


def check_solve(latent: Tensor, curvature: Tensor, init_scale: Tensor | None,
                levels: Sequence[float], group_size: int, max_iter: int, method: str) -> None:
    op = "solve"
    _dtype_in(op, "latent", latent, (torch.float32,))
    _contiguous(op, "latent", latent)
    _like(op, "curvature", curvature, "latent", latent, (torch.float32,))
    _check_solver(op, levels, group_size, max_iter, method)
    if init_scale is not None:
        _scale(op, "init_scale", init_scale, latent.shape, group_size, (torch.float32,),
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
        _dtype_in(op, name, value, (torch.float32, torch.float64))
        require(value.dim() == 0, op, name, "be a 0-dim tensor", list(value.shape))
    require(0.0 <= beta1 < 1.0, op, "beta1", "be in [0, 1)", beta1)
    require(0.0 <= beta2 < 1.0, op, "beta2", "be in [0, 1)", beta2)
    require(eps >= 0.0, op, "eps", "be at least 0", eps)
    require(weight_decay >= 0.0, op, "weight_decay", "be at least 0", weight_decay)
    require(clip >= 0.0, op, "clip", "be at least 0 (0 is off)", clip)


def _check_flat(op: str, name: str, x: Tensor, size: int, device: torch.device) -> None:
    _dtype_in(op, name, x, (torch.float32,))
    require(tuple(x.shape) == (size,), op, name, f"have shape [{size}] for all params",
            list(x.shape))
    require(x.device == device, op, name, f"be on params[0]'s device {device}", x.device)
    _contiguous(op, name, x)


def _check_lists(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    params = lists["params"]
    for name, tensors in lists.items():
        require(len(tensors) == len(params), op, name, f"have as many tensors as params ({len(params)})",
                len(tensors))
    for i, param in enumerate(params):
        _dtype_in(op, f"params[{i}]", param, PARAM_DTYPES)
        _contiguous(op, f"params[{i}]", param)
        for name, tensors in lists.items():
            if name in ("grads", "trial_grads"):
                _like(op, f"{name}[{i}]", tensors[i], f"params[{i}]", param, (param.dtype,))
            elif name not in ("params", "scales"):
                _like(op, f"{name}[{i}]", tensors[i], f"params[{i}]", param, (torch.float32,))


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


def is_real(x: Tensor) -> bool:
    """Whether the tensor has memory to look at: neither a fake nor on the meta device."""
    return not isinstance(x, torch._subclasses.FakeTensor) and x.device.type != "meta"


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
        _scale(op, f"scales[{i}]", scale, param.shape, group_size, (torch.float32,), param.device)
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None:
            _dtype_in(op, name, value, (torch.float32,))
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
    _dtype_in(op, "backtrack", backtrack, (torch.float32, torch.float64))
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
    _dtype_in(op, "flips", flips, (torch.int64,))
    require(tuple(flips.shape) == (count,), op, "flips", f"have shape [{count}]", list(flips.shape))
    _contiguous(op, "flips", flips)


def check_fake_quantize(latent: Tensor, scale: Tensor, levels: Sequence[float],
                        group_size: int) -> None:
    op = "fake_quantize"
    _dtype_in(op, "latent", latent, FLOAT_DTYPES)
    _contiguous(op, "latent", latent)
    check_levels(op, levels, MAX_FAKE_QUANTIZE_LEVELS)
    _group_size(op, group_size)
    wide = torch.float64 if latent.dtype == torch.float64 else torch.float32
    _scale(op, "scale", scale, latent.shape, group_size, (wide,), latent.device)


def check_pack(codes: Tensor, bits: int) -> None:
    op = "pack"
    _dtype_in(op, "codes", codes, (torch.uint8,))
    require(codes.dim() >= 1, op, "codes", "have at least 1 dimension", codes.dim())
    _contiguous(op, "codes", codes)
    require(1 <= bits <= 4, op, "bits", "be 1, 2, 3 or 4", bits)
    if is_real(codes) and codes.numel():
        largest = int(codes.max())
        require(largest < 2**bits, op, "codes", f"be below 2^bits = {2**bits}", largest)


def _check_qweight(op: str, qweight: Tensor, scale: Tensor, levels: Sequence[float],
                   group_size: int, in_features: int, scale_dtypes: Sequence[torch.dtype],
                   may_lack_planes: bool = False) -> None:
    check_levels(op, levels)
    _group_size(op, group_size)
    _dtype_in(op, "qweight", qweight, (torch.uint8,))
    require(qweight.dim() == 3, op, "qweight", "have 3 dimensions [bits, N, ceil(K/8)]",
            list(qweight.shape))
    _contiguous(op, "qweight", qweight)
    bits = bits_of(levels)
    require(qweight.shape[0] == bits, op, "qweight", f"have {bits} planes for {len(levels)} levels",
            qweight.shape[0])
    require(in_features >= 0, op, "in_features", "be at least 0", in_features)
    bytes_ = -(-in_features // 8)
    require(qweight.shape[2] == bytes_ or (may_lack_planes and qweight.shape[2] == 0), op, "qweight", f"have {bytes_} bytes a row for K = {in_features}",
            qweight.shape[2])
    _scale(op, "scale", scale, (qweight.shape[1], in_features), group_size, scale_dtypes,
           qweight.device)


def check_unpack(qweight: Tensor, scale: Tensor, levels: Sequence[float], group_size: int,
                 in_features: int, dtype: torch.dtype) -> None:
    op = "unpack"
    _check_qweight(op, qweight, scale, levels, group_size, in_features,
                   (torch.float32, torch.float64))
    names = " or ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
    require(dtype in FLOAT_DTYPES, op, "dtype", f"be {names}", str(dtype).removeprefix("torch."))


def _check_packed_input(op: str, input: Tensor, qweight: Tensor, bias: Tensor | None) -> None:
    _dtype_in(op, "input", input, FLOAT_DTYPES)
    _same_device(op, "input", input, "qweight", qweight)
    if bias is not None:
        _dtype_in(op, "bias", bias, (input.dtype,))
        n = qweight.shape[1]
        require(tuple(bias.shape) == (n,), op, "bias", f"have shape [{n}]", list(bias.shape))
        _same_device(op, "bias", bias, "qweight", qweight)
        _contiguous(op, "bias", bias)


def _scale_dtypes_for(input: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if input.dtype == torch.float64 else (torch.float32,)


def check_repack(qweight: Tensor) -> None:
    op = "repack"
    _dtype_in(op, "qweight", qweight, (torch.uint8,))
    require(qweight.dim() == 3 and 1 <= qweight.shape[0] <= 4, op, "qweight",
            "have shape [bits, N, ceil(K / 8)], bits 1 to 4", list(qweight.shape))
    _contiguous(op, "qweight", qweight)


def repacked_bytes(bits: int, n: int, row_bytes: int, device: str = "cpu") -> int:
    """Bytes that ``repack`` makes of bit planes. On the CPU 16 rows and 32 columns together, 4 bits a
    digit; on CUDA devices tiles of 16 rows and as many columns as 16 bytes of a lane hold."""
    if device == "cuda":
        return fragments.repacked_bytes(bits, n, row_bytes)
    return (n + 15) // 16 * ((row_bytes + 3) // 4) * (bits if bits <= 2 else 4) * 64


def conv_repacked_shape(bits: int, n: int, in_features: int, taps: int,
                        groups: int) -> tuple[int, ...]:
    """Shape of what ``conv_repack`` makes: group, 16 outputs, tap, registers of 64 bytes."""
    words = -(-in_features // taps // 32) * (bits if bits <= 2 else 4)
    return groups, -(-n // groups // 16), taps, words, 64


def _check_repacked(op: str, repacked: Tensor | None, qweight: Tensor, in_features: int, accuracy: str,
                    shape: tuple[int, ...] | None = None) -> None:
    require(accuracy in ACCURACIES, op, "accuracy", "be 'exact', 'high' or 'fast'", repr(accuracy))
    if repacked is not None:
        _dtype_in(op, "repacked", repacked, (torch.uint8,))
        shape = shape or (repacked_bytes(*qweight.shape[:2], -(-in_features // 8),
                                         qweight.device.type),)
        require(tuple(repacked.shape) == shape, op, "repacked", f"have shape {list(shape)}",
                list(repacked.shape))
        _contiguous(op, "repacked", repacked)


def check_packed_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        levels: Sequence[float], group_size: int, repacked: Tensor | None = None,
                        accuracy: str = "high") -> None:
    op = "packed_linear"
    require(input.dim() >= 1, op, "input", "have at least 1 dimension", input.dim())
    _dtype_in(op, "input", input, FLOAT_DTYPES)
    _check_qweight(op, qweight, scale, levels, group_size, input.shape[-1], _scale_dtypes_for(input),
                   repacked is not None and not qweight.is_cuda)
    _check_packed_input(op, input, qweight, bias)
    _check_repacked(op, repacked, qweight, input.shape[-1], accuracy)


def check_packed_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                        groups: int, repacked: Tensor | None = None, accuracy: str = "high",
                        relu: bool = False) -> None:
    op = "packed_conv2d"
    _check_geometry(op, input, kernel_size, stride, padding, dilation, groups)
    _check_conv_weight(op, input, qweight, scale, bias, levels, group_size, kernel_size, stride,
                       padding, dilation, groups, repacked is not None and not qweight.is_cuda)
    taps = kernel_size[0] * kernel_size[1]
    in_features = input.shape[1] // groups * taps
    shape = (None if group_size > 0 else
             conv_repacked_shape(*qweight.shape[:2], in_features, taps, groups))
    _check_repacked(op, repacked, qweight, in_features, accuracy, shape)


def _check_geometry(op: str, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                    padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
    require(input.dim() == 4, op, "input", "have 4 dimensions [batch, channels, height, width]",
            list(input.shape))
    _dtype_in(op, "input", input, FLOAT_DTYPES)
    for name, pair, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1),
                              ("padding", padding, 0), ("dilation", dilation, 1)):
        require(len(pair) == 2 and min(pair) >= least, op, name,
                f"be two integers of at least {least}", list(pair))
    require(groups >= 1, op, "groups", "be at least 1", groups)
    channels = input.shape[1]
    require(channels >= 1, op, "input", "have at least 1 channel", channels)
    require(channels % groups == 0, op, "input", f"have channels divisible by groups = {groups}",
            channels)


def _check_conv_weight(op: str, input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                       levels: Sequence[float], group_size: int, kernel_size: Sequence[int],
                       stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                       groups: int, may_lack_planes: bool = False) -> None:
    in_features = input.shape[1] // groups * kernel_size[0] * kernel_size[1]
    _check_qweight(op, qweight, scale, levels, group_size, in_features, _scale_dtypes_for(input),
                   may_lack_planes)
    require(qweight.shape[1] % groups == 0, op, "qweight",
            f"have rows divisible by groups = {groups}", qweight.shape[1])
    _check_packed_input(op, input, qweight, bias)
    size = conv_output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    require(size[0] >= 1 and size[1] >= 1, op, "input", "be at least as large as the kernel",
            list(input.shape[2:]))


def check_binary_repack(qweight: Tensor, in_features: int, taps: int, groups: int) -> None:
    _check_repack_by_tap("binary_repack", qweight, 1, in_features, taps, groups)


def check_conv_repack(qweight: Tensor, in_features: int, taps: int, groups: int) -> None:
    _check_repack_by_tap("conv_repack", qweight, 4, in_features, taps, groups)


def check_unrepack(repacked: Tensor, bits: int, n: int, in_features: int) -> None:
    op = "unrepack"
    _dtype_in(op, "repacked", repacked, (torch.uint8,))
    _contiguous(op, "repacked", repacked)
    require(not repacked.is_cuda, op, "repacked", "be on device cpu", repacked.device)
    require(1 <= bits <= 4, op, "bits", "be 1, 2, 3 or 4", bits)
    require(n >= 0, op, "n", "be at least 0", n)
    require(in_features >= 0, op, "in_features", "be at least 0", in_features)
    require(repacked.dim() in (1, 5), op, "repacked", "have 1 dimension or 5", list(repacked.shape))
    shape: tuple[int, ...] = (repacked_bytes(bits, n, -(-in_features // 8)),)
    if repacked.dim() == 5:
        groups, _, taps, *_ = repacked.shape
        require(groups > 0 and n % groups == 0 and taps > 0 and in_features % taps == 0, op, "repacked",
                "have groups that divide n and taps that divide in_features", list(repacked.shape))
        shape = conv_repacked_shape(bits, n, in_features, taps, groups)
    require(tuple(repacked.shape) == shape, op, "repacked", f"have shape {list(shape)}",
            list(repacked.shape))


def _check_repack_by_tap(op: str, qweight: Tensor, most_bits: int, in_features: int, taps: int,
                         groups: int) -> None:
    _dtype_in(op, "qweight", qweight, (torch.uint8,))
    _contiguous(op, "qweight", qweight)
    require(in_features >= 0, op, "in_features", "be at least 0", in_features)
    require(taps >= 1 and in_features % taps == 0, op, "taps",
            f"divide in_features = {in_features}", taps)
    bytes_, bits = -(-in_features // 8), 1 if most_bits == 1 else "bits"
    require(qweight.dim() == 3 and 1 <= qweight.shape[0] <= most_bits
            and qweight.shape[2] == bytes_, op, "qweight", f"have shape [{bits}, N, {bytes_}]",
            list(qweight.shape))
    require(groups >= 1 and qweight.shape[1] % groups == 0, op, "groups",
            f"divide the rows of qweight = {qweight.shape[1]}", groups)


def binary_shape(n: int, in_features: int, taps: int, groups: int) -> tuple[int, ...]:
    """Shape of a 1-bit weight of n rows that is repacked: group, 8 outputs, tap, 64 channels, output."""
    return groups, -(-n // groups // 8), taps, -(-in_features // taps // 64), 8


def _check_binary_repacked(op: str, repacked: Tensor | None, qweight: Tensor, in_features: int,
                           taps: int, groups: int) -> None:
    if repacked is not None:
        _dtype_in(op, "repacked", repacked, (torch.int64,))
        _contiguous(op, "repacked", repacked)
        shape = binary_shape(qweight.shape[1], in_features, taps, groups)
        require(tuple(repacked.shape) == shape, op, "repacked", f"have shape {list(shape)}",
                list(repacked.shape))


def check_binary_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        group_size: int, repacked: Tensor | None = None) -> None:
    op = "binary_linear"
    require(input.dim() >= 1, op, "input", "have at least 1 dimension", input.dim())
    _dtype_in(op, "input", input, FLOAT_DTYPES)
    require(group_size >= -1 and (group_size <= 0 or group_size % 64 == 0), op, "group_size",
            "be 0, -1 or a multiple of 64", group_size)
    in_features = input.shape[-1]
    _check_qweight(op, qweight, scale, (1.0,), group_size, in_features, _scale_dtypes_for(input))
    _check_packed_input(op, input, qweight, bias)
    _check_binary_repacked(op, repacked, qweight, in_features, 1, 1)


def check_binary_conv2d(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                        group_size: int, kernel_size: Sequence[int], stride: Sequence[int],
                        padding: Sequence[int], dilation: Sequence[int], groups: int,
                        repacked: Tensor | None = None) -> None:
    op = "binary_conv2d"
    _check_geometry(op, input, kernel_size, stride, padding, dilation, groups)
    require(group_size in (0, -1), op, "group_size", "be 0 or -1", group_size)
    _check_conv_weight(op, input, qweight, scale, bias, (1.0,), group_size, kernel_size, stride,
                       padding, dilation, groups)
    taps = kernel_size[0] * kernel_size[1]
    in_features = input.shape[1] // groups * taps
    _check_binary_repacked(op, repacked, qweight, in_features, taps, groups)


def conv_output_size(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                     padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
           for i in range(2)]
    return out[0], out[1]


def memory_format(input: Tensor) -> torch.memory_format:
    """A convolution answers in its input's layout, as torch's own do."""
    if input.is_contiguous():
        return torch.contiguous_format
    channels_last = input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake_solve(latent, curvature, init_scale, levels, group_size, max_iter, method):
    codes = torch.empty_like(latent, dtype=torch.uint8)
    return codes, latent.new_empty(scale_shape(latent.shape, group_size))


def _fake_pack(codes, bits):
    n, k = matrix_shape(codes.shape)
    return codes.new_empty((bits, n, (k + 7) // 8))


def _fake_unpack(qweight, scale, levels, group_size, in_features, dtype):
    return qweight.new_empty((qweight.shape[1], in_features), dtype=dtype)


def _fake_repack(qweight):
    return qweight.new_empty(repacked_bytes(*qweight.shape, qweight.device.type))


def _fake_linear(input, qweight, *_, **__):
    return input.new_empty((*input.shape[:-1], qweight.shape[1]))


def _fake_binary_repack(qweight, in_features, taps, groups):
    shape = binary_shape(qweight.shape[1], in_features, taps, groups)
    return qweight.new_empty(shape, dtype=torch.int64)


def _fake_conv_repack(qweight, in_features, taps, groups):
    return qweight.new_empty(conv_repacked_shape(*qweight.shape[:2], in_features, taps, groups))


def _fake_conv2d(input, qweight, scale, bias, levels, group_size, kernel_size, stride, padding,
                 dilation, groups, *_, **__):
    size = conv_output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    return torch.empty((input.shape[0], qweight.shape[1], *size), dtype=input.dtype,
                       device=input.device, memory_format=memory_format(input))


def _fake_binary_conv2d(input, qweight, scale, bias, group_size, *geometry, **_):
    return _fake_conv2d(input, qweight, scale, bias, (1.0,), group_size, *geometry[:5])


FAKES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "scaled_update": (check_scaled_update, lambda latent, *_: torch.empty_like(latent)),
    "blend": (check_blend, lambda current, *_: torch.empty_like(current)),
    "solve": (check_solve, _fake_solve),
    "fused_trial": (check_fused_trial, lambda *_, **__: None),
    "fused_step": (check_fused_step, lambda *_, **__: None),
    "fake_quantize": (check_fake_quantize, lambda latent, *_: torch.empty_like(latent)),
    "pack": (check_pack, _fake_pack),
    "unpack": (check_unpack, _fake_unpack),
    "repack": (check_repack, _fake_repack),
    "packed_linear": (check_packed_linear, _fake_linear),
    "packed_conv2d": (check_packed_conv2d, _fake_conv2d),
    "conv_repack": (check_conv_repack, _fake_conv_repack),
    "unrepack": (check_unrepack, lambda repacked, bits, n, in_features:
                 repacked.new_empty((bits, n, -(-in_features // 8)))),
    "binary_repack": (check_binary_repack, _fake_binary_repack),
    "binary_linear": (check_binary_linear, _fake_linear),
    "binary_conv2d": (check_binary_conv2d, _fake_binary_conv2d),
}


def define() -> None:
    """Define every op and its fake; called once, on import of the package."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"blaq::{name}", _checked(*FAKES[name]), lib=LIBRARY)


def _checked(check: Callable[..., None], body: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return body(*args, **kwargs)

    return run


def with_checks(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` behind the argument rules of the op ``name``: how the reference is registered."""
    return _checked(FAKES[name][0], body)

"""THE list of ops in ``torch.ops.blaq``: schema, argument rules and fake, side by side.

Path of a call: ``torch.ops.blaq.<op>`` (here) → the kernel that ``dispatch.py`` registered for the
device → ``csrc/cpu/<op>.cpp``, or ``reference.py`` where no kernel is loaded. Gradients are in
``autograd.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import packed_rules as packed
from . import training_rules as training
from .shapes import matrix_shape, scale_shape

LIBRARY = torch.library.Library("blaq", "DEF")

# Latents, moments and scales of a step may each come in one flat tensor for all params: flat.py.
# Hyper-parameters that both step ops end with. lr and step are 0-dim float tensors, so that neither
# enters a compile key; `grad_scale` and `found_inf` mean what they mean in torch's fused Adam.
_STEP_TAIL = (
    "Tensor lr, Tensor step, {backtrack}float beta1, float beta2, float eps, float weight_decay, "
    "float clip, float[] levels, int group_size, int max_iter, str method, "
    "Tensor? grad_scale=None, Tensor? found_inf=None"
)

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


def _fake_solve(latent, curvature, init_scale, levels, group_size, max_iter, method):
    codes = torch.empty_like(latent, dtype=torch.uint8)
    return codes, latent.new_empty(scale_shape(latent.shape, group_size))


def _fake_pack(codes, bits):
    n, k = matrix_shape(codes.shape)
    return codes.new_empty((bits, n, (k + 7) // 8))


def _fake_unpack(qweight, scale, levels, group_size, in_features, dtype):
    return qweight.new_empty((qweight.shape[1], in_features), dtype=dtype)


def _fake_repack(qweight):
    return qweight.new_empty(packed.repacked_bytes(*qweight.shape, qweight.device.type))


def _fake_linear(input, qweight, *_, **__):
    return input.new_empty((*input.shape[:-1], qweight.shape[1]))


def _fake_binary_repack(qweight, in_features, taps, groups):
    shape = packed.binary_shape(qweight.shape[1], in_features, taps, groups)
    return qweight.new_empty(shape, dtype=torch.int64)


def _fake_conv_repack(qweight, in_features, taps, groups):
    return qweight.new_empty(packed.conv_repacked_shape(*qweight.shape[:2], in_features, taps, groups))


def _fake_conv2d(input, qweight, scale, bias, levels, group_size, kernel_size, stride, padding,
                 dilation, groups, *_, **__):
    size = packed.conv_output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    return torch.empty((input.shape[0], qweight.shape[1], *size), dtype=input.dtype,
                       device=input.device, memory_format=packed.memory_format(input))


def _fake_binary_conv2d(input, qweight, scale, bias, group_size, *geometry, **_):
    return _fake_conv2d(input, qweight, scale, bias, (1.0,), group_size, *geometry[:5])


FAKES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "scaled_update": (training.check_scaled_update, lambda latent, *_: torch.empty_like(latent)),
    "blend": (training.check_blend, lambda current, *_: torch.empty_like(current)),
    "solve": (training.check_solve, _fake_solve),
    "fused_trial": (training.check_fused_trial, lambda *_, **__: None),
    "fused_step": (training.check_fused_step, lambda *_, **__: None),
    "fake_quantize": (training.check_fake_quantize, lambda latent, *_: torch.empty_like(latent)),
    "pack": (packed.check_pack, _fake_pack),
    "unpack": (packed.check_unpack, _fake_unpack),
    "repack": (packed.check_repack, _fake_repack),
    "packed_linear": (packed.check_packed_linear, _fake_linear),
    "packed_conv2d": (packed.check_packed_conv2d, _fake_conv2d),
    "conv_repack": (packed.check_conv_repack, _fake_conv_repack),
    "unrepack": (packed.check_unrepack, lambda repacked, bits, n, in_features:
                 repacked.new_empty((bits, n, -(-in_features // 8)))),
    "binary_repack": (packed.check_binary_repack, _fake_binary_repack),
    "binary_linear": (packed.check_binary_linear, _fake_linear),
    "binary_conv2d": (packed.check_binary_conv2d, _fake_binary_conv2d),
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

"""Gradients of the differentiable ops, each made of ops again, so that a backward compiles too.

``fake_quantize``: straight through to ``latent``; to ``scale`` the true derivative of level × scale
with the codes held. ``packed_linear`` and ``packed_conv2d``: to input, scale and bias; codes have none.
``binary_linear`` and ``binary_conv2d``: the same, straight through the sign to inputs in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .schemas import LIBRARY


def _unit_weight(qweight, scale, levels, group_size, in_features):
    """The weight with every scale 1: d weight / d scale."""
    return torch.ops.blaq.unpack.default(qweight, torch.ones_like(scale), levels, group_size,
                                         in_features, scale.dtype)


def _scale_grad(grad_weight: Tensor, values: Tensor, scale: Tensor, group_size: int) -> Tensor:
    groups = reference.to_groups(grad_weight.to(scale.dtype) * values, group_size)
    return groups.sum(1).reshape(scale.shape)


def _fake_quantize_setup(ctx, inputs, output):
    latent, scale, ctx.levels, ctx.group_size = inputs
    ctx.save_for_backward(latent, scale)


def _fake_quantize_backward(ctx, grad):
    latent, scale = ctx.saved_tensors
    grad_scale = None
    if ctx.needs_input_grad[1]:
        codes = reference.quantize_codes(latent.to(scale.dtype), scale, ctx.levels, ctx.group_size)
        values = reference.code_values(codes, ctx.levels, scale.dtype)
        grad_scale = _scale_grad(grad, values, scale, ctx.group_size)
    return grad, grad_scale, None, None


def straight_through(grad: Tensor, input: Tensor) -> Tensor:
    """Gradient to what a sign was taken of: passed where ``|input| <= 1``, so not where it is NaN."""
    return torch.where(input.abs() <= 1, grad, 0.0)


def _linear_setup(ctx, inputs, output):
    input, qweight, scale, bias, ctx.levels, ctx.group_size, repacked, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, qweight, scale, None if qweight.shape[2] else repacked)


def _linear_backward(ctx, grad):
    input, qweight, scale, repacked = ctx.saved_tensors
    qweight = reference.planes_of(qweight, repacked, input.shape[-1])
    return *_linear_grads(ctx, grad, input, qweight, scale), *[None] * 4


def _linear_grads(ctx, grad, input, qweight, scale):
    """Gradients to input, qweight, scale and bias."""
    in_features = input.shape[-1]
    flat = grad.reshape(-1, grad.shape[-1])
    grad_input = grad_scale = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.blaq.unpack.default(qweight, scale, ctx.levels, ctx.group_size,
                                               in_features, input.dtype)
        grad_input = (flat @ weight).reshape(input.shape)
    if ctx.needs_input_grad[2]:
        values = _unit_weight(qweight, scale, ctx.levels, ctx.group_size, in_features)
        grad_weight = flat.t() @ input.reshape(-1, in_features)
        grad_scale = _scale_grad(grad_weight, values, scale, ctx.group_size)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = flat.sum(0)
    return grad_input, None, grad_scale, grad_bias


def _binary_linear_setup(ctx, inputs, output):
    input, qweight, scale, bias, ctx.group_size, *_ = inputs
    ctx.levels, ctx.has_bias = (1.0,), bias is not None
    ctx.save_for_backward(input, qweight, scale)


def _binary_linear_backward(ctx, grad):
    input, qweight, scale = ctx.saved_tensors
    grad_input, *others = _linear_grads(ctx, grad, reference.signs(input), qweight, scale)
    if ctx.needs_input_grad[0]:
        grad_input = straight_through(grad_input, input)
    return grad_input, *others, None, None


def _conv2d_setup(ctx, inputs, output):
    (input, qweight, scale, bias, ctx.levels, ctx.group_size, ctx.kernel_size, ctx.stride,
     ctx.padding, ctx.dilation, ctx.groups, repacked, _, relu) = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, qweight, scale, None if qweight.shape[2] else repacked,
                          output if relu else None)


def _conv2d_backward(ctx, grad):
    input, qweight, scale, repacked, rectified = ctx.saved_tensors
    taps = ctx.kernel_size[0] * ctx.kernel_size[1]
    qweight = reference.planes_of(qweight, repacked, input.shape[1] // ctx.groups * taps)
    if rectified is not None:
        grad = torch.where(rectified > 0, grad, 0.0)
    return *_conv2d_grads(ctx, grad, input, qweight, scale), *[None] * 10


def _conv2d_grads(ctx, grad, input, qweight, scale):
    """Gradients to input, qweight, scale and bias."""
    channels = input.shape[1] // ctx.groups
    in_features = channels * ctx.kernel_size[0] * ctx.kernel_size[1]
    shape = (qweight.shape[1], channels, *ctx.kernel_size)
    weight = torch.ops.blaq.unpack.default(qweight, scale, ctx.levels, ctx.group_size, in_features,
                                           input.dtype).reshape(shape)
    wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[2],
             ctx.has_bias and ctx.needs_input_grad[3]]
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad, input, weight, [shape[0]] if ctx.has_bias else None, ctx.stride, ctx.padding,
        ctx.dilation, False, [0, 0], ctx.groups, wants)
    grad_scale = None
    if ctx.needs_input_grad[2]:
        values = _unit_weight(qweight, scale, ctx.levels, ctx.group_size, in_features)
        grad_scale = _scale_grad(grad_weight.reshape(shape[0], -1), values, scale, ctx.group_size)
    return grad_input, None, grad_scale, grad_bias


def _binary_conv2d_setup(ctx, inputs, output):
    (input, qweight, scale, bias, ctx.group_size, ctx.kernel_size, ctx.stride, ctx.padding,
     ctx.dilation, ctx.groups, *_) = inputs
    ctx.levels, ctx.has_bias = (1.0,), bias is not None
    ctx.save_for_backward(input, qweight, scale)


def _binary_conv2d_backward(ctx, grad):
    input, qweight, scale = ctx.saved_tensors
    grad_input, *others = _conv2d_grads(ctx, grad, reference.signs(input), qweight, scale)
    if ctx.needs_input_grad[0]:
        grad_input = straight_through(grad_input, input)
    return grad_input, *others, *[None] * 7


def register() -> None:
    """Register every gradient; called once, on import of the package."""
    for name, setup, backward in (
        ("fake_quantize", _fake_quantize_setup, _fake_quantize_backward),
        ("packed_linear", _linear_setup, _linear_backward),
        ("packed_conv2d", _conv2d_setup, _conv2d_backward),
        ("binary_linear", _binary_linear_setup, _binary_linear_backward),
        ("binary_conv2d", _binary_conv2d_setup, _binary_conv2d_backward),
    ):
        torch.library.register_autograd(f"blaq::{name}", backward, setup_context=setup, lib=LIBRARY)

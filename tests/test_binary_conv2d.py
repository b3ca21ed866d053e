"""Convolutions of 1-bit inputs and 1-bit weights, against torch's own of the signs in float64."""

import pytest
import torch
from test_binary import (  # noqa: F401  (fixtures)
    DTYPES,
    alone,
    assert_close,
    binary_weight,
    inputs,
    straight_through,
    variant,
    weight_of,
)
from torch.nn import functional as F

import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.packed_rules import memory_format

# batch, channels, height, width, out, kernel, stride, padding, dilation, groups
CONVS = [
    (2, 3, 9, 7, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 16, 8, 8, 32, (3, 3), (2, 1), (1, 0), (1, 2), 2),
    (3, 8, 5, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 6, 11, 5, 6, (5, 3), (2, 2), (2, 2), (2, 1), 6),
    (1, 1, 12, 12, 20, (5, 5), (1, 1), (0, 0), (1, 1), 1),
    (1, 130, 14, 13, 130, (3, 3), (1, 2), (1, 1), (1, 1), 1),
    (2, 128, 4, 4, 10, (3, 3), (1, 1), (5, 4), (1, 1), 2),  # places where every tap is padding
    (1, 64, 70, 3, 65, (1, 2), (3, 1), (1, 1), (1, 2), 1),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def arguments(conv, group_size, dtype=torch.float32, layout="nchw", bias=True):
    batch, channels, height, width, out, kernel, *tail = conv
    x = inputs(batch, channels, height, width, dtype=dtype)
    k = channels // tail[-1] * kernel[0] * kernel[1]
    return (x.contiguous(memory_format=LAYOUTS[layout]), *binary_weight(out, k, group_size, dtype),
            torch.randn(out).to(dtype) if bias else None, group_size, kernel, *tail)


def repacked_of(args):
    x, qweight, kernel, groups = args[0], args[1], args[5], args[-1]
    taps = kernel[0] * kernel[1]
    return torch.ops.blaq.binary_repack(qweight, x.shape[1] // groups * taps, taps, groups)


def exact_conv2d(x, qweight, scale, bias, group_size, kernel, *tail):
    k = x.shape[1] // tail[-1] * kernel[0] * kernel[1]
    weight = weight_of(qweight, scale, group_size, k, x.dtype).reshape(qweight.shape[1], -1, *kernel)
    return F.conv2d(ref.signs(x).double(), weight, None if bias is None else bias.double(), *tail)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, -1])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_binary_conv2d(conv, group_size, dtype, layout):
    args = arguments(conv, group_size, dtype, layout, bias=conv is not CONVS[1])
    actual, exact = torch.ops.blaq.binary_conv2d(*args), exact_conv2d(*args)
    assert actual.dtype == dtype and actual.shape == exact.shape
    assert_close(actual, exact)
    assert actual.is_contiguous(memory_format=memory_format(args[0]))
    assert torch.equal(torch.ops.blaq.binary_conv2d(*args, repacked_of(args)), actual)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_sums_are_exact(conv):
    x, qweight, _, _, *rest = arguments(conv, 0)
    args = (x, qweight, torch.ones(1), None, *rest)
    assert torch.equal(torch.ops.blaq.binary_conv2d(*args), ref.binary_conv2d(*args))


@pytest.mark.parametrize("conv", [CONVS[0], CONVS[1], CONVS[5]], ids=str)
def test_variants_threads_layouts_and_batches_give_the_same_bits(conv, variant):  # noqa: F811
    x, *rest = arguments((5, *conv[1:]), -1)
    if variant != "none":
        blaq_kernels.set_cpu_capability(blaq_kernels.cpu_capabilities()[0])
    expected = torch.ops.blaq.binary_conv2d(x, *rest)
    if variant != "none":
        blaq_kernels.set_cpu_capability(variant)
    odd = torch.randn(5, *x.shape[2:], x.shape[1] + 3)[..., 3:].permute(0, 3, 1, 2).copy_(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for layout in (x, x.contiguous(memory_format=torch.channels_last), odd):
            assert torch.equal(torch.ops.blaq.binary_conv2d(layout, *rest), expected)
        assert torch.equal(torch.ops.blaq.binary_conv2d(x[2:3], *rest), expected[2:3])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch,out", [(0, 9), (2, 0), (0, 0)])
def test_binary_conv2d_of_nothing(batch, out, layout):
    for dtype in DTYPES:
        args = arguments((batch, 4, 6, 5, out, *CONVS[0][5:]), -1, dtype, layout)
        actual = torch.ops.blaq.binary_conv2d(*args)
        assert actual.shape == (batch, out, 6, 5) and actual.dtype == dtype


@pytest.mark.parametrize("conv", [CONVS[0], CONVS[1], CONVS[3]], ids=str)
@pytest.mark.parametrize("group_size", [0, -1])
def test_binary_conv2d_gradients(conv, group_size):
    x, qweight, scale, bias, _, kernel, *tail = arguments(conv, group_size, torch.float64)
    x = torch.randn_like(x)
    leaves = [t.requires_grad_() for t in (x, scale, bias)]
    y = torch.ops.blaq.binary_conv2d(x, qweight, scale, bias, group_size, kernel, *tail)
    k = x.shape[1] // tail[-1] * kernel[0] * kernel[1]
    weight = ref.unpack(qweight, scale, (1.0,), group_size, k, torch.float64)
    expected = F.conv2d(straight_through(x), weight.reshape(len(bias), -1, *kernel), bias, *tail)
    towards = torch.randn_like(y)
    for actual, wanted in zip(torch.autograd.grad(y, leaves, towards),
                              torch.autograd.grad(expected, leaves, towards), strict=True):
        torch.testing.assert_close(actual, wanted)

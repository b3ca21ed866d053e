"""The Triton convolution with packed weights against torch's, in Triton's interpreter or on a GPU."""

import math

import pytest
import torch
from test_triton_packed import (
    BOOKS,
    DTYPES,
    assert_rounded_once,
    assert_within_budget,
    packed_weight,
    tensor,
    wide_for,
)

from blaq_kernels import reference as ref
from blaq_kernels.packed_rules import memory_format
from blaq_kernels.triton import launch
from blaq_kernels.triton.linear_plans import ConvPlan
from blaq_kernels.triton.packed_conv2d import convolve, packed_conv2d

pytestmark = pytest.mark.skipif(not launch.interpreted() and not torch.cuda.is_available(),
                                reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# batch, channels, height, width, out, kernel, stride, padding, dilation, groups
CONVS = [
    (2, 3, 5, 7, 20, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 16, 8, 6, 32, (3, 3), (2, 1), (1, 0), (1, 2), 2),
    (3, 8, 5, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 3, 11, 5, 3, (5, 3), (2, 2), (2, 2), (2, 1), 3),
    (1, 30, 6, 7, 17, (3, 3), (2, 2), (1, 1), (1, 1), 1),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
CONV_PLANS = [ConvPlan(cols=32, rows=16, bytes=16, warps=4, stages=2),
              ConvPlan(cols=16, rows=32, bytes=16, warps=4, stages=2, splits=2)]


def conv_arguments(conv, levels, group_size, dtype=torch.float32, layout="nchw", bias=True):
    batch, channels, height, width, out, kernel, *tail = conv
    k = channels // tail[-1] * kernel[0] * kernel[1]
    x = tensor(batch, channels, height, width, dtype=dtype)
    return (x.contiguous(memory_format=LAYOUTS[layout]),
            *packed_weight(out, k, levels, group_size, wide_for(dtype)),
            tensor(out, dtype=dtype) if bias else None, levels, group_size, kernel, *tail)


def exact_conv2d(x, qweight, scale, bias, levels, group_size, kernel, *tail):
    k = x.shape[1] // tail[-1] * kernel[0] * kernel[1]
    weight = ref.unpack(qweight, scale, levels, group_size, k, x.dtype)
    weight = weight.reshape(qweight.shape[1], -1, *kernel)
    return torch.nn.functional.conv2d(x.double(), weight.double(),
                                      None if bias is None else bias.double(), *tail)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("book,group_size,dtype", [
    ("binary", -1, torch.float16), ("pow2-2", 5, torch.bfloat16), ("ternary", 0, torch.float32),
    ("three", -1, torch.bfloat16), ("pow2-4", 0, torch.float16), ("pow2-4", -1, torch.bfloat16)])
def test_implicit_convolution(book, group_size, dtype, layout):
    for conv, plan in zip(CONVS, CONV_PLANS * 3, strict=False):
        args = conv_arguments(conv, BOOKS[book], group_size, dtype, layout)
        exact = exact_conv2d(*args)
        actual = torch.full_like(ref.packed_conv2d(*args), math.nan,
                                 memory_format=memory_format(args[0]))
        convolve(*args, actual, plan)
        assert_within_budget(actual, ref.packed_conv2d(*args), exact)
        assert_rounded_once(actual, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_conv2d_by_its_own_plan(dtype, layout):
    for conv in (*CONVS[1:4], (1, 16, 5, 6, 17, (1, 1), (1, 1), (0, 0), (1, 1), 1)):
        args = conv_arguments(conv, BOOKS["pow2-2"], -1, dtype, layout, bias=conv is CONVS[1])
        actual, exact = packed_conv2d(*args), exact_conv2d(*args)
        assert_within_budget(actual, ref.packed_conv2d(*args), exact)
        assert actual.is_contiguous(memory_format=memory_format(args[0]))


def test_packed_conv2d_of_any_layout():
    x, *rest = conv_arguments(CONVS[4], BOOKS["pow2-4"], 0, torch.bfloat16)
    expected = packed_conv2d(x, *rest)
    odd = torch.randn(1, *x.shape[2:], x.shape[1] + 3).to(x)[..., 3:].permute(0, 3, 1, 2).copy_(x)
    for layout in (x.contiguous(memory_format=torch.channels_last), odd):
        assert torch.equal(packed_conv2d(layout, *rest), expected)


@pytest.mark.parametrize("batch,out", [(0, 9), (2, 0), (0, 0)])
def test_packed_conv2d_of_nothing(batch, out):
    for layout in LAYOUTS:
        args = conv_arguments((batch, 4, 6, 5, out, *CONVS[0][5:]), (1.0,), -1, torch.bfloat16, layout)
        actual = packed_conv2d(*args)
        assert actual.shape == (batch, out, 6, 5) and actual.dtype == torch.bfloat16

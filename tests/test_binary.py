"""Products of 1-bit inputs and 1-bit weights: kernels in every variant against the reference."""

import math

import pytest
import torch
from torch.nn import functional as F

import blaq_kernels
from blaq_kernels import reference as ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-7, -1e-7)


@pytest.fixture(params=blaq_kernels.cpu_capabilities() or ["none"], autouse=True)
def variant(request):
    if request.param == "none":
        yield request.param
        return
    before = blaq_kernels.cpu_capability()
    blaq_kernels.set_cpu_capability(request.param)
    yield request.param
    blaq_kernels.set_cpu_capability(before)


@pytest.fixture(autouse=True)
def alone():
    """One seed, and one thread but where a test is about threads."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def binary_weight(n, k, group_size, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    qweight = ref.pack(torch.randint(0, 2, (n, k), dtype=torch.uint8), 1)
    return qweight, torch.rand(ref.scale_shape((n, k), group_size), dtype=wide) + 0.1


def inputs(*shape, dtype=torch.float32):
    x = torch.randn(shape).to(dtype)
    flat = x.view(-1)
    flat[:len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)[:flat.numel()]
    return x


def weight_of(qweight, scale, group_size, k, dtype):
    """float64, as training had it: rounded to the input's dtype."""
    return ref.unpack(qweight, scale, (1.0,), group_size, k, dtype).double()


def exact_linear(x, qweight, scale, bias, group_size):
    weight = weight_of(qweight, scale, group_size, x.shape[-1], x.dtype)
    return F.linear(ref.signs(x).double(), weight, None if bias is None else bias.double())


def assert_close(actual, exact):
    """Sums are exact, so what is left is a few roundings to float32 and one to the dtype."""
    error = (actual.double() - exact).norm()
    assert error <= (torch.finfo(actual.dtype).eps / 2 + 4e-7) * exact.norm()


LINEARS = [(1, 1, 1), (3, 7, 13), (1, 64, 512), (9, 130, 97), (35, 300, 600), (5, 129, 515),
           (4, 16, 8000), (17, 1000, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, -1, 64, 192])
def test_binary_linear(group_size, dtype):
    for m, n, k in LINEARS:
        x, bias = inputs(m, k, dtype=dtype), torch.randn(n).to(dtype)
        qweight, scale = binary_weight(n, k, group_size, dtype)
        for b in (bias, None):
            actual = torch.ops.blaq.binary_linear(x, qweight, scale, b, group_size)
            assert actual.dtype == dtype and actual.shape == (m, n)
            assert_close(actual, exact_linear(x, qweight, scale, b, group_size))
            repacked = torch.ops.blaq.binary_repack(qweight, k, 1, 1)
            assert torch.equal(actual, torch.ops.blaq.binary_linear(x, qweight, scale, b, group_size,
                                                                    repacked))


def test_sums_are_exact():
    x, (qweight, _) = inputs(40, 3001), binary_weight(77, 3001, 0)
    actual = torch.ops.blaq.binary_linear(x, qweight, torch.ones(1), None, 0)
    assert torch.equal(actual, ref.binary_linear(x, qweight, torch.ones(1), None, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_nan_count_as_positive(dtype):
    x = torch.tensor([SPECIAL], dtype=torch.float64).to(dtype)
    qweight = ref.pack(torch.eye(7, dtype=torch.uint8), 1)  # Σ x - 2 x_i
    scale = torch.ones(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    signs = [1, 1, 1, 1, -1, 1, -1]
    y = torch.ops.blaq.binary_linear(x, qweight, scale, None, 0)
    assert y[0].tolist() == [sum(signs) - 2 * s for s in signs]


def test_smallest_numbers_have_a_sign():
    for dtype in DTYPES:
        tiny = torch.tensor([1], dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        x = -tiny.view(dtype).expand(1, 70)
        scale = torch.ones(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        qweight = torch.zeros(1, 2, 9, dtype=torch.uint8)
        assert (torch.ops.blaq.binary_linear(x, qweight, scale, None, 0) == -70).all()


def test_bits_past_the_last_input_are_ignored():
    x, (qweight, scale) = inputs(4, 13), binary_weight(5, 13, 0)
    dirty = qweight | torch.tensor([0, 0b11100000], dtype=torch.uint8)
    assert torch.equal(torch.ops.blaq.binary_linear(x, dirty, scale, None, 0),
                       torch.ops.blaq.binary_linear(x, qweight, scale, None, 0))


@pytest.mark.parametrize("group_size", [0, -1, 64])
@pytest.mark.parametrize("m,n,k", [(0, 5, 9), (4, 0, 9), (4, 5, 0), (0, 0, 0)])
def test_binary_linear_of_nothing(m, n, k, group_size):
    for dtype in DTYPES:
        qweight, scale = binary_weight(n, k, group_size, dtype)
        bias = torch.randn(n).to(dtype)
        actual = torch.ops.blaq.binary_linear(torch.randn(m, k, dtype=dtype), qweight, scale, bias,
                                              group_size)
        assert actual.dtype == dtype and torch.equal(actual, bias.expand(m, n))


def test_binary_linear_of_any_layout():
    x, (qweight, scale) = inputs(2, 3, 96), binary_weight(70, 96, -1)
    expected = torch.ops.blaq.binary_linear(x, qweight, scale, None, -1)
    assert expected.shape == (2, 3, 70)
    layouts = [x.transpose(0, 2).contiguous().transpose(0, 2),
               torch.randn(2, 3, 200)[..., 3:195:2].copy_(x),
               torch.cat([torch.zeros(1, 3, 96), x])[1:]]
    for layout in layouts:
        assert torch.equal(torch.ops.blaq.binary_linear(layout, qweight, scale, None, -1), expected)
    one = torch.ops.blaq.binary_linear(x[1, 2], qweight, scale, None, -1)
    assert torch.equal(one, expected[1, 2])


@pytest.mark.parametrize("group_size", [0, 64])
def test_variants_threads_and_batches_give_the_same_bits(group_size, variant):
    x, (qweight, scale) = inputs(301, 650), binary_weight(1111, 650, group_size)
    args = (qweight, scale, torch.randn(1111), group_size)
    if variant != "none":
        blaq_kernels.set_cpu_capability(blaq_kernels.cpu_capabilities()[0])
    expected = torch.ops.blaq.binary_linear(x, *args)
    if variant != "none":
        blaq_kernels.set_cpu_capability(variant)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (slice(0, 301), slice(0, 1), slice(3, 5), slice(10, 17), slice(0, 40)):
            assert torch.equal(torch.ops.blaq.binary_linear(x[rows], *args), expected[rows])


@pytest.mark.parametrize("n,channels,taps,groups", [(5, 13, 1, 1), (24, 70, 9, 2), (9, 3, 4, 3), (0, 5, 2, 1),
                                                    (4, 0, 2, 2), (64, 128, 9, 1), (20, 130, 4, 1)])
def test_binary_repack(n, channels, taps, groups):
    qweight, _ = binary_weight(n, channels * taps, 0)
    assert torch.equal(torch.ops.blaq.binary_repack(qweight, channels * taps, taps, groups),
                       ref.binary_repack(qweight, channels * taps, taps, groups))


def straight_through(x):
    """The sign with the gradient of a clipped identity, in torch's own operations."""
    clipped = x.clamp(-1, 1)
    return clipped + (ref.signs(x) - clipped).detach()


@pytest.mark.parametrize("group_size", [0, -1, 64])
def test_binary_linear_gradients(group_size):
    qweight, scale = binary_weight(6, 130, group_size, torch.float64)
    x, bias = torch.randn(4, 130, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, scale, bias)]
    y = torch.ops.blaq.binary_linear(x, qweight, scale, bias, group_size)
    weight = ref.unpack(qweight, scale, (1.0,), group_size, 130, torch.float64)
    expected = F.linear(straight_through(x), weight, bias)
    towards = torch.randn_like(y)
    for actual, wanted in zip(torch.autograd.grad(y, leaves, towards),
                              torch.autograd.grad(expected, leaves, towards), strict=True):
        torch.testing.assert_close(actual, wanted)
    assert torch.autograd.gradcheck(  # the true derivative: nothing is rounded on this way
        lambda s, b: torch.ops.blaq.binary_linear(x.detach(), qweight, s, b, group_size), (scale, bias))

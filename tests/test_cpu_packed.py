"""C++ CPU kernels on packed weights against the reference, in every variant that can run here."""

import math

import pytest
import torch

import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of
from blaq_kernels.packed_rules import memory_format

pytestmark = pytest.mark.skipif(not blaq_kernels.cpu_capabilities(), reason="needs blaq_kernels._C")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BOOKS = {
    "binary": levels_of("binary", 1), "pow2-2": levels_of("pow2", 2),
    "ternary": levels_of("ternary", 2), "uniform-2": levels_of("uniform", 2),
    "pow2-3": levels_of("pow2", 3), "three": (0.2, 0.6, 1.0), "linear-3": levels_of("linear", 3),
    "pow2-4": levels_of("pow2", 4), "five": (0.0, 0.1, 0.3, 0.35, 1.0),
    "uniform-4": levels_of("uniform", 4), "pow2_zero-4": levels_of("pow2_zero", 4),
}
FINE_BOOKS = {"uniform-8": tuple((2 * i + 1) / 255 for i in range(128)),
              "ten": tuple(i / 9 for i in range(10))}
SHAPES = [(3, 13), (1, 1000), (5, 64), (7, 129), (3,), (0, 5), (4, 0), (2, 3, 5, 5), (60, 1001)]
GROUPS = [0, -1, 5, 64]


@pytest.fixture(params=blaq_kernels.cpu_capabilities(), autouse=True)
def variant(request):
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


def bytes_of(x):
    """The tensor's bits, NaNs made alike."""
    return x.masked_fill(x.isnan(), math.nan).contiguous().view(torch.uint8)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(bytes_of(actual), bytes_of(expected))


def random_codes(shape, levels):
    """Codes of existing levels only."""
    sign_bit = ref.bits_of(levels) - 1
    index = torch.randint(0, len(levels), shape, dtype=torch.uint8)
    return torch.randint(0, 2, shape, dtype=torch.uint8) << sign_bit | index


def test_kernels_serve_the_ops():
    serving = blaq_kernels.serving()
    for op in ("fake_quantize", "pack", "unpack", "repack", "packed_linear", "packed_conv2d"):
        assert serving[op].startswith("C++"), op


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack(shape, bits):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    qweight = torch.ops.blaq.pack(codes, bits)
    assert torch.equal(qweight, ref.pack(codes, bits))
    n, k = ref.matrix_shape(shape)
    assert torch.equal(ref.unpack_codes(qweight, k), codes.reshape(n, k))


def test_pack_names_the_largest_code_wherever_it_is():
    for at in (0, 63, 64, 129 * 70 - 1):
        codes = torch.zeros(70, 129, dtype=torch.uint8)
        codes.view(-1)[at] = 130
        with pytest.raises(ValueError, match=r"pack: codes must be below 2\^bits = 8, got 130"):
            torch.ops.blaq.pack(codes, 3)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("book", BOOKS)
def test_unpack(book, group_size):
    levels = BOOKS[book]
    for shape in SHAPES:
        n, k = ref.matrix_shape(shape)
        qweight = ref.pack(random_codes((n, k), levels), ref.bits_of(levels))
        for scale_dtype in (torch.float32, torch.float64):
            scale = torch.randn(ref.scale_shape((n, k), group_size), dtype=scale_dtype)
            for dtype in DTYPES:
                args = (qweight, scale, levels, group_size, k, dtype)
                assert_same_bits(torch.ops.blaq.unpack(*args), ref.unpack(*args))


def test_unpack_of_a_code_without_level_is_nan():
    codes = torch.arange(8, dtype=torch.uint8).repeat(2, 9)
    args = (ref.pack(codes, 3), torch.ones(1), (0.2, 0.6, 1.0), 0, 72, torch.float32)
    weight = torch.ops.blaq.unpack(*args)
    assert torch.equal(weight.isnan(), (codes & 3) == 3)
    assert_same_bits(weight, ref.unpack(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("book", [*BOOKS, *FINE_BOOKS])
def test_fake_quantize(book, group_size, dtype):
    levels = {**BOOKS, **FINE_BOOKS}[book]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30]
    for shape in SHAPES:
        latent = torch.randn(shape, dtype=dtype)
        flat = latent.view(-1)
        flat[:len(special)] = torch.tensor(special, dtype=dtype)[:flat.numel()]
        scale = torch.rand(ref.scale_shape(shape, group_size), dtype=wide)
        assert_same_bits(torch.ops.blaq.fake_quantize(latent, scale, levels, group_size),
                         ref.fake_quantize(latent, scale, levels, group_size))


@pytest.mark.parametrize("book", [*BOOKS, *FINE_BOOKS])
@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
def test_fake_quantize_with_a_scale_that_training_broke(book, value):
    levels = {**BOOKS, **FINE_BOOKS}[book]
    latent, scale = torch.randn(3, 50), torch.tensor([[value], [1.0], [value]])
    assert_same_bits(torch.ops.blaq.fake_quantize(latent, scale, levels, -1),
                     ref.fake_quantize(latent, scale, levels, -1))


def test_fake_quantize_on_the_thresholds():
    levels = levels_of("pow2", 4)
    scale = torch.rand(1) + 0.5
    on = torch.cat([scale * mid for mid in ref.midpoints(levels)])
    near = torch.cat([on, on.nextafter(on * 0), on.nextafter(on * 2)])
    latent = torch.cat([near, -near])
    assert_same_bits(torch.ops.blaq.fake_quantize(latent, scale, levels, 0),
                     ref.fake_quantize(latent, scale, levels, 0))


@pytest.mark.parametrize("group_size", GROUPS)
def test_packing_what_was_quantized_loses_nothing(group_size):
    levels = levels_of("pow2", 3)
    latent = torch.randn(37, 203)
    codes, scale = ref.solve(latent, torch.ones_like(latent), None, levels, group_size, 5, "exact")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        param = torch.ops.blaq.fake_quantize(latent, scale, levels, group_size).to(dtype)
        qweight = torch.ops.blaq.pack(codes, 3)
        unpacked = torch.ops.blaq.unpack(qweight, scale, levels, group_size, 203, dtype)
        assert_same_bits(unpacked, param)


@pytest.mark.parametrize("shape", [(1, 50_001), (333, 1001), (50_000, 3)], ids=str)
def test_codes_do_not_depend_on_the_thread_count(shape):
    levels = levels_of("linear", 4)
    codes, scale = random_codes(shape, levels), torch.rand(ref.scale_shape(shape, 7))
    latent, qweight = torch.randn(shape), ref.pack(codes, 4)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.blaq.pack(codes, 4), qweight)
        assert_same_bits(torch.ops.blaq.unpack(qweight, scale, levels, 7, shape[1], torch.float16),
                         ref.unpack(qweight, scale, levels, 7, shape[1], torch.float16))
        assert_same_bits(torch.ops.blaq.fake_quantize(latent, scale, levels, 7),
                         ref.fake_quantize(latent, scale, levels, 7))


def packed_weight(n, k, levels, group_size, dtype=torch.float32):
    qweight = ref.pack(random_codes((n, k), levels), ref.bits_of(levels))
    return qweight, torch.rand(ref.scale_shape((n, k), group_size), dtype=dtype) + 0.1


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_within_budget(actual, low_precision, exact):
    """Twice the error of torch's own op on the unpacked weight, and one rounding."""
    assert actual.dtype == low_precision.dtype and actual.shape == low_precision.shape
    budget = 2 * relative_error(low_precision, exact) + torch.finfo(actual.dtype).eps / 2
    error = relative_error(actual, exact)
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def assert_rounded_once(actual, exact):
    """Against the float64 result of the very weight that the dtype holds."""
    error = relative_error(actual, exact)
    assert error <= torch.finfo(actual.dtype).eps / 2 + 1e-6, f"error {error:.2e}"


def exact_linear(x, qweight, scale, bias, levels, group_size):
    """float64, with the weight that training had: rounded to the input's dtype."""
    weight = ref.unpack(qweight, scale, levels, group_size, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x.double(), weight.double(),
                                      None if bias is None else bias.double())


# (rows, N, K): odd ones, one word and many, more than a chunk and more than a tile.
LINEAR_SHAPES = [(1, 64, 512), (1, 200, 1000), (3, 7, 13), (5, 129, 515), (2, 65, 32), (9, 130, 97),
                 (35, 300, 600), (1, 1, 1), (4, 64, 5000), (3, 130, 9001)]


@pytest.mark.parametrize("group_size", [0, -1, 5, 32, 128])
@pytest.mark.parametrize("book", BOOKS)
def test_packed_linear(book, group_size):
    levels = BOOKS[book]
    for m, n, k in LINEAR_SHAPES:
        qweight, scale = packed_weight(n, k, levels, group_size)
        args = (torch.randn(m, k), qweight, scale, torch.randn(n), levels, group_size)
        assert_within_budget(torch.ops.blaq.packed_linear(*args), ref.packed_linear(*args),
                             exact_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, -1, 5, 32])
@pytest.mark.parametrize("book", ["binary", "pow2-2", "ternary", "uniform-2", "linear-3", "pow2-4"])
def test_packed_linear_of_every_dtype(book, group_size, dtype):
    levels = BOOKS[book]
    cases = ((40, 700), 150, True), ((2, 3, 77), 5, False), ((300,), 64, True)
    for size in (1.0, 1e-3):  # the smaller makes float16 weights subnormal
        for shape, n, bias in cases:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            qweight, scale = packed_weight(n, shape[-1], levels, group_size, wide)
            args = (torch.randn(shape, dtype=dtype), qweight, size * scale,
                    size * torch.randn(n, dtype=dtype) if bias else None, levels, group_size)
            actual, exact = torch.ops.blaq.packed_linear(*args), exact_linear(*args)
            assert_within_budget(actual, ref.packed_linear(*args), exact)
            assert_rounded_once(actual, exact)


def test_one_bit_is_more_exact_than_bfloat16():
    qweight, scale = packed_weight(512, 4096, (1.0,), 0)
    x = torch.randn(4, 4096)
    args = (x, qweight, scale, None, (1.0,), 0)
    exact = exact_linear(*args)
    low = ref.packed_linear(x.bfloat16(), *args[1:])
    error = relative_error(torch.ops.blaq.packed_linear(*args), exact)
    assert error < relative_error(low, exact) / 1000


@pytest.mark.parametrize("group_size", [0, 32, 7])
@pytest.mark.parametrize("book", ["binary", "pow2-2", "pow2-4"])
def test_packed_linear_does_not_depend_on_threads_or_on_the_batch(book, group_size):
    levels = BOOKS[book]
    qweight, scale = packed_weight(1111, 650, levels, group_size)
    x = torch.randn(71, 650)
    args = (qweight, scale, None, levels, group_size)
    expected = torch.ops.blaq.packed_linear(x, *args)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.blaq.packed_linear(x, *args), expected)
        for rows in (slice(0, 1), slice(3, 5), slice(10, 17), slice(0, 40)):
            assert torch.equal(torch.ops.blaq.packed_linear(x[rows], *args), expected[rows])


@pytest.mark.parametrize("book", ["binary", "pow2-4"])
def test_packed_linear_of_any_layout(book):
    levels = BOOKS[book]
    qweight, scale = packed_weight(70, 96, levels, 0)
    x = torch.randn(6, 96)
    expected = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, 0)
    layouts = {"transposed": x.t().contiguous().t(),
               "sliced": torch.randn(6, 200)[:, 3:195:2].copy_(x),
               "offset": torch.cat([torch.zeros(1, 96), x])[1:]}
    for name, layout in layouts.items():
        actual = torch.ops.blaq.packed_linear(layout, qweight, scale, None, levels, 0)
        assert torch.equal(actual, expected) and actual.is_contiguous(), name
    repeated = torch.ops.blaq.packed_linear(x[:1].expand(5, 96), qweight, scale, None, levels, 0)
    assert torch.equal(repeated, expected[:1].expand(5, 70))
    one = torch.ops.blaq.packed_linear(x[2], qweight, scale, None, levels, 0)
    assert one.shape == (70,) and torch.equal(one, expected[2])


@pytest.mark.parametrize("m,n,k", [(0, 5, 9), (4, 0, 9), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("group_size", [0, -1, 4])
def test_packed_linear_of_nothing(m, n, k, group_size):
    qweight, scale = packed_weight(n, k, (0.5, 1.0), group_size)
    for dtype in DTYPES:
        x, bias = torch.randn(m, k, dtype=dtype), torch.randn(n, dtype=dtype)
        wide = scale.double() if dtype == torch.float64 else scale
        actual = torch.ops.blaq.packed_linear(x, qweight, wide, bias, (0.5, 1.0), group_size)
        assert actual.dtype == dtype and torch.equal(actual, bias.expand(m, n))


@pytest.mark.parametrize("book", BOOKS)
def test_infinite_and_undefined_inputs_stay_so(book):
    levels = BOOKS[book]
    qweight, scale = packed_weight(130, 64, levels, 0)
    for special in (math.inf, -math.inf, math.nan):
        x = torch.randn(3, 64)
        x[1, 17] = special
        args = (x, qweight, scale, None, levels, 0)
        actual, expected = torch.ops.blaq.packed_linear(*args), ref.packed_linear(*args)
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_code_without_level_makes_its_output_undefined():
    levels = (0.2, 0.6, 1.0)
    codes = random_codes((40, 90), levels)
    codes[7, 80] = 3
    y = torch.ops.blaq.packed_linear(torch.randn(2, 90), ref.pack(codes, 3), torch.ones(1), None,
                                     levels, 0)
    assert y[:, 7].isnan().all() and not y[:, :7].isnan().any() and not y[:, 8:].isnan().any()


# batch, channels, height, width, out, kernel, stride, padding, dilation, groups
CONVS = [
    (2, 3, 9, 7, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 16, 8, 8, 32, (3, 3), (2, 1), (1, 0), (1, 2), 2),
    (3, 8, 5, 6, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 6, 11, 5, 6, (5, 3), (2, 2), (2, 2), (2, 1), 6),
    (1, 1, 12, 12, 20, (5, 5), (1, 1), (0, 0), (1, 1), 1),
    (1, 40, 14, 13, 130, (3, 3), (1, 2), (1, 1), (1, 1), 1),
    (2, 83, 9, 12, 83, (3, 2), (1, 3), (1, 2), (2, 1), 83),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def conv_arguments(conv, levels, group_size, dtype=torch.float32, layout="nchw", bias=True):
    batch, channels, height, width, out, kernel, *tail = conv
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k = channels // tail[-1] * kernel[0] * kernel[1]
    x = torch.randn(batch, channels, height, width).to(dtype)
    return (x.contiguous(memory_format=LAYOUTS[layout]),
            *packed_weight(out, k, levels, group_size, wide),
            torch.randn(out).to(dtype) if bias else None, levels, group_size, kernel, *tail)


def exact_conv2d(x, qweight, scale, bias, levels, group_size, kernel, *tail):
    k = x.shape[1] // tail[-1] * kernel[0] * kernel[1]
    weight = ref.unpack(qweight, scale, levels, group_size, k, x.dtype)
    weight = weight.reshape(qweight.shape[1], -1, *kernel)
    return torch.nn.functional.conv2d(x.double(), weight.double(),
                                      None if bias is None else bias.double(), *tail)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [0, -1, 5, 32])
@pytest.mark.parametrize("book", ["binary", "ternary", "three", "pow2-4"])
def test_packed_conv2d(book, group_size, layout):
    for conv in CONVS:
        args = conv_arguments(conv, BOOKS[book], group_size, layout=layout)
        actual = torch.ops.blaq.packed_conv2d(*args)
        assert_within_budget(actual, ref.packed_conv2d(*args), exact_conv2d(*args))
        assert actual.is_contiguous(memory_format=memory_format(args[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", ["pow2-2", "linear-3"])
def test_packed_conv2d_of_every_dtype(book, dtype, layout):
    for conv in (*CONVS[:2], CONVS[3]):
        args = conv_arguments(conv, BOOKS[book], -1, dtype, layout, bias=conv is CONVS[0])
        actual, exact = torch.ops.blaq.packed_conv2d(*args), exact_conv2d(*args)
        assert_within_budget(actual, ref.packed_conv2d(*args), exact)
        assert_rounded_once(actual, exact)
        assert actual.is_contiguous(memory_format=memory_format(args[0]))


@pytest.mark.parametrize("conv", [CONVS[0], CONVS[1], CONVS[5]], ids=str)
@pytest.mark.parametrize("book", ["binary", "pow2-4"])
def test_packed_conv2d_does_not_depend_on_threads_layout_or_batch(book, conv):
    x, *rest = conv_arguments((5, *conv[1:]), BOOKS[book], 0)
    expected = torch.ops.blaq.packed_conv2d(x, *rest)
    odd = torch.randn(5, *x.shape[2:], x.shape[1] + 3)[..., 3:].permute(0, 3, 1, 2).copy_(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for layout in (x, x.contiguous(memory_format=torch.channels_last), odd):
            assert torch.equal(torch.ops.blaq.packed_conv2d(layout, *rest), expected)
        assert torch.equal(torch.ops.blaq.packed_conv2d(x[2:3], *rest), expected[2:3])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch,out", [(0, 9), (2, 0), (0, 0)])
def test_packed_conv2d_of_nothing(batch, out, layout):
    for dtype in DTYPES:
        args = conv_arguments((batch, 4, 6, 5, out, *CONVS[0][5:]), (1.0,), -1, dtype, layout)
        actual = torch.ops.blaq.packed_conv2d(*args)
        assert actual.shape == (batch, out, 6, 5) and actual.dtype == dtype

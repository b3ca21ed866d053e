"""Triton kernels on packed weights against the reference, in Triton's interpreter where no GPU is."""

import math

import numpy as np
import pytest
import torch
from quantized import same_bits

from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

pytest.importorskip("triton")
from blaq_kernels.triton import launch, linear_plans, workspace
from blaq_kernels.triton.decode import _pair_asm
from blaq_kernels.triton.fake_quantize import fake_quantize
from blaq_kernels.triton.linear_plans import (CONV_LARGE, CONV_SMALL, DECODE, HOPPER, OTHERS,
                                              Plan, Target, conv_plan_for, plan_for)
from blaq_kernels.triton.pack import pack
from blaq_kernels.triton.packed_conv2d import packed_conv2d
from blaq_kernels.triton.packed_linear import matmul, packed_linear, product_of, scale_mode
from blaq_kernels.triton.unpack import unpack

pytestmark = pytest.mark.skipif(not launch.interpreted() and not torch.cuda.is_available(),
                                reason="needs a GPU or TRITON_INTERPRET=1")
DEVICE = "cpu" if launch.interpreted() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = DTYPES[:3]
BOOKS = {
    "binary": levels_of("binary", 1), "pow2-2": levels_of("pow2", 2),
    "ternary": levels_of("ternary", 2), "uniform-2": levels_of("uniform", 2),
    "pow2-3": levels_of("pow2", 3), "three": (0.2, 0.6, 1.0), "pow2-4": levels_of("pow2", 4),
    "five": (0.0, 0.1, 0.3, 0.35, 1.0), "uniform-4": levels_of("uniform", 4),
    "pow2_zero-4": levels_of("pow2_zero", 4),
}
SHAPES = [(3, 13), (1, 1000), (9, 64), (3,), (0, 5), (4, 0), (2, 3, 5, 5)]
GROUPS = [0, -1, 5, 128]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def random_codes(shape, levels):
    """Codes of existing levels only."""
    sign_bit = ref.bits_of(levels) - 1
    index = torch.randint(0, len(levels), shape, dtype=torch.uint8)
    return (torch.randint(0, 2, shape, dtype=torch.uint8) << sign_bit | index).to(DEVICE)


def packed_weight(n, k, levels, group_size, dtype=torch.float32):
    qweight = ref.pack(random_codes((n, k), levels), ref.bits_of(levels))
    scale = torch.rand(ref.scale_shape((n, k), group_size), dtype=dtype) + 0.1
    return qweight, scale.to(DEVICE)


def wide_for(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_nan(x):
    return x.masked_fill(x.isnan(), math.nan)  # NaNs have many bits


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
    weight = ref.unpack(qweight, scale, levels, group_size, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x.double(), weight.double(),
                                      None if bias is None else bias.double())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (17, 2049)], ids=str)
def test_pack(shape, bits):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8).to(DEVICE)
    assert torch.equal(pack(codes, bits), ref.pack(codes, bits))


@pytest.mark.parametrize("group_size", GROUPS[:3])
@pytest.mark.parametrize("book", BOOKS)
def test_unpack(book, group_size):
    levels = BOOKS[book]
    for n, k in ((3, 13), (1, 1000), (9, 40), (0, 5), (4, 0)):
        qweight, scale = packed_weight(n, k, levels, group_size)
        for wide, dtypes in ((scale, DTYPES), (scale.double() / 3, DTYPES[1:] if n == 9 else ())):
            for dtype in dtypes if k < 1000 else DTYPES[1:2]:
                args = (qweight, wide, levels, group_size, k, dtype)
                assert same_bits(unpack(*args), ref.unpack(*args))


def test_unpack_of_a_code_without_level_is_nan():
    codes = torch.arange(8, dtype=torch.uint8, device=DEVICE).repeat(2, 9)
    weight = unpack(ref.pack(codes, 3), torch.ones(1, device=DEVICE), (0.2, 0.6, 1.0), 0, 72,
                    torch.float32)
    assert torch.equal(weight.isnan(), (codes & 3) == 3)


def test_unpack_of_negative_zero():
    codes = torch.arange(4, dtype=torch.uint8, device=DEVICE).repeat(1, 4)
    for levels in ((0.0, 1.0), (0.0, 0.3, 1.0)):
        args = (ref.pack(codes, ref.bits_of(levels)), torch.full((1,), 0.5, device=DEVICE), levels, 0,
                16, torch.bfloat16)
        assert same_bits(unpack(*args), ref.unpack(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("levels", [*BOOKS.values(), tuple(i / 9 for i in range(10))], ids=len)
def test_fake_quantize(levels, group_size, dtype):
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30]
    for shape in SHAPES:
        latent = tensor(*shape, dtype=dtype)
        flat = latent.view(-1)
        flat[:len(special)] = torch.tensor(special, dtype=dtype)[:flat.numel()].to(DEVICE)
        scale = torch.rand(ref.scale_shape(shape, group_size), dtype=wide_for(dtype)).to(DEVICE)
        actual = fake_quantize(latent, scale, levels, group_size)
        expected = ref.fake_quantize(latent, scale, levels, group_size)
        assert same_bits(without_nan(actual), without_nan(expected))


def test_fake_quantize_with_128_levels():
    levels = tuple((2 * i + 1) / 255 for i in range(128))
    latent, scale = tensor(7, 300), torch.rand(7, 1).to(DEVICE)
    assert same_bits(fake_quantize(latent, scale, levels, -1),
                     ref.fake_quantize(latent, scale, levels, -1))


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
def test_fake_quantize_with_a_scale_that_training_broke(value):
    latent = tensor(3, 50)
    scale = torch.tensor([[value], [1.0], [value]]).to(DEVICE)
    for levels in BOOKS.values():
        actual, expected = (f(latent, scale, levels, -1) for f in (fake_quantize, ref.fake_quantize))
        assert same_bits(without_nan(actual), without_nan(expected))


def test_fake_quantize_on_the_thresholds():
    levels = levels_of("pow2", 4)
    scale = torch.rand(1) + 0.5
    on = torch.cat([scale * mid for mid in ref.midpoints(levels)])
    near = torch.cat([on, on.nextafter(on * 0), on.nextafter(on * 2)])
    latent, scale = torch.cat([near, -near]).to(DEVICE), scale.to(DEVICE)
    assert same_bits(fake_quantize(latent, scale, levels, 0),
                     ref.fake_quantize(latent, scale, levels, 0))


# (rows, N, K): odd ones, one tile of k and many, more than a tile of outputs.
LINEAR_SHAPES = [(1, 7, 512), (3, 70, 13), (16, 9, 270), (1, 1, 1)]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("group_size", [0, -1, 5, 256])
@pytest.mark.parametrize("book", BOOKS)
def test_packed_linear_with_few_rows(book, group_size, dtype):
    levels = BOOKS[book]
    for m, n, k in LINEAR_SHAPES if group_size == 0 else LINEAR_SHAPES[2:3]:
        args = (tensor(m, k, dtype=dtype), *packed_weight(n, k, levels, group_size),
                tensor(n, dtype=dtype), levels, group_size)
        actual, exact = packed_linear(*args), exact_linear(*args)
        assert_within_budget(actual, ref.packed_linear(*args), exact)
        assert_rounded_once(actual, exact)


PLANS = [Plan(cols=16, rows=64, bytes=16, warps=4, stages=2, interleaved=False, splits=3),
         Plan(cols=32, rows=32, bytes=32, warps=4, stages=2, interleaved=True),
         Plan(cols=16, rows=16, bytes=16, warps=4, stages=2, interleaved=True, splits=2)]


@pytest.mark.parametrize("dtype", NARROW[1:], ids=str)
@pytest.mark.parametrize("book,group_size", [("binary", 0), ("pow2-2", 128), ("three", -1),
                                             ("pow2-4", 5), ("pow2-4", -1), ("pow2_zero-4", 0)])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.cols}x{plan.rows}x{plan.splits}")
def test_packed_linear_with_many_rows(plan, book, group_size, dtype):
    levels = BOOKS[book]
    for m, n, k in ((33, 20, 300), (16, 17, 256)):
        x, (qweight, scale) = tensor(m, k, dtype=dtype), packed_weight(n, k, levels, group_size)
        bias = tensor(n, dtype=dtype)
        actual = torch.full((m, n), math.nan, dtype=dtype, device=DEVICE)
        matmul(x, qweight, scale, bias, levels, group_size, actual, plan)
        args = (x, qweight, scale, bias, levels, group_size)
        assert_within_budget(actual, ref.packed_linear(*args), exact_linear(*args))
        assert_rounded_once(actual, exact_linear(*args))


def test_parts_of_more_rows_are_added_by_a_launch_of_their_own():
    levels, m, n, k = BOOKS["pow2-4"], 65, 20, 300
    x, (qweight, scale) = tensor(m, k, dtype=torch.bfloat16), packed_weight(n, k, levels, -1)
    bias, actual = tensor(n, dtype=torch.bfloat16), torch.empty(m, n, dtype=torch.bfloat16).to(DEVICE)
    args = (x, qweight, scale, bias, levels, -1)
    assert product_of(*args, PLANS[0]).add
    matmul(*args, actual, PLANS[0])
    assert_rounded_once(actual, exact_linear(*args))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has an order of its own")
def test_whichever_program_ends_last_adds_the_same_parts(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    levels, m, n, k = BOOKS["binary"], 17, 17, 256
    args = (tensor(m, k), *packed_weight(n, k, levels, -1), tensor(n), levels, -1)
    plan = Plan(cols=16, rows=16, bytes=8, warps=4, stages=1, interleaved=False, splits=3)
    forward, backward = torch.full((m, n), math.nan), torch.full((m, n), math.nan)
    matmul(*args, forward, plan)
    place = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(
        *(size - 1 - at for size, at in zip(builder.grid_dim, (x, y, z), strict=True))))
    matmul(*args, backward, plan)
    assert same_bits(forward, backward)
    assert_rounded_once(forward, exact_linear(*args))
    assert not workspace.splits_of(forward.device, 0, 4).tickets.any()


@pytest.mark.parametrize("m", [1, 40, 2000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_linear_by_its_own_plan(dtype, m):
    levels = BOOKS["pow2-2"]
    for size in (1.0, 1e-3):  # the smaller makes float16 weights subnormal
        qweight, scale = packed_weight(20, 100, levels, -1, wide_for(dtype))
        args = (tensor(m, 100, dtype=dtype), qweight, size * scale, None, levels, -1)
        actual, exact = packed_linear(*args), exact_linear(*args)
        assert_within_budget(actual, ref.packed_linear(*args), exact)
        assert_rounded_once(actual, exact)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("book", ["binary", "pow2-2", "pow2-4"])
def test_float16_weights_that_are_subnormal(book, dtype):
    """One small scale among large ones: the program that meets it rounds every weight."""
    levels = BOOKS[book]
    qweight, scale = packed_weight(130, 96, levels, -1)
    scale[100] = 3.3e-6
    args = (tensor(2, 96, dtype=dtype), qweight, scale, None, levels, -1)
    actual, exact = packed_linear(*args), exact_linear(*args)
    for row in (actual, exact):
        row /= exact.abs().mean(0).to(row.dtype)  # every output counts alike
    assert relative_error(actual, exact) < 2 * torch.finfo(dtype).eps


def test_float32_inputs_lose_nothing_to_bfloat16():
    x = tensor(4, 512) * torch.logspace(-30, 30, 512).to(DEVICE)
    args = (x, *packed_weight(64, 512, (0.5, 1.0), 0), None, (0.5, 1.0), 0)
    exact = exact_linear(*args)
    assert relative_error(packed_linear(*args), exact) < 2e-7


def test_packed_linear_of_any_layout():
    levels = BOOKS["pow2-4"]
    qweight, scale = packed_weight(70, 96, levels, 0)
    for m in (6, 40):
        x = tensor(m, 96, dtype=torch.bfloat16)
        expected = packed_linear(x, qweight, scale, None, levels, 0)
        layouts = {"transposed": x.t().contiguous().t(),
                   "sliced": tensor(m, 200, dtype=torch.bfloat16)[:, 3:195:2].copy_(x),
                   "strided": tensor(m, 97, dtype=torch.bfloat16)[:, 1:].copy_(x)}
        for name, layout in layouts.items():
            actual = packed_linear(layout, qweight, scale, None, levels, 0)
            assert torch.equal(actual, expected) and actual.is_contiguous(), name
        repeated = packed_linear(x[:1].expand(m, 96), qweight, scale, None, levels, 0)
        assert torch.equal(repeated, repeated[:1].expand(m, 70))
    assert packed_linear(x[2], qweight, scale, None, levels, 0).shape == (70,)
    assert packed_linear(x.view(2, 20, 96), qweight, scale, None, levels, 0).shape == (2, 20, 70)


@pytest.mark.parametrize("m,n,k", [(0, 5, 9), (4, 0, 9), (4, 5, 0), (40, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("group_size", [0, -1, 4])
def test_packed_linear_of_nothing(m, n, k, group_size):
    for dtype in DTYPES:
        qweight, scale = packed_weight(n, k, (0.5, 1.0), group_size, wide_for(dtype))
        bias = tensor(n, dtype=dtype)
        actual = packed_linear(tensor(m, k, dtype=dtype), qweight, scale, bias, (0.5, 1.0), group_size)
        assert actual.dtype == dtype and torch.equal(actual, bias.expand(m, n))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("book", ["binary", "ternary", "three", "pow2-4"])
def test_infinite_and_undefined_inputs_stay_so(book, dtype):
    levels = BOOKS[book]
    qweight, scale = packed_weight(70, 64, levels, 0)
    for special in (math.inf, -math.inf, math.nan):
        x = tensor(3, 64, dtype=dtype)
        x[1, 17] = special
        args = (x, qweight, scale, None, levels, 0)
        actual, expected = packed_linear(*args), ref.packed_linear(*args)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


def test_a_code_without_level_makes_its_output_undefined():
    levels = (0.2, 0.6, 1.0)
    codes = random_codes((40, 90), levels)
    codes[7, 80] = 3
    for m in (2, 40):
        y = packed_linear(tensor(m, 90, dtype=torch.bfloat16), ref.pack(codes, 3),
                          torch.ones(1, device=DEVICE), None, levels, 0)
        assert y[:, 7].isnan().all() and not y[:, :7].isnan().any() and not y[:, 8:].isnan().any()


def test_two_weights_in_a_register_keep_apart():
    """What the assembly does to a pair of 16-bit lanes is what plain operations do to each: of a lane
    of two bytes every bit, of a lane of one byte the low ones, shifted by at most 12."""
    pairs = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    for target, lanes in ((15, pairs), (7, pairs), (10, pairs), *(
            (target, pairs & 0x00FF00FF) for target in (8, 9, 11, 12))):
        for bit in range(8):
            shift = target - bit - (8 if target == 15 else 0)  # the sign lies in the high byte
            mask = 1 << target
            assert "lop3.b32 $0, t, " + hex(mask * 0x10001) in _pair_asm(shift, mask)
            both = (lanes << np.uint32(shift)) & np.uint32(mask * 0x10001)
            each = ((lanes.view(np.uint16) << np.uint16(shift)) & np.uint16(mask)).view(np.uint32)
            assert np.array_equal(both, each)


def test_plans():
    """Small batches decode in registers, large ones once; k is split until the GPU is full."""
    h200 = Target(9, 132)

    def plan(m, n, k, dtype=torch.bfloat16, group_size=0, target=h200):
        return plan_for(m, n, k, group_size, dtype, True, target)

    assert not plan(1, 8192, 8192).interleaved and plan(1, 8192, 8192).splits == 5
    assert plan(16, 128, 8192).splits > 5 and plan(1, 8192, 64).splits == 1
    assert (plan(512, 8192, 4096).cols, plan(512, 2048, 4096).cols) == (256, 128)  # twice the programs
    assert plan(17, 8192, 8192).interleaved and plan(4096, 8192, 8192) is None
    assert plan(1, 64, 64, torch.float64) is None and plan(17, 64, 64, torch.float32) is None
    assert plan(300, 64, 64, target=Target(8, 108)) is None
    assert plan(1, 64, 4096, group_size=128).bytes == 16
    for dtype in NARROW[1:]:
        assert scale_mode((0.5, 1.0), 128, dtype, plan(1, 64, 4096, group_size=128)) == (
            "tile" if dtype == torch.bfloat16 else "weight")
    assert conv_plan_for(100, 8, 9, 8, torch.bfloat16, h200) is None  # depthwise
    assert conv_plan_for(49, 512, 4608, 1, torch.bfloat16, h200).splits > 1
    assert conv_plan_for(10**6, 512, 4608, 1, torch.bfloat16, h200) is None


def test_shared_memory_of_every_plan_fits():
    """Inputs of all stages beside the planes', in bytes that a program of the architecture may have."""
    limits = {8: 99 << 10, 9: 227 << 10, 10: 227 << 10, 12: 99 << 10}
    for major, plans in linear_plans.TABLE.items():
        for plan in (DECODE, *(plan for _, plan in plans)):
            inputs = plan.cols * 8 * plan.bytes * (4 if plan is DECODE else 2)
            planes = 4 * plan.rows * plan.bytes
            assert plan.stages * (inputs + planes) <= limits[major]
    assert all(p.rows * p.bytes for p in (CONV_SMALL, CONV_LARGE, *(p for _, p in HOPPER + OTHERS)))


def test_bad_input_is_refused_as_on_the_cpu():
    qweight, scale = packed_weight(4, 24, (0.5, 1.0), -1)
    x = tensor(2, 24)
    cases = [
        (lambda: packed_linear(x.int(), qweight, scale, None, (0.5, 1.0), -1),
         "input must be float32 or bfloat16 or float16 or float64, got int32"),
        (lambda: packed_linear(x, qweight[:, :, :2].contiguous(), scale, None, (0.5, 1.0), -1),
         "qweight must have 3 bytes a row for K = 24, got 2"),
        (lambda: packed_linear(x, qweight, scale[:3], None, (0.5, 1.0), -1),
         r"scale must have shape \[4, 1\], got \[3, 1\]"),
        (lambda: packed_linear(x, qweight, scale, tensor(5), (0.5, 1.0), -1),
         r"bias must have shape \[4\], got \[5\]"),
        (lambda: packed_linear(x, qweight, scale, None, (0.5, 1.0), -2),
         "group_size must be 0, -1 or positive, got -2"),
        (lambda: packed_linear(x.to("meta"), qweight, scale, None, (0.5, 1.0), -1),
         "input must be on qweight's device"),
        (lambda: unpack(qweight, scale, (0.5, 1.0), -1, 30, torch.float32), "qweight must have 4 bytes"),
        (lambda: unpack(qweight, scale, (0.5, 1.0), -1, 24, torch.int8), "dtype must be float32"),
        (lambda: pack(torch.full((2, 9), 5, dtype=torch.uint8, device=DEVICE), 2),
         r"codes must be below 2\^bits = 4, got 5"),
        (lambda: pack(torch.zeros(2, 2, dtype=torch.uint8, device=DEVICE), 5),
         "bits must be 1, 2, 3 or 4, got 5"),
        (lambda: fake_quantize(x.t(), scale, (0.5, 1.0), 0), "latent must be contiguous"),
        (lambda: fake_quantize(x, scale[:2], (1.0, 0.5), -1), "levels must have 1 to 128"),
        (lambda: packed_conv2d(tensor(1, 7, 5, 5), qweight, scale, None, (0.5, 1.0), -1, (2, 2), (1, 1),
                               (0, 0), (1, 1), 1), "qweight must have 4 bytes a row for K = 28, got 3"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=f"^blaq.[a-z0-9_]+: {message}"):
            call()

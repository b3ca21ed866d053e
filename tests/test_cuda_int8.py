"""packed_linear in 8-bit arithmetic by CUDA's tensor cores, in host emulation: rounding, decoding,
both ways to multiply, against integers by numpy, float64, and the CPU's own 8 bits."""

import numpy as np
import pytest
import torch
from cuda_emulation import ORDERS, guarded, library, needs_compiler

import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

pytestmark = needs_compiler
TYPES = (torch.float32, torch.float16, torch.bfloat16)
WAYS = {"warps": 0, "warpgroups": 1}
CHUNK = np.dtype([("bytes", np.int8, (8, 128, 16)), ("unit", np.float32, 128)])


@pytest.fixture(scope="module")
def lib():
    return library("int8_linear")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def array(tensor, offset=0):
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return guarded(plain.contiguous().numpy(), offset)


def integers(levels, bits):
    """Levels of codes as int8, and their unit: numpy's own way to csrc/cpu/level_table.h."""
    both = np.concatenate([np.array(levels), -np.array(levels)])  # the sign is the highest bit
    factor = next((f for f in range(1, 129) if np.all(both * f == np.rint(both * f))), 127)
    table = np.zeros(16, np.int8)
    table[:2**bits] = np.clip(np.rint(both * factor), -128, 127)
    return table, 1 / 127.5 if factor == 128 else 1 / factor


def rounded(lib, x, offset=0):
    """The chunks of rows as the kernel makes them."""
    m, k = x.shape
    count = -(-m // 128) * -(-k // 256) * 2
    chunks = guarded(np.full(count * CHUNK.itemsize, 77, np.uint8))
    lib.rows(TYPES.index(x.dtype), array(x, offset), m, k, chunks)
    return chunks


def plain(chunks, m, k):
    """Integers [m, k] and units [m, units] of chunks, by the order that RowChunk documents."""
    tiles = np.frombuffer(chunks, CHUNK).reshape(-(-m // 128), -1)
    lane, half, byte, step = np.meshgrid(*map(np.arange, (4, 2, 4, 4)), indexing="ij")
    at = (32 * lane + 16 * half + 4 * byte + step).ravel()
    whole = np.zeros((*tiles.shape, 128, 128), np.int8)  # [tile, chunk, row, input]
    of_rows = tiles["bytes"].transpose(0, 1, 3, 2, 4)
    whole[..., at] = of_rows[..., (2 * step + half).ravel(), (4 * lane + byte).ravel()]
    numbers = whole.transpose(0, 2, 1, 3).reshape(len(tiles) * 128, -1)
    units = tiles["unit"].transpose(0, 2, 1).reshape(len(tiles) * 128, -1)
    assert np.array_equal(units[:, ::2], units[:, 1::2], equal_nan=True)
    assert not numbers[m:].any() and not numbers[:, k:].any() and not units[m:].any()
    return numbers[:m, :k], units[:m, ::2]


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_become_integers_of_a_unit_for_256_inputs(lib, dtype):
    for m, k, offset in ((3, 300, 0), (130, 256, 2), (9, 7, 0)):
        x = torch.randn(m, k).to(dtype)
        x[0, 0] = 100.0
        numbers, units = plain(rounded(lib, x, offset * (dtype != torch.float32)), m, k)
        wide = np.pad(x.float().numpy(), ((0, 0), (0, -k % 256))).reshape(m, -1, 256)
        assert np.array_equal(units, np.abs(wide).max(-1) / np.float32(127))
        error = np.abs(numbers - (wide / units[..., None]).reshape(m, -1)[:, :k])
        assert error.max() <= 0.5001 and np.abs(numbers).max() <= 127


@pytest.mark.parametrize("bits", (1, 2, 3, 4))
def test_every_code_at_every_place_decodes(lib, bits):
    """Fragments by the layout of a product's left operand, of planes of random bits."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (40, 2, 32))  # of a lane: two outputs' neighbours
    planes = np.stack([np.packbits(codes >> b & 1, axis=-1, bitorder="little") for b in range(bits)])
    planes = planes.view(np.uint32)[..., 0].transpose(1, 2, 0)
    table = rng.permutation(np.arange(-128, 128))[:16].astype(np.int8)
    out = np.zeros((40, 4, 4), np.uint32)
    lib.decode(bits, np.ascontiguousarray(planes), 40, table, out)
    actual = out.view(np.int8).reshape(40, 4, 2, 2, 4)  # [lane, step, half, output, byte]
    step, half, byte = np.meshgrid(*map(np.arange, (4, 2, 4)), indexing="ij")
    expected = table[codes][:, :, 16 * half + 4 * byte + step]  # [lane, output, step, half, byte]
    assert np.array_equal(actual, expected.transpose(0, 2, 3, 1, 4))
    assert len(np.unique(codes)) == 2**bits


def product(lib, way, x, qweight, scale, bias, levels, group_size, multiprocessors=4):
    (m, k), (bits, n, row_bytes) = x.shape, qweight.shape
    planes = guarded(np.full((bits * n, -(-row_bytes // 32) * 32), 0xee, np.uint8))
    lib.pad(array(qweight), bits * n, row_bytes, planes)
    table, unit = integers(levels, bits)
    out = array(torch.full((m, n), float("nan"), dtype=x.dtype))
    lib.product(WAYS[way], bits, TYPES.index(x.dtype), rounded(lib, x), planes, planes.shape[1],
                array(scale), 0 if group_size == 0 else scale.shape[1], max(group_size, 0),
                None if bias is None else array(bias), out, m, n, k, table, unit, multiprocessors)
    return torch.from_numpy(out.copy()).view(x.dtype)


def case(m, n, k, bits, dtype, group_size, codebook="pow2"):
    levels = levels_of(codebook, bits)
    codes = torch.randint(0, len(levels), (n, k), dtype=torch.uint8)
    codes |= torch.randint(0, 2, (n, k), dtype=torch.uint8) << (bits - 1)
    scale = torch.rand(ref.scale_shape((n, k), group_size)) + 0.5
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    return x, ref.pack(codes, bits), scale, bias, levels, group_size


def exact(x, qweight, scale, bias, levels, group_size):
    bias = None if bias is None else bias.double()
    return ref.packed_linear(x.double(), qweight, scale.to(x.dtype).double(), bias, levels, group_size)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", (1, 2, 3, 4))
def test_error_is_that_of_8_bits(lib, bits, way):
    shapes = (20, 70, 300, -1), (131, 129, 129, 0), (9, 24, 513, 128)
    for (m, n, k, group_size), dtype in zip(shapes, TYPES, strict=True):
        args = case(m, n, k, bits, dtype, group_size)
        assert error(product(lib, way, *args), exact(*args)) <= 1e-2


@pytest.mark.parametrize("codebook", ("linear", "uniform", "pow2_zero"))
def test_other_codebooks_round_their_levels_too(lib, codebook):
    for bits in (2, 3, 4):
        args = case(4, 17, 200, bits, torch.float32, 0, codebook)
        assert error(product(lib, "warps", *args), exact(*args)) <= 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_sums_are_exact_where_inputs_are_whole(lib, way):
    """Inputs that 8 bits hold, powers of two, every kind of group: no error at all."""
    for group_size, k in ((0, 600), (256, 700), (384, 800)):
        x, qweight, scale, bias, levels, _ = case(12, 20, k, 3, torch.float32, group_size)
        x = torch.randint(-127, 128, x.shape).float()
        x[:, ::256] = 127.0
        scale, bias = torch.exp2(torch.randint(-2, 3, scale.shape).float()), bias.round()
        args = (x, qweight, scale, bias, levels, group_size)
        assert torch.equal(product(lib, way, *args).double(), exact(*args))


def test_large_channels_cost_only_their_neighbours_precision(lib):
    """A unit for a row would lose the others; the CPU's 8 bits are as far off."""
    x, *rest = case(16, 40, 1024, 2, torch.float32, -1)
    x[:, 5] *= 100.0
    actual, expected = product(lib, "warps", x, *rest), exact(x, *rest)
    far = x.clone()
    far[:, :256] = 0.0
    by_row = torch.round(x / (unit := x.abs().amax(1, keepdim=True) / 127)) * unit
    assert error(product(lib, "warps", far, *rest), exact(far, *rest)) <= 1e-2
    assert error(actual, expected) < 0.6 * error(exact(by_row, *rest), expected)
    if blaq_kernels.has_int8():
        on_cpu = torch.ops.blaq.packed_linear(x, *rest, torch.ops.blaq.repack(rest[0]), "fast")
        assert error(actual, expected) <= 1.5 * error(on_cpu, expected)


def test_clusters_of_four_blocks(lib):
    """Where they divide the outputs; and one cluster that takes two tiles of rows."""
    for m, multiprocessors in ((5, 8), (130, 4)):
        args = case(m, 390, 700, 1, torch.bfloat16, -1)
        actual = product(lib, "warpgroups", *args, multiprocessors=multiprocessors)
        assert error(actual, exact(*args)) <= 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_not_finite_are_nan_and_no_other_row_is(lib, way):
    x, *rest = case(6, 10, 300, 2, torch.float32, 0)
    clean = product(lib, way, x, *rest)
    x[1, 3], x[4, 299], x[2] = float("nan"), float("-inf"), 0.0
    actual = product(lib, way, x, *rest)
    assert actual[[1, 4]].isnan().all() and torch.equal(actual[2], rest[2])
    assert torch.equal(actual[[0, 3, 5]], clean[[0, 3, 5]])


@pytest.mark.parametrize("way", WAYS)
def test_no_order_of_threads_changes_a_result(lib, way):
    """And no number of multiprocessors: blocks that take several tiles, a ring that goes round."""
    args = case(10, 150, 1400 if way == "warpgroups" else 700, 4, torch.bfloat16, 128)
    results = []
    for order in ORDERS:
        lib.order(order)
        results.append(product(lib, way, *args, multiprocessors=2 + 2 * (order % 2)))
    lib.order(0)
    assert all(torch.equal(results[0], result) for result in results)


def test_no_rows_no_bias_and_both_ways_give_the_same_bits(lib):
    args = case(33, 40, 520, 4, torch.float16, -1, "linear")
    args[0][3] *= 1e-3
    assert product(lib, "warps", args[0][:0], *args[1:]).shape == (0, 40)
    assert torch.equal(product(lib, "warps", *args[:3], None, *args[4:]),
                       product(lib, "warpgroups", *args[:3], None, *args[4:]))

"""The CUDA kernels of repack and packed_linear, whole, on the host: the layout, the decoding of every
half word, and products against the reference on shapes with every kind of edge."""

import itertools

import numpy as np
import pytest
import torch
from cuda_emulation import ORDERS, guarded, library, needs_compiler

from blaq_kernels import fragments
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

pytestmark = needs_compiler
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BITS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def lib():
    return library("packed_linear")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def repack(lib, qweight):
    bits, n, row_bytes = qweight.shape
    out = guarded(np.full(fragments.repacked_bytes(bits, n, row_bytes), 0xee, np.uint8))
    lib.repack_planes(guarded(qweight.numpy()), bits, n, row_bytes, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_every_half_word_decodes(lib, bits, dtype):
    """All 2^16 values of each half of each word: bit tricks give the level of the code that the layout
    says, and the layout uses every bit of a group once."""
    words, pairs, half = fragments.words(bits), fragments.pairs(bits), 1 << 16
    every = np.arange(half, dtype=np.uint32)
    noise = np.random.default_rng(0).integers(0, 2**32, (2 * words, half, words), dtype=np.uint32)
    for word, high in itertools.product(range(words), range(2)):
        keep = np.uint32(0xffff if high else 0xffff0000)
        noise[2 * word + high, :, word] &= keep
        noise[2 * word + high, :, word] |= every << np.uint32(16 * high)
    data = np.ascontiguousarray(noise.reshape(-1, words))
    out = np.zeros((len(data), pairs), np.uint32)
    codes = np.zeros((len(data), 2 * pairs), np.uint32)
    lib.decode(bits, int(dtype == "bf16"), data, len(data), out, codes)
    table = ref.code_values(torch.arange(1 << bits, dtype=torch.uint8), levels_of("pow2", bits),
                            torch.float32).numpy()
    actual = torch.from_numpy(out.view(np.uint16).view(np.int16)).view(DTYPES[dtype]).float().numpy()
    assert np.array_equal(actual, table[codes])
    counts = sum((codes[1:] ^ codes[:-1]) >> b & 1 for b in range(bits)).sum(1)
    changed = sum(np.bitwise_count(data[1:, i] ^ data[:-1, i]).astype(int) for i in range(words))
    assert np.array_equal(counts, changed)  # every bit of the words is one bit of one code


@pytest.mark.parametrize("bits", BITS)
def test_repacking_is_a_bijection(lib, bits):
    """Each bit of the planes appears once in the repacked weight, and alone; the rest is 0."""
    n, row_bytes = 19, fragments.columns(bits) // 8 + 3
    total = bits * n * row_bytes * 8
    seen = np.zeros(fragments.repacked_bytes(bits, n, row_bytes) * 8, int)
    numbers = torch.arange(1, total + 1)
    spots = np.zeros(len(seen), np.int64)  # the number of the bit that lies there, digit by digit
    for digit in range(total.bit_length()):
        planes = np.packbits((numbers >> digit & 1).numpy().astype(np.uint8), bitorder="little")
        out = repack(lib, torch.from_numpy(planes).reshape(bits, n, row_bytes))
        spots |= np.unpackbits(out, bitorder="little").astype(np.int64) << digit
    used = spots[spots > 0]
    assert len(used) == total and len(np.unique(used)) == total


@pytest.mark.parametrize("n,row_bytes", [(1, 1), (16, 32), (37, 67)])
@pytest.mark.parametrize("bits", BITS)
def test_repacking_is_what_plain_pytorch_makes(lib, bits, n, row_bytes):
    qweight = torch.randint(0, 256, (bits, n, row_bytes), dtype=torch.uint8)
    assert np.array_equal(repack(lib, qweight), fragments.repack(qweight).numpy())


def case(m, n, k, levels, group_size, dtype, scale=None, bias=True):
    bits = ref.bits_of(levels)
    codes = torch.randint(0, len(levels), (n, k), dtype=torch.uint8)
    codes |= torch.randint(0, 2, (n, k), dtype=torch.uint8) << (bits - 1)
    qweight = ref.pack(codes, bits)
    if scale is None:
        scale = torch.rand(ref.scale_shape((n, k), group_size)) + 0.1
    x = torch.randn(m, k).to(dtype)
    return x, qweight, scale, torch.randn(n).to(dtype) if bias else None, levels, group_size


def linear(lib, x, qweight, scale, bias, levels, group_size, multiprocessors=4, order=0):
    """What packed_linear.cu does: inputs filled up to whole 16 bytes, and the launch."""
    bits, n, _ = qweight.shape
    m, k = x.shape
    weight = repack(lib, qweight)
    raw = np.pad(x.view(torch.int16).numpy(), ((0, 0), (0, -k % 8)))
    out = guarded(np.full((m, n), -1, np.int16))
    powers = levels == levels_of("pow2", bits)
    table = np.full(1 << (bits - 1), np.nan, np.float32)
    table[:len(levels)] = levels
    lib.linear(guarded(raw), raw.shape[1], weight, guarded(scale.numpy()),
               None if bias is None else guarded(bias.view(torch.int16).numpy()), out, m, n, k, bits,
               0 if group_size == 0 else scale.shape[1], max(group_size, 0), int(powers), table,
               int(x.dtype == torch.bfloat16), multiprocessors, order)
    return torch.from_numpy(out.copy()).view(x.dtype)


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_right(actual, x, qweight, scale, bias, levels, group_size):
    """By error budget, against float64 with the weight that the reference has in this dtype."""
    weight = ref.unpack(qweight, scale, levels, group_size, x.shape[1], x.dtype).double()
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    low = exact.to(x.dtype)
    assert error(actual, exact) <= 1.01 * error(low, exact) + 1e-6  # sums in fp32, rounded once
    assert actual.isfinite().all()


BOOKS = [("pow2", 1), ("pow2", 2), ("pow2", 3), ("pow2", 4), ("ternary", 2), ("uniform", 3)]
SHAPES = [(1, 16, 64), (1, 70, 515), (3, 33, 256), (8, 16, 1024), (9, 40, 264), (17, 20, 130),
          (33, 18, 72), (64, 37, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, -1, 64, 192, 5])
@pytest.mark.parametrize("name,bits", BOOKS)
def test_products(lib, name, bits, group_size, dtype):
    for m, n, k in SHAPES:
        args = case(m, n, k, levels_of(name, bits), group_size, DTYPES[dtype], bias=m % 2 == 1)
        assert_right(linear(lib, *args), *args)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 40])
def test_the_order_of_threads_changes_no_bit(lib, bits, m):
    args = case(m, 50, 700, levels_of("pow2", bits), -1, torch.bfloat16)
    results = [linear(lib, *args, order=order) for order in ORDERS]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("multiprocessors", [1, 2, 1000])
@pytest.mark.parametrize("m", [1, 12, 64])
def test_every_shape_of_a_block(lib, m, multiprocessors):
    """Few multiprocessors: many warps over outputs, few over inputs."""
    args = case(m, 300, 320, levels_of("pow2", 2), 64, torch.float16)
    assert_right(linear(lib, *args, multiprocessors=multiprocessors), *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, -1, 64])
@pytest.mark.parametrize("tiny", [2.0**-20, 2.0**-125])
def test_scales_that_would_round_weights_otherwise(lib, tiny, group_size, dtype):
    """Weights that are subnormal in 16 bits: made one by one, as training has them."""
    scale = torch.rand(ref.scale_shape((20, 128), group_size)) * tiny + tiny
    x, *rest = case(2, 20, 128, levels_of("pow2", 4), group_size, DTYPES[dtype], scale, bias=False)
    x = (x.float() * 256).to(x.dtype)
    actual = linear(lib, x, *rest)
    weight = ref.unpack(rest[0], scale, rest[3], group_size, 128, x.dtype).double()
    exact = (x.double() @ weight.T).to(x.dtype).double()
    step = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert (weight != weight.float().mul(0).double()).any() or dtype == "fp16"
    assert ((actual.double() - exact).abs() <= torch.finfo(x.dtype).eps * exact.abs() + step).all()


def test_no_inputs(lib):
    args = case(2, 5, 0, levels_of("pow2", 2), -1, torch.float16)
    assert torch.equal(linear(lib, *args), args[3].expand(2, 5))

"""The words that CUDA kernels are written in, on the host: each against numpy, on all of its values
where they can be counted; and the faults that the emulation must find."""

import numpy as np
import pytest
from cuda_emulation import ORDERS, Fault, guarded, library, needs_compiler

pytestmark = needs_compiler
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def lib():
    return library("primitives")


def words(*shape):
    return RNG.integers(0, 2**32, shape, dtype=np.uint32)


def test_every_lop3(lib):
    out = np.zeros(256, np.uint32)
    lib.all_lop3(out)
    assert np.array_equal(out & 0xff, np.arange(256))  # the definition: table = F(0xf0, 0xcc, 0xaa)


def test_every_prmt(lib):
    low, high = 0x80017f02, 0x90a0ff0c
    data = np.array([low, high], np.uint32).view(np.uint8)
    selectors = np.arange(1 << 16)
    out, plain = np.zeros(1 << 16, np.uint32), np.zeros(1 << 16, np.uint32)
    lib.all_prmt(low, high, out, plain)
    nibbles = np.stack([selectors >> 4 * i & 15 for i in range(4)], 1)
    chosen = data[nibbles & 7]
    signs = np.where(chosen & 0x80, 0xff, 0).astype(np.uint8)
    assert np.array_equal(plain.view(np.uint8).reshape(-1, 4), chosen)
    assert np.array_equal(out.view(np.uint8).reshape(-1, 4), np.where(nibbles & 8, signs, chosen))


def as_float(bits, kind):
    if kind == "fp16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_every_half_word(lib, kind):
    """Decoding all 2^16, and rounding of each, of the middles between neighbours and of what is near."""
    every = as_float(np.arange(1 << 16), kind)
    finite = np.unique(every[np.isfinite(every)])
    middles = finite[:-1] / 2 + finite[1:] / 2  # exact but for the smallest of bfloat16
    near = np.concatenate([np.nextafter(middles, s * np.float32(np.inf)) for s in (-1, 1)])
    extremes = np.array([0, -0.0, np.inf, -np.inf, 65519.996, 65520, 3.4e38, 1e-45], np.float32)
    values = np.concatenate([finite, middles, near, extremes]).astype(np.float32)
    out, back = np.zeros(1 << 16, np.float32), np.zeros(len(values), np.uint16)
    getattr(lib, kind)(out, values, len(values), back)
    assert np.array_equal(out, every, equal_nan=True)
    if kind == "fp16":
        with np.errstate(over="ignore"):
            expected = values.astype(np.float16).view(np.uint16)
    else:
        import torch
        expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(back, expected)


LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def fragments(a, b):
    """Registers of 32 lanes, from matrices of 32-bit words: a [16, 8], b [8 columns, 8]."""
    ra = np.stack([a[G + i % 2 * 8, T + i // 2 * 4] for i in range(4)], 1)
    rb = np.stack([b[G, T + i * 4] for i in range(2)], 1)
    return np.ascontiguousarray(ra), np.ascontiguousarray(rb)


def sums(d):
    return np.ascontiguousarray(np.stack([d[G + i // 2 * 8, 2 * T + i % 2] for i in range(4)], 1))


def as_bits(x):
    return np.unpackbits(x.view(np.uint8), axis=-1, bitorder="little").astype(np.int64)


@pytest.mark.parametrize("which", range(6), ids=["fp16", "bf16", "s8", "u8", "and", "xor"])
def test_mma_is_a_matrix_product(lib, which):
    if which < 2:
        (a, left), (b, right) = (powers(("fp16", "bf16")[which], n, 16) for n in (16, 8))
        a, b = a.view(np.uint32), b.view(np.uint32)
        d = RNG.integers(-9, 9, (16, 8)).astype(np.float32)
        product = left @ right.T
    else:
        a, b = words(16, 8), words(8, 8)
        d = RNG.integers(-1000, 1000, (16, 8)).astype(np.int32)
        if which < 4:
            left = a.view(np.int8 if which == 2 else np.uint8).astype(np.int64)
            product = left @ b.view(np.int8).astype(np.int64).T
        else:
            x, y = as_bits(a), as_bits(b)
            product = x @ y.T if which == 4 else x @ (1 - y).T + (1 - x) @ y.T
    ra, rb = fragments(a, b)
    actual = sums(d)
    lib.mma(which, ra, rb, actual)
    assert np.array_equal(actual, sums((product + d).astype(d.dtype)))


def powers(kind, *shape):
    """± powers of two, whose sums are exact in any order: as bits, and as numbers."""
    one, shift = (0x3c00, 10) if kind == "fp16" else (0x3f80, 7)
    bits = RNG.integers(0, 2, shape) << 15 | (one + (RNG.integers(-2, 3, shape) << shift))
    return np.ascontiguousarray(bits.astype(np.uint16)), as_float(bits, kind).astype(np.float64)


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_sparse_mma_is_a_product_with_two_of_every_four(lib, kind, lanes):
    """Each choice of two among four in turn, in metadata as CUTLASS's reorder_meta has them."""
    kept, values = powers(kind, 16, 16)
    right, b = powers(kind, 8, 32)
    every = np.array([(i, j) for j in range(4) for i in range(j)])
    choices = every[(np.arange(16 * 8) % 6 + lanes) % 6].reshape(16, 16)
    a = np.zeros((16, 32))
    np.put_along_axis(a, choices + np.arange(16) // 2 * 4, values, 1)
    ra, rb = (np.ascontiguousarray(np.stack(registers, 1)) for registers in (
        [kept.view(np.uint32)[G + i % 2 * 8, T + i // 2 * 4] for i in range(4)],
        [right.view(np.uint32)[G, T + i * 4] for i in range(4)]))
    halves = (choices.reshape(16, 2, 8) << 2 * np.arange(8)).sum(2)  # [row, k from 16 on]
    chosen = words(32)  # of the other lanes nobody asks
    for half in range(2):
        chosen[4 * np.arange(8) + 2 * lanes + half] = halves[:8, half] | halves[8:, half] << 16
    d = RNG.integers(-9, 9, (16, 8)).astype(np.float32)
    actual = sums(d)
    lib.sparse(int(kind == "bf16"), lanes, ra, rb, chosen, actual)
    assert np.array_equal(actual, sums((a @ b.T + d).astype(np.float32)))
    with pytest.raises(Fault, match="choices must ascend"):
        lib.sparse(int(kind == "bf16"), lanes, ra, rb, chosen * 0, actual)


@pytest.mark.parametrize("exclusive", [False, True])
def test_mma_of_8_by_8_bits(lib, exclusive):
    a, b = words(8, 4), words(8, 4)
    d = RNG.integers(-1000, 1000, (8, 8)).astype(np.int32)
    x, y = as_bits(a), as_bits(b)
    expected = d + (x @ (1 - y).T + (1 - x) @ y.T if exclusive else x @ y.T)
    actual = np.stack([d[G, 2 * T], d[G, 2 * T + 1]], 1)
    lib.mma(6 + exclusive, a, b, actual)  # a lane's word is in its matrix's own order
    assert np.array_equal(actual, np.stack([expected[G, 2 * T], expected[G, 2 * T + 1]], 1))


@pytest.mark.parametrize("adds", [0, 1])
def test_a_warpgroups_product_of_bytes(lib, adds):
    a, b = words(64, 8), words(128, 8)
    d = RNG.integers(-1000, 1000, (64, 128)).astype(np.int32)
    thread = np.arange(128)
    row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
    registers = np.stack([a[row + i % 2 * 8, t + i // 2 * 4] for i in range(4)], 1)
    place = np.ix_(range(128), range(16), range(4))
    at = (row[place[0]] + place[2] // 2 * 8, 8 * place[1] + 2 * t[place[0]] + place[2] % 2)
    actual = np.ascontiguousarray(d[at])
    halves = np.ascontiguousarray(b.reshape(128, 2, 4).swapaxes(0, 1))
    lib.warpgroup(registers, halves, actual, adds)
    product = a.view(np.int8).astype(np.int32) @ b.view(np.int8).astype(np.int32).T
    assert np.array_equal(actual, (product + adds * d)[at])


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cluster_fetch_for_one_another(lib, order):
    data, out = guarded(words(64)), np.zeros((2, 64), np.uint32)
    lib.cluster(data, out, order)
    assert np.array_equal(out, np.stack([data, data]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(lib, count, transposed):
    matrices = RNG.integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    out = np.zeros((32, count), np.uint32)
    lib.load_matrices(count, transposed, guarded(matrices), out)
    m = matrices.transpose(0, 2, 1) if transposed else matrices
    expected = np.ascontiguousarray(m.reshape(count, 32, 2)).view(np.uint32)[..., 0].T
    assert np.array_equal(out, expected)


def test_shuffles_and_votes(lib):
    x, lane = words(32), np.arange(32)
    out = np.zeros((12, 32), np.uint32)
    lib.warp(x, out)
    up, halves = np.where(lane % 16 >= 3, lane - 3, lane), x.reshape(2, 16)
    ballot = np.bitwise_or.reduce((x & 1) << lane.astype(np.uint32))
    expected = [np.full(32, x[5]), x[lane // 8 * 8 + (lane + 3) % 8], x[lane ^ 9],
                x[np.where(lane + 3 < 32, lane + 3, lane)], x[up], np.full(32, ballot),
                np.full(32, x.sum(dtype=np.uint32)), np.full(32, x.max()),
                halves.sum(1, dtype=np.uint32).repeat(16), (halves & 1).max(1).repeat(16),
                np.full(32, (x & 1).min()), np.bitwise_or.reduce(halves, 1).repeat(16)]
    assert np.array_equal(out, np.stack(expected))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 64, 1000])
def test_blocks_sum_and_the_last_one_ends(lib, n, order):
    x = guarded(words(n) >> 8)
    partial, ticket, out = np.zeros(16, np.uint64), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    lib.sum(x, n, partial, ticket, out, order)
    assert out[0] == x.sum(dtype=np.uint64) and ticket[0] == -(-n // 64)


FAULTS = {0: "divergent barrier: at __syncthreads", 1: "the mask must hold the calling lane",
          2: "thread 0 .* waits for ever at __reduce_add_sync", 3: "address must be a multiple of 16",
          4: "wrote behind its dynamic shared memory", 5: "reads or writes outside of memory",
          6: "cp.async that it never waited for", 7: "waits for ever at __syncthreads",
          8: "thread 0 .* __shfl_sync.*; thread 1 .* __syncwarp",
          11: "waits for ever at wait of a barrier", 12: "bulk_copy: size must be a multiple of 16"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("which", FAULTS)
def test_a_fault_is_found(lib, which, order):
    memory = guarded(np.zeros(64, np.uint32))
    with pytest.raises(Fault, match=FAULTS[which]):
        lib.fault(which, memory, order)


def test_shared_memory_starts_as_nan(lib):
    memory = np.zeros(64, np.uint32)
    lib.fault(9, memory, 0)
    assert np.isnan(memory.view(np.float32)).all()


def test_a_race_shows_in_the_order_of_threads(lib):
    seen = []
    for order in ORDERS:
        memory = np.zeros(65, np.uint32)
        lib.fault(10, memory, order)
        seen.append(memory[:64].sum())
    assert len(set(seen)) > 1

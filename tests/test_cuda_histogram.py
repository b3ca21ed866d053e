"""Parts of the CUDA training kernels alone: bins, fixed point, and where groups lie."""

import numpy as np
import pytest
import torch
from cuda_emulation import ORDERS, library, needs_compiler

from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of
from blaq_kernels.cuda import call, plan

pytestmark = needs_compiler
WINDOWS = (0, 1, 100, 115, 239)


@pytest.fixture(scope="module")
def lib():
    return library("step")


def places(lib, x, window):
    bins, within = np.zeros(len(x), np.int32), np.zeros(len(x), np.uint32)
    lib.places(np.ascontiguousarray(x), len(x), window, bins, within)
    return bins, within


def edges(lib, window):
    found = np.zeros(call.BINS, np.float32)
    lib.edges(window, found)
    return found.astype(np.float64)


@pytest.mark.parametrize("window", WINDOWS)
def test_every_float_has_a_bin_between_its_edges(lib, window):
    """Of every 2^10-th float, the ends of every bin among them; with the place in the bin it is
    exact."""
    bits = np.arange(0, 0x7f800000, 1 << 10, dtype=np.uint32)
    bits = np.concatenate([bits, bits[1:] - 1])
    x = bits.view(np.float32)
    bins, within = places(lib, x, window)
    low = edges(lib, window)
    high = np.append(low[1:], np.inf)
    high[-2] = 2.0**128  # above it are infinity and NaN
    assert bins.min() == 0 and bins.max() == call.BINS - 2
    assert (low[bins] <= x).all() and (x < high[bins]).all()
    exact = low[bins] + (high[bins] - low[bins]) * (within / 2.0**32)
    assert np.array_equal(exact, x.astype(np.float64))
    assert (np.diff(bins[np.argsort(x)]) >= 0).all()


def test_the_window_has_64_bins_an_octave(lib):
    low = edges(lib, 110)
    fine = low[(low >= 2.0**(110 - 127)) & (low < 2.0**(126 - 127))]
    assert len(fine) == 16 * 64 and np.allclose(fine[64:] / fine[:-64], 2)


def test_nan_and_infinity_have_the_last_bin(lib):
    bits = np.array([0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000], np.uint32)
    for window in WINDOWS:
        assert (places(lib, bits.view(np.float32), window)[0] == call.BINS - 1).all()


def test_signs_are_no_matter(lib):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for mine, other in zip(places(lib, x, 115), places(lib, -x, 115), strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("kind", ["equal", "spread", "growing", "overflowing"])
def test_fixed_point_loses_what_it_says(lib, kind):
    """At most 2^-28 of the largest d a weight, and nothing to chance: the same bits in every
    order."""
    rng = np.random.default_rng(1)
    n = 8 * 2048
    w = rng.standard_normal(n).astype(np.float32)
    d = np.ones(n)
    if kind == "spread":
        d = np.exp(4 * rng.standard_normal(n))
    elif kind == "growing":  # each tile calls for a larger unit
        d = np.exp2(np.arange(n) // 2048 * 5.0) * (1 + rng.random(n))
    elif kind == "overflowing":  # one bin, all the bits of a word, more than a word
        w[:] = 0.7
        d[:] = 1.999
    d = np.maximum(d, 1e-8).astype(np.float32)
    found = []
    for order in ORDERS:
        out = np.zeros((2, call.BINS))
        lib.histogram(w, d, n, 115, out, order)
        found.append(out)
    assert all(np.array_equal(found[0], other) for other in found[1:])
    bins, within = places(lib, w, 115)
    counts = np.bincount(bins, minlength=call.BINS)
    for sums, terms in zip(found[0], (d, d * (within / 2.0**32)), strict=True):
        exact = np.bincount(bins, terms.astype(np.float64), minlength=call.BINS)
        # Of a place 2^-27: it is cut off, not rounded. Each of 8 units rounds a bin once more.
        assert (np.abs(sums - exact) <= (counts * 2.0**-27 + 8 * 2.0**-28) * d.max()).all()


@pytest.mark.parametrize("name,bits", [("pow2", 2), ("ternary", 2), ("pow2", 4), ("linear", 4)])
def test_a_place_says_the_code_or_that_it_does_not_know(lib, name, bits):
    """Whatever the scale does; and where it moves by 1 %, few places do not know."""
    levels, n = levels_of(name, bits), 2 * 2048
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    for old, moved in ((1.7, 1.0), (1.7, 1.01), (1.7, 0.99), (1.7, 1.5), (1.7, 1e-3), (0.0, 1.0),
                       (1e-42, 1e30), (1e38, 1e-30)):
        scale = torch.tensor([max(old, 1e-42) * moved])
        threshold = (levels[-1] + levels[-2]) / 2 * scale.item()
        w[:9] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40,
                              threshold, -threshold])
        values, codes = np.zeros(n, np.float32), np.zeros(n, np.uint8)
        lib.place(np.array(levels), len(levels), old, scale.item(), w.numpy(), n, values, codes)
        known = ~np.isnan(values)
        expected = ref.quantize_codes(w, scale, levels, 0)
        assert np.array_equal(codes[known], expected.numpy()[known])
        wanted = ref.dequantize(expected, scale, levels, 0).numpy()
        assert np.array_equal(values[known], wanted[known])
        if 0.99 <= moved <= 1.01 and old > 1:
            assert not known.all() or moved == 1.0
            assert (~known).mean() < 0.02


def test_offsets_are_64_bits_wide(lib):
    """Where groups begin in a weight of 5e9 elements, and parts of groups in one of 1e10."""
    row = np.zeros(len(plan.COLUMNS), np.int64)
    at = {name: i for i, name in enumerate(plan.COLUMNS)}

    def part(size, number):
        out = np.zeros(6, np.int64)
        lib.part(row, size, number, out)
        return out.tolist()

    row[[at[k] for k in ("length", "per_row", "row", "parts")]] = 8000, 9, 70_000, 1
    group = 70_000 * 9 - 1
    begin = 69_999 * 70_000 + 8 * 8000
    assert part(8192, group) == [group, group, begin, 70_000 * 70_000, begin, 1]
    row[[at[k] for k in ("length", "per_row", "row", "parts")]] = 10**10, 1, 10**10, 10**10 // 10**6
    assert part(10**6, 9_999) == [0, 0, 10**10 - 10**6, 10**10, 10**10 - 10**6, 0]


@pytest.mark.parametrize("sizes,group_size", [((37, 9001), -1), ((3, 20_011), 10_007),
                                              ((50_021,), 0)])
@pytest.mark.parametrize("cut", [False, True])
def test_parts_cover_every_element_once(lib, sizes, group_size, cut, monkeypatch):
    monkeypatch.setattr(plan, "PART_LEAST", plan.TILE)
    found, = plan.parts(((0, sizes, torch.float32, True),), group_size, cut)
    plan.parts.cache_clear()
    seen = np.zeros(np.prod(sizes), np.int64)
    groups = plan.Shape.of(sizes, group_size)
    for number in range(found.parts):
        out = np.zeros(6, np.int64)
        lib.part(found.table[0], found.size, number, out)
        group, own, begin, end, first, leads = out
        assert group == own == number // (found.parts // found.groups) and first % 8 == 0
        assert leads == (number % (found.parts // found.groups) == 0)
        if end > begin:
            assert begin - first < 8 and end - first <= found.size
            start = own // groups.per_row * groups.row + own % groups.per_row * groups.length
            assert start <= begin and end <= start + groups.length
            seen[begin:end] += 1
    assert (seen == 1).all()


def test_a_plan_of_a_billion_weights():
    weights = tuple((i, (250_000, 4096), torch.float32, True) for i in range(2))
    found, = plan.parts(weights, 0)
    assert not found.whole and 0.9 * plan.PARTS <= found.parts <= plan.PARTS + 2
    assert found.runs == sum(-(-n // plan.RUN) for n in [found.parts // 2] * 2)
    rows = found.programs[:found.parts]
    assert len(found.programs) == found.parts + found.groups + 2 * found.runs
    assert (np.bincount(rows) == found.parts // 2).all()


def test_more_parts_than_32_bits_count_are_an_error():
    weight = (0, (2**31, 8), torch.float32, True)
    with pytest.raises(ValueError, match="must leave less than 2.31 parts of groups, got"):
        plan.parts((weight,), -1)

"""Device functions: the exact scale of a group that no program holds, by a weighted histogram of |w|.

E depends on α only through sums of d and d|w| over the weights beyond each threshold, so a
histogram of |w|, 128 bins an octave, has it for every α at once. Bins lie from 11 octaves below the
last scale to 5 above; what is beyond counts for the last bin there, whose weights have one mean.

Bins hold Σd in 64-bit fixed point: integer addition has no order, so the same input gives the same
bits. The unit is one of four, by the largest d of a chunk: at 16 octaves to a unit and 2^30 weights
a d loses at most 2^-17 of that largest. Where d reaches 2^37 the scale alternates instead. Weights
stand at the middle of their bin, those of the highest at the largest |w|, which clipping may have
given to many, all moved so that Σd|w| is what the chunks say it is.
"""

import triton
import triton.language as tl

from .levels import INFINITY

BIN_SHIFT = tl.constexpr(16)  # of a float's bits: 128 bins an octave
HALF_BIN = tl.constexpr(1 << 15)
BINS = tl.constexpr(2048)  # 16 octaves
BELOW = tl.constexpr(11 << 7)  # bins between the first and that of the last scale
UNITS = tl.constexpr(4)
UNIT_OCTAVES = tl.constexpr(16)
LOWEST_OCTAVE = tl.constexpr(-27)  # of d, which is floored at 1e-8
CLOSE = tl.constexpr(1 - 1e-9)  # of gains: nearer to 1, they are equal, and the larger scale counts


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    return float_of((exponent + 127) << 23)


@triton.jit
def unit_of(steepest):
    """Number of the unit for d up to ``steepest``."""
    octave = (bits_of(steepest) >> 23) - 127
    return tl.minimum(tl.maximum((octave - LOWEST_OCTAVE) // UNIT_OCTAVES, 0), UNITS - 1)


@triton.jit
def octave_of_one(unit, length):
    """What one of a bin's counts stands for, as a power of two, where a group has ``length``
    weights: together they stay below 2^62."""
    digits = 61 - ((bits_of(length.to(tl.float32)) >> 23) - 127)
    return (unit + 1) * UNIT_OCTAVES + LOWEST_OCTAVE - digits


@triton.jit
def first_bin(alpha):
    return tl.maximum((bits_of(alpha) >> BIN_SHIFT) - BELOW, 0)


@triton.jit
def add_to_bins(bins, a, d, mask, alpha, largest, steepest, length):
    """Adds a chunk to the bins of its group. Weights that clipping has made equal, or zero, are
    many in one bin: they are added up first, for one address takes an addition at a time."""
    unit = unit_of(steepest)
    place = tl.minimum(tl.maximum((bits_of(a) >> BIN_SHIFT) - first_bin(alpha), 0), BINS - 1)
    # d is below the unit's top, so that neither factor leaves a float's range.
    count = (d * power_of_two(-octave_of_one(unit, length))).to(tl.int64)
    own = bins + unit * BINS
    equal, small = mask & (a == largest), mask & (place == 0)
    tl.atomic_add(own + place, count, mask=mask & ~(equal | small), sem="relaxed")
    most = tl.minimum(tl.maximum((bits_of(largest) >> BIN_SHIFT) - first_bin(alpha), 0), BINS - 1)
    tl.atomic_add(own, tl.sum(tl.where(small, count, 0), 0), sem="relaxed")
    tl.atomic_add(own + most, tl.sum(tl.where(equal & ~small, count, 0), 0), sem="relaxed")


@triton.jit
def as_float(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def as_bits(x):
    return x.to(tl.int64, bitcast=True)


@triton.jit
def middle_of(bin, base, largest):
    middle = float_of(((base + bin) << BIN_SHIFT) | HALF_BIN)
    middle = tl.where(base + bin == bits_of(largest) >> BIN_SHIFT, largest, middle)
    return tl.where(bin == 0, middle * 0.5, middle).to(tl.float64)


@triton.jit
def gather_masses(bins, base, largest, least, most, length, COPIES: tl.constexpr,
                  PIECE: tl.constexpr):
    """Leaves Σd of every bin, in float64, in the first, and zeros in the others, of the units that a
    group has. Returns Σd, Σd|w| of all bins but the last, and Σd of that."""
    total, within = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    beyond = tl.full([], 0.0, tl.float64)
    for piece in range(0, BINS, PIECE):
        bin = tl.arange(0, PIECE) + piece
        mass = tl.zeros([PIECE], tl.float64)
        unit = least
        while unit <= most:
            count = tl.zeros([PIECE], tl.int64)
            for copy in range(COPIES):
                own = bins + (copy * UNITS + unit) * BINS + bin
                count += tl.load(own, cache_modifier=".cg")
                tl.store(own, tl.zeros([PIECE], tl.int64))
            mass += count.to(tl.float64) * power_of_two(octave_of_one(unit, length)).to(tl.float64)
            unit += 1
        tl.store(bins + bin, as_bits(mass))
        moment = tl.where((mass > 0.0) & (bin < BINS - 1), mass * middle_of(bin, base, largest), 0.0)
        total += tl.sum(mass, 0)
        within += tl.sum(moment, 0)
        beyond += tl.sum(tl.where(bin == BINS - 1, mass, 0.0), 0)
    return total, within, beyond


@triton.jit
def sum_up(bins, base, largest, stretch, last, PIECE: tl.constexpr):
    """Σd, in place, and Σd|w| behind it, over the bins from each on. Middles are stretched; ``last``
    is Σd|w| of the last bin."""
    first, second = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for piece in range(0, BINS, PIECE):
        bin = tl.arange(0, PIECE) + (BINS - PIECE - piece)
        mass = as_float(tl.load(bins + bin, cache_modifier=".cg"))
        moment = tl.where(mass > 0.0, mass * middle_of(bin, base, largest) * stretch, 0.0)
        moment = tl.where(bin == BINS - 1, last, moment)
        tl.store(bins + bin, as_bits(second + tl.cumsum(mass, 0, reverse=True)))
        tl.store(bins + BINS + bin, as_bits(first + tl.cumsum(moment, 0, reverse=True)))
        first, second = first + tl.sum(moment, 0), second + tl.sum(mass, 0)


@triton.jit
def best_scale(bins, alpha, mean, largest, least, most, length, LEVELS: tl.constexpr,
               COPIES: tl.constexpr, PIECE: tl.constexpr):
    """The α whose codes gain most: for fixed codes the best E is ½ (Σdw² - A²/B), A = Σdβ|w|,
    B = Σdβ². The highest threshold is tried at every bin's edge, the others at the edges nearest to
    theirs, so every candidate is a true assignment of codes. ``mean``: Σd|w| / Σd. Leaves the bins
    zero. ``PIECE``: bins at once."""
    TOP: tl.constexpr = (LEVELS[len(LEVELS) - 2] + LEVELS[len(LEVELS) - 1]) / 2
    base = first_bin(alpha)
    mass, within, beyond = gather_masses(bins, base, largest, least, most, length, COPIES, PIECE)
    total = mass * mean
    stretch = tl.where(beyond > 0.0, 1.0, total / within)
    last = tl.where(beyond > 0.0, tl.maximum(total - within, 0.0), 0.0)
    tl.debug_barrier()
    sum_up(bins, base, largest, stretch, last, PIECE)
    tl.debug_barrier()
    best = tl.full([], 0.0, tl.float64)
    scale = mean
    for piece in range(0, BINS, PIECE):
        bin = tl.arange(0, PIECE) + piece
        tried = float_of((base + bin) << BIN_SHIFT) / TOP
        first = tl.zeros([PIECE], tl.float64) + total * LEVELS[0]
        second = tl.zeros([PIECE], tl.float64) + mass * (LEVELS[0] * LEVELS[0])
        rises = bin < 0
        for j in tl.static_range(len(LEVELS) - 1):
            threshold = bits_of(tried * ((LEVELS[j] + LEVELS[j + 1]) / 2))
            edge = ((threshold + HALF_BIN) >> BIN_SHIFT) - base
            edge = tl.minimum(tl.maximum(edge, 0), BINS)
            above = as_float(tl.load(bins + edge, mask=edge < BINS, other=0, cache_modifier=".cg"))
            moment = as_float(tl.load(bins + BINS + edge, mask=edge < BINS, other=0,
                                      cache_modifier=".cg"))
            if j == 0:
                rises = above > 0.0  # all on the lowest level are no better than all on another
            first += moment * (LEVELS[j + 1] - LEVELS[j])
            second += above * (LEVELS[j + 1] * LEVELS[j + 1] - LEVELS[j] * LEVELS[j])
        # α is at least the weighted mean, since β <= 1 rises with |w|, but for the width of a bin.
        fitted = first / second
        gain = tl.where(rises & (tried >= mean * 0.5) & (tried < INFINITY) & (second > 0.0),
                        first * fitted, 0.0)
        most_here = tl.max(gain, 0)
        chosen = tl.max(tl.where((gain > 0.0) & (gain >= most_here * CLOSE), bin, -1), 0)
        refit = tl.sum(tl.where(bin == chosen, fitted, 0.0), 0).to(tl.float32)
        takes = (chosen >= 0) & (most_here >= best * CLOSE)
        scale = tl.where(takes, refit, scale)
        best = tl.maximum(best, most_here)
    tl.debug_barrier()
    for piece in range(0, 2 * BINS, PIECE):
        tl.store(bins + piece + tl.arange(0, PIECE), tl.zeros([PIECE], tl.int64))
    return scale

"""The exact scale of long groups: every α of a grid, by a weighted histogram of |w|.

E depends on α only through sums of d and d|w| over weights beyond each threshold, so a histogram of |w|,
64 bins an octave, gives it for every α at once. Bins hold Σd in 64-bit fixed point: integer addition has
no order, so the same input gives the same bits. The unit is the largest d divided by 2^(61 - log2 n): no
bin overflows, and what a weight's d loses is below 2^-30 of the largest even in a billion weights. A bin
stands for weights at its middle, and weights below 2^-32 of the largest count as zero, so refits with
true sums follow: many weights may be equal, as clipping makes them.
"""

import triton
import triton.language as tl

from .chunk_sums import last_of
from .levels import reach
from .long_groups import (
    ALPHA,
    LARGEST,
    STATES,
    STEEPEST,
    chunk_of,
    weights_of,
)
from .plan import FIRST_GROUP, LENGTH, number

BIN_SHIFT = tl.constexpr(17)  # of a float's bits: 64 bins an octave
HALF_BIN = tl.constexpr(1 << 16)
BINS = tl.constexpr(2048)  # 32 octaves
CLOSE = tl.constexpr(1 - 1e-9)  # of gains: nearer to 1, they are equal, and the larger scale counts


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bin_histogram(table, programs, w_scratch, curvature, states, active, tickets, bins, suffix,
                  COPIES: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr,
                  ALIGNED: tl.constexpr):
    """Adds a chunk to its group's bins, of which there are several copies, so that fewer programs
    meet at one address; the last program of the group finds the scale."""
    entry, group, start, mask, chunk, chunks = chunk_of(table, programs, TILE, ALIGNED)
    group += number(entry, FIRST_GROUP)
    if tl.load(active + group) == 0:
        return
    state = states + group * STATES
    largest, steepest = tl.load(state + LARGEST), tl.load(state + STEEPEST)
    base = tl.maximum((bits_of(largest) >> BIN_SHIFT) - (BINS - 1), 0)
    a, d = weights_of(entry, start, mask, w_scratch, curvature, TILE, ALIGNED)
    place = tl.minimum(tl.maximum((bits_of(a) >> BIN_SHIFT) - base, 0), BINS - 1)
    length = tl.load(entry + LENGTH)
    # 2^(61 - ceil(log2 n)) / 2^ceil(log2 d), by way of two floats: one alone could overflow.
    digits = 61 - ((bits_of(length.to(tl.float32)) >> 23) - 126)
    octave = (bits_of(steepest) >> 23) - 126
    unit = float_of((tl.maximum(tl.minimum(digits, 120), 0) + 127) << 23)
    normal = d * float_of((127 - tl.maximum(tl.minimum(octave, 126), -126)) << 23)
    own = bins + (group.to(tl.int64) * COPIES + chunk % COPIES) * BINS
    tl.atomic_add(own + place, (normal * unit).to(tl.int64), mask=mask, sem="relaxed")
    if last_of(tickets + group, chunks):
        own = bins + group.to(tl.int64) * (COPIES * BINS)
        alpha = best_scale(own, suffix + group.to(tl.int64) * (2 * BINS), base, largest,
                           tl.load(state + ALPHA), COPIES, LEVELS)
        tl.store(state + ALPHA, alpha)


@triton.jit
def sum_above(suffix, edge):
    """Sum over the bins from ``edge`` on."""
    return tl.load(suffix + edge, mask=edge < BINS, other=0.0, cache_modifier=".cg")


@triton.jit
def best_scale(bins, suffix, base, largest, mean, COPIES: tl.constexpr, LEVELS: tl.constexpr):
    """The α whose codes gain most: for fixed codes the best E is ½ (Σdw² - A²/B), A = Σdβ|w|,
    B = Σdβ². Each bin goes to one level, so every candidate is a true assignment of codes."""
    lane = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int64)
    for copy in tl.static_range(COPIES):
        count += tl.load(bins + copy * BINS + lane, cache_modifier=".cg")
    d = count.to(tl.float64)
    middle = tl.where(lane == 0, 0.0, float_of(((base + lane) << BIN_SHIFT) | HALF_BIN))
    tl.store(suffix + lane, tl.cumsum(d * middle, 0, reverse=True))
    tl.store(suffix + BINS + lane, tl.cumsum(d, 0, reverse=True))
    tl.debug_barrier()
    alpha = float_of(((bits_of(mean * 0.5) >> BIN_SHIFT) + lane) << BIN_SHIFT)
    first = sum_above(suffix, lane * 0) * LEVELS[0]
    second = sum_above(suffix + BINS, lane * 0) * (LEVELS[0] * LEVELS[0])
    for j in tl.static_range(len(LEVELS) - 1):
        threshold = bits_of(alpha * ((LEVELS[j] + LEVELS[j + 1]) / 2))
        edge = ((threshold + HALF_BIN) >> BIN_SHIFT) - base
        edge = tl.minimum(tl.maximum(edge, 0), BINS)
        first += sum_above(suffix, edge) * (LEVELS[j + 1] - LEVELS[j])
        second += sum_above(suffix + BINS, edge) * (
            LEVELS[j + 1] * LEVELS[j + 1] - LEVELS[j] * LEVELS[j])
    tried = (alpha > 0.0) & (alpha <= largest * (1.02 / reach(LEVELS))) & (second > 0.0)
    gain = tl.where(tried, first * (first / second), 0.0)
    best = tl.max(gain, 0)
    chosen = tl.max(tl.where((gain > 0.0) & (gain >= best * CLOSE), lane, -1), 0)
    refit = tl.sum(tl.where(lane == chosen, first / second, 0.0), 0).to(tl.float32)
    return tl.where(chosen >= 0, refit, mean)

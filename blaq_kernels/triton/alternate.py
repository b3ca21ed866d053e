"""Device functions: the alternation of codes and scale (Eqs. 5 and 7 of BLAQ, AAAI 2024) for a
group that no program holds.

With the codes of a scale α the best scale is A/B, A = Σdβ|w| and B = Σdβ². While a chunk is at
hand, its A and B are summed at the last scale and at a few scales around it, so one pass over
memory serves every alternation: the first has its exact sums, and the next, which are near where a
scale has almost settled, have what lies between those of their neighbours.
"""

import triton
import triton.language as tl

from .chunk_sums import FIRSTS, LANES, RECORD, SECONDS
from .levels import nearest
from .scale_rows import TOLERANCE

# Scales that sums are for, in octaves from the last. Of a scale beyond either end, which a step
# seldom reaches, the codes are those of the end.
AROUND = (-1.0, -1 / 4, -1 / 16, -1 / 64, 0.0, 1 / 64, 1 / 16, 1 / 4, 1.0)
NEAR = (-1 / 64, 0.0, 1 / 64)
ALONE = (0.0,)


@triton.jit
def leave_sums(records, a, d, alpha, LEVELS: tl.constexpr, OCTAVES: tl.constexpr,
               MEAN: tl.constexpr):
    """A chunk's sums at ``alpha`` and around it, and with ``MEAN`` behind them Σd|w| and Σd. ``d``
    is zero where there is no element."""
    record = records + tl.program_id(0).to(tl.int64) * RECORD
    for k in tl.static_range(len(OCTAVES)):
        beta = nearest(a, alpha * 2.0 ** OCTAVES[k], LEVELS)
        weighted = d * beta
        tl.store(record + FIRSTS + k, tl.sum(weighted * a, 0))
        tl.store(record + SECONDS + k, tl.sum(weighted * beta, 0))
    if MEAN:
        tl.store(record + FIRSTS + len(OCTAVES), tl.sum(d * a, 0))
        tl.store(record + SECONDS + len(OCTAVES), tl.sum(d, 0))


@triton.jit
def octave_of(k, OCTAVES: tl.constexpr):
    """The scale of column ``k``; those beyond either end follow an octave apart."""
    LAST: tl.constexpr = len(OCTAVES) - 1
    found = tl.where(k < 0, OCTAVES[0] + k, OCTAVES[LAST] + (k - LAST)).to(tl.float32)
    for i in tl.static_range(len(OCTAVES)):
        found = tl.where(k == i, OCTAVES[i], found)
    return found


@triton.jit
def octaves_from(start, alpha):
    return tl.log2(tl.where(start > 0.0, alpha / start, 1.0))


@triton.jit
def alternated(firsts, seconds, start, alpha, max_iter, OCTAVES: tl.constexpr):
    """The scale after at most ``max_iter`` alternations from ``alpha``, and whether it still moved;
    ``start`` is the scale that sums are around."""
    k = tl.arange(0, LANES)
    here, below = octave_of(k, OCTAVES), octave_of(k - 1, OCTAVES)
    above = octave_of(k + 1, OCTAVES)
    moves = start >= 0.0
    left = max_iter
    while left > 0:
        octave = tl.maximum(octaves_from(start, alpha), OCTAVES[0])
        octave = tl.minimum(octave, OCTAVES[len(OCTAVES) - 1])
        share = tl.minimum((octave - below) / (here - below), (above - octave) / (above - here))
        share = tl.maximum(share, 0.0)  # 1 at a column's own scale, 0 at its neighbours'
        first, second = tl.sum(share * firsts, 0), tl.sum(share * seconds, 0)
        # Every weight on a zero level: α has no say in E; smaller is where E can fall.
        refit = tl.where(second > 0.0, (first / second).to(tl.float32), alpha * 0.5)
        moves = tl.abs(refit - alpha) > alpha * TOLERANCE
        alpha = refit
        left = tl.where(moves, left - 1, 0)
    return alpha, moves

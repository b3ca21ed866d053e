"""Device functions of a codebook: the nearest level, its code and its value.

``LEVELS`` is a constant tuple of ascending magnitudes, the last 1. A threshold is half-way between two
of them, and the comparison is ``|w| >= threshold · scale``, one rounding, so codes are the reference's.

Where magnitudes double from one to the next, as the paper's do, the comparisons are one subtraction of
floats as integers: their bits ascend as they do, and an octave is 2²³. A zero scale takes the largest
level. A NaN takes the smallest.
"""

import triton
import triton.language as tl

SCALE_TINY = tl.constexpr(2.0**-100)
CURVATURE_FLOOR = tl.constexpr(1e-8)
OCTAVE = tl.constexpr(1 << 23)  # of the bits of a float32
ONE = tl.constexpr(0x3F800000)  # bits of 1.0
INFINITY = tl.constexpr(float("inf"))


@triton.constexpr_function
def doubles(levels):
    """Whether integer comparison serves; for two magnitudes one comparison of floats is as good."""
    return len(levels) > 2 and all(2 * a == b for a, b in zip(levels, levels[1:]))


@triton.constexpr_function
def reach(levels):
    """The best scale is at most ``max |w| / reach``. Above, every weight is on one of the lower
    levels: on the lowest, or on levels that a smaller scale has all the same."""
    thresholds = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
    best = thresholds[0]
    for ratio in (1 / 2, 1 / 3):
        lower = [x for x in levels if x <= ratio + 1e-9]
        if lower and all(any(abs(x - ratio * y) < 1e-9 for y in levels) for x in lower):
            best = max(best, thresholds[len(lower) - 1])
    return best


@triton.constexpr_function
def sign_shift(levels):
    return (len(levels) - 1).bit_length()


@triton.jit
def octaves(a, scale, LEVELS: tl.constexpr):
    """How far below the largest level the nearest is, as bits to be added to a float's; at most 0."""
    threshold = (scale * ((LEVELS[len(LEVELS) - 2] + LEVELS[len(LEVELS) - 1]) / 2)).to(
        tl.int32, bitcast=True)
    LOWEST: tl.constexpr = (1 - len(LEVELS)) * OCTAVE
    below = tl.minimum(tl.maximum(a.to(tl.int32, bitcast=True) - threshold, LOWEST), 0)
    return below & -OCTAVE


@triton.jit
def nearest(a, scale, LEVELS: tl.constexpr):
    """Magnitude of the level nearest to ``a / scale``, a >= 0."""
    if doubles(LEVELS):
        beta = (octaves(a, scale, LEVELS) + ONE).to(tl.float32, bitcast=True)
    else:
        beta = tl.full(a.shape, LEVELS[0], tl.float32)
        for j in tl.static_range(len(LEVELS) - 1):
            beta = tl.where(a >= scale * ((LEVELS[j] + LEVELS[j + 1]) / 2), LEVELS[j + 1], beta)
    return beta


@triton.jit
def index_of(w, scale, LEVELS: tl.constexpr):
    """Index of the magnitude nearest to ``|w| / scale``."""
    a = tl.abs(w)
    if doubles(LEVELS):
        index = (octaves(a, scale, LEVELS) >> 23) + (len(LEVELS) - 1)
        index = tl.where(a <= INFINITY, index, 0)
    else:
        index = tl.zeros(w.shape, tl.int32)
        for j in tl.static_range(len(LEVELS) - 1):
            index += (a >= scale * ((LEVELS[j] + LEVELS[j + 1]) / 2)).to(tl.int32)
    return index


@triton.jit
def code_of(w, scale, LEVELS: tl.constexpr):
    """Code: sign << (bits - 1) | index. A zero magnitude has one code, the positive one."""
    index = index_of(w, scale, LEVELS)
    negative = w < 0.0
    if LEVELS[0] == 0.0:
        negative = negative & (index > 0)
    return index | (negative.to(tl.int32) << sign_shift(LEVELS))


@triton.jit
def value_of(w, scale, LEVELS: tl.constexpr):
    """Nearest level × scale, in float32, rounded once."""
    a = tl.abs(w)
    if doubles(LEVELS):
        LOWEST: tl.constexpr = (1 - len(LEVELS)) * OCTAVE
        below = tl.where(a <= INFINITY, octaves(a, scale, LEVELS), LOWEST)
        y = (below + scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        y = tl.broadcast_to(scale * LEVELS[0], w.shape)
        for j in tl.static_range(len(LEVELS) - 1):
            y = tl.where(a >= scale * ((LEVELS[j] + LEVELS[j + 1]) / 2), scale * LEVELS[j + 1], y)
    y = tl.where(w < 0.0, -y, y)
    if LEVELS[0] == 0.0:
        y += 0.0  # a zero level has no sign: -0 + 0 is +0
    return y


@triton.jit
def usable(scale):
    """A scale as it is kept: positive, whatever the weights were; NaN too becomes the smallest."""
    return tl.where(scale > SCALE_TINY, scale, SCALE_TINY)


@triton.jit
def floored(d):
    return tl.where(d > CURVATURE_FLOOR, d, CURVATURE_FLOOR)

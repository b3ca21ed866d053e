"""Device functions: the scales of a tile of groups, each a row of registers.

The scale minimises ``½ Σ d (|w| - α β)²``, β the nearest levels (Eqs. 5 and 7 of BLAQ, AAAI 2024).
"""

import triton
import triton.language as tl

from .levels import INFINITY, SCALE_TINY, nearest, reach

TOLERANCE = tl.constexpr(1e-6)  # of α, ends the alternation
DENSITY = tl.constexpr(64)  # candidates an octave
FINE = tl.constexpr(4)  # candidates on either side of the best, between it and its neighbour
CLOSE = tl.constexpr(1 - 1e-6)  # of energies: nearer to 1, they are equal


@triton.jit
def scale_of_rows(a, d, init, max_iter, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """Scale of every row of ``a`` = |w|, with ``d`` >= 0, zero in the padding."""
    if len(LEVELS) == 1:
        alpha = tl.sum(d * a, 1) / tl.sum(d, 1)
    elif EXACT:
        alpha = search(a, d, LEVELS)
    else:
        alpha = alternate(a, d, init, max_iter, LEVELS)
    return alpha


@triton.jit
def alternate(a, d, init, max_iter, LEVELS: tl.constexpr):
    """Codes and scale in turn, from ``init``; where that is not positive, from the weighted mean,
    which is what the top level of every weight gives, and that is the first iteration."""
    alpha = tl.where(init > 0.0, init, 0.0)
    running = tl.full(alpha.shape, 1, tl.int32)
    left = max_iter
    while left > 0:
        beta = nearest(a, alpha[:, None], LEVELS)
        weighted = d * beta
        first, second = tl.sum(weighted * a, 1), tl.sum(weighted * beta, 1)
        # Every weight on a zero level: α has no say in E; smaller is where E can fall.
        refit = tl.where(second > 0.0, first / second, alpha * 0.5)
        moved = tl.abs(refit - alpha) > alpha * TOLERANCE
        alpha = tl.where(running != 0, refit, alpha)
        running = running & moved.to(tl.int32)
        left = tl.where(tl.max(running, 0) != 0, left - 1, 0)
    return alpha


@triton.jit
def energy_at(a, d, alpha, LEVELS: tl.constexpr):
    """With the codes of ``alpha``: the best scale, and 2E there. From the residuals, not from
    Σdw² - A²/B: the difference of two like numbers would hide an E below 1e-6 of them."""
    beta = nearest(a, alpha[:, None], LEVELS)
    residual = a - alpha[:, None] * beta
    weighted = d * residual
    squares, cross = tl.sum(weighted * residual, 1), tl.sum(weighted * beta, 1)
    second = tl.sum(d * beta * beta, 1)
    shift = tl.where(second > 0.0, cross / second, 0.0)
    return squares - shift * cross, alpha + shift


@triton.jit
def search(a, d, LEVELS: tl.constexpr):
    """The global minimum, nearly: a grid of α, a finer one about its best, and one refit. α is at
    least the weighted mean, since β <= 1 rises with |w|. On random groups of 5 to 1000 weights E is
    within 0.1 % of the minimum."""
    STEP: tl.constexpr = 2.0 ** (1 / DENSITY)
    FINE_STEP: tl.constexpr = 2.0 ** (1 / (DENSITY * FINE))
    alpha = tl.sum(d * a, 1) / tl.sum(d, 1)
    # Zeros, infinite and NaN weights have no best scale, and must not keep the loop going; nor must
    # a scale so small that a step of the grid rounds to nothing.
    last = tl.max(a, 1) * (STEP / reach(LEVELS))
    last = tl.where((last < INFINITY) & (alpha > SCALE_TINY), last, -1.0)
    least = tl.full(alpha.shape, INFINITY, tl.float32)
    center, best = alpha, alpha
    while tl.max((alpha <= last).to(tl.int32), 0) != 0:
        energy, refit = energy_at(a, d, alpha, LEVELS)
        take = (energy * CLOSE <= least) & (alpha <= last)  # of equally good ones the largest
        least = tl.where(take, energy, least)
        center, best = tl.where(take, alpha, center), tl.where(take, refit, best)
        alpha *= STEP
    alpha = center / STEP
    for _ in range(2 * FINE + 1):
        energy, refit = energy_at(a, d, alpha, LEVELS)
        take = energy < least * CLOSE
        least, best = tl.where(take, energy, least), tl.where(take, refit, best)
        alpha *= FINE_STEP
    return energy_at(a, d, best, LEVELS)[1]

"""Short groups: one program holds a tile of them in registers, from the gradients to the params.

Bytes a float32 parameter that must move: trial reads 16 and writes 4, step reads 20 and writes 16; no
byte moves twice. Groups of different length share a launch: a program's tile is as wide as its own
weight's groups need, ``WIDTHS`` being those that occur.
"""

import triton
import triton.language as tl

from .adam import advance, everywhere, scalar_of
from .levels import code_of, floored, usable, value_of
from .plan import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_BLOCK,
    GRAD,
    GROUPS,
    INDEX,
    LATENT,
    LENGTH,
    PARAM,
    PER_ROW,
    ROW,
    SCALE,
    TRIAL_GRAD,
    WIDTH,
    address,
    first_element,
    number,
)
from .scale_rows import scale_of_rows


@triton.jit
def tile_of(entry, block, TILE: tl.constexpr, W: tl.constexpr, ALIGNED: tl.constexpr):
    """A program's groups, where its tile begins, the places of its elements from there, and which
    of them exist."""
    R: tl.constexpr = TILE // W
    per_row, row, length = number(entry, PER_ROW), number(entry, ROW), number(entry, LENGTH)
    group = block * R + tl.arange(0, R)
    start = first_element(block * R, length, per_row, row, ALIGNED)
    place = (first_element(group, length, per_row, row, ALIGNED) - start).to(tl.int32)
    size = tl.minimum(length, row - group % per_row * length)
    if ALIGNED:
        place, size = tl.multiple_of(place, 8), tl.multiple_of(size, 8)
    exists = group < number(entry, GROUPS)
    column = tl.arange(0, W)
    mask = exists[:, None] & (column[None, :] < size[:, None])
    return group, exists, start, place[:, None] + column[None, :], mask


@triton.jit
def step_tile(entry, block, lr, step, backtrack, grad_factor, skips, flips, beta1, one_minus_beta1,
              log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay, clip, max_iter,
              DTYPE: tl.constexpr, COMMITS: tl.constexpr, BLENDS: tl.constexpr,
              LEVELS: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr, W: tl.constexpr,
              ALIGNED: tl.constexpr):
    group, exists, start, at, mask = tile_of(entry, block, TILE, W, ALIGNED)
    grads = address(entry, GRAD, DTYPE, ALIGNED) + start
    latents = address(entry, LATENT, tl.float32, ALIGNED) + start
    exp_avgs = address(entry, EXP_AVG, tl.float32, ALIGNED) + start
    exp_avg_sqs = address(entry, EXP_AVG_SQ, tl.float32, ALIGNED) + start
    scales = address(entry, SCALE, tl.float32, False) + group
    g = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32)
    latent = tl.load(latents + at, mask=mask, other=0.0)
    m = tl.load(exp_avgs + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sqs + at, mask=mask, other=0.0)
    old_scale = tl.load(scales, mask=exists, other=1.0)
    trial = g
    if BLENDS:
        trial_grads = address(entry, TRIAL_GRAD, DTYPE, ALIGNED) + start
        trial = tl.load(trial_grads + at, mask=mask & everywhere(backtrack < 1.0, mask), other=0.0).to(tl.float32)
    if grad_factor is not None:
        g, trial = g * grad_factor, trial * grad_factor
    w, m, v, d = advance(g, trial, latent, m, v, lr, step, backtrack, beta1, one_minus_beta1,
                         log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay, clip,
                         BLENDS)
    if COMMITS:  # now, so that no register holds the moments while the scale is sought
        changes = mask
        if skips is not None:
            w = tl.where(everywhere(skips, w), latent, w)
            changes, exists = mask & ~everywhere(skips, mask), exists & ~everywhere(skips, exists)
        tl.store(exp_avgs + at, m, mask=changes)
        tl.store(exp_avg_sqs + at, v, mask=changes)
        tl.store(latents + at, w, mask=changes)
    d = tl.where(mask, floored(d), 0.0)
    scale = usable(scale_of_rows(tl.abs(w), d, old_scale, max_iter, LEVELS, EXACT))
    if COMMITS:
        if skips is not None:  # a trial may have overwritten the params: they are written anyhow
            scale = tl.where(everywhere(skips, scale), old_scale, scale)
        tl.store(scales, scale, mask=exists)
        if flips is not None:
            old, new = code_of(latent, old_scale[:, None], LEVELS), code_of(w, scale[:, None], LEVELS)
            count = tl.sum(tl.sum((mask & (old != new)).to(tl.int32), 1), 0)
            tl.atomic_add(flips + number(entry, INDEX), count.to(tl.int64), sem="relaxed")
    params = address(entry, PARAM, DTYPE, ALIGNED) + start
    tl.store(params + at, value_of(w, scale[:, None], LEVELS).to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["max_iter"])
def step_short_groups(table, programs, lr, step, backtrack, grad_scale, found_inf, flips, beta1,
                      one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps,
                      weight_decay, clip, max_iter, DTYPE: tl.constexpr, COMMITS: tl.constexpr,
                      BLENDS: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
                      TILE: tl.constexpr, WIDTHS: tl.constexpr, ALIGNED: tl.constexpr):
    """Stage 2 where ``COMMITS``, else stage 1."""
    program = tl.program_id(0)
    skips = None
    if found_inf is not None:
        skips = tl.load(found_inf) != 0.0
        if not COMMITS:
            if skips:
                return
    entry = table + tl.load(programs + program) * COLUMNS
    block = program - number(entry, FIRST_BLOCK)
    kind = number(entry, WIDTH)
    a = 1.0
    if BLENDS:
        a = scalar_of(backtrack)
    grad_factor = None
    if grad_scale is not None:
        grad_factor = 1.0 / tl.load(grad_scale)
    for i in tl.static_range(len(WIDTHS)):
        if kind == i:
            step_tile(entry, block, scalar_of(lr), scalar_of(step), a, grad_factor, skips, flips, beta1,
                      one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps,
                      weight_decay, clip, max_iter, DTYPE, COMMITS, BLENDS, LEVELS, EXACT, TILE,
                      WIDTHS[i], ALIGNED)


@triton.jit
def solve_tile(entry, block, curvature, codes, init, max_iter, LEVELS: tl.constexpr,
               EXACT: tl.constexpr, TILE: tl.constexpr, W: tl.constexpr, ALIGNED: tl.constexpr):
    group, exists, start, at, mask = tile_of(entry, block, TILE, W, ALIGNED)
    w = tl.load(address(entry, LATENT, tl.float32, ALIGNED) + start + at, mask=mask, other=0.0)
    d = tl.load(curvature + start + at, mask=mask, other=0.0)
    d = tl.where(mask, floored(d), 0.0)
    old = tl.zeros(group.shape, tl.float32)
    if init is not None:
        old = tl.load(init + group, mask=exists, other=1.0)
    scale = usable(scale_of_rows(tl.abs(w), d, old, max_iter, LEVELS, EXACT))
    tl.store(address(entry, SCALE, tl.float32, False) + group, scale, mask=exists)
    tl.store(codes + start + at, code_of(w, scale[:, None], LEVELS).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["max_iter"])
def solve_short_groups(table, programs, curvature, codes, init, max_iter, LEVELS: tl.constexpr,
                       EXACT: tl.constexpr, TILE: tl.constexpr, WIDTHS: tl.constexpr,
                       ALIGNED: tl.constexpr):
    """Codes and scales of one weight."""
    entry = table + tl.load(programs + tl.program_id(0)) * COLUMNS
    solve_tile(entry, tl.program_id(0), curvature, codes, init, max_iter, LEVELS, EXACT, TILE,
               WIDTHS[0], ALIGNED)

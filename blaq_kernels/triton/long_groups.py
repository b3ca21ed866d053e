"""Long groups: a program takes a chunk; what a group's scale needs is summed over its chunks.

The last program of a group to finish (``chunk_sums.py``) moves the group's scale on. A step is

1. ``step_long_groups``: update, and the sums from which the last program has the scale;
2. for the exact scale of several levels, ``histogram.py`` and two ``sum_long_groups``, which refit
it;
3. ``write_long_groups``: params from latents and scales.
 With one level and by alternation 1 and 3 are all: 20 bytes read and 16 written by 1, 4 read and 4
written by 3, a float32 parameter. In a trial ω* lies in scratch memory in between, and the
curvature where 2 reads it. ``solve`` alternates by ``sum_long_groups``, as often as the alternation
may go on: programs of a group whose scale has settled end at once, so the number of launches needs
no look at the device.
"""

import triton
import triton.language as tl

from .adam import advance, everywhere, scalar_of
from .alternate import alternated, leave_sums
from .chunk_sums import LANES, MAXIMA, RECORD, last_of_group, of_group
from .levels import code_of, floored, usable, value_of
from .plan import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_BLOCK,
    FIRST_GROUP,
    GRAD,
    INDEX,
    LATENT,
    LENGTH,
    PARAM,
    PER_ROW,
    ROW,
    SCALE,
    SCRATCH,
    TRIAL_GRAD,
    WIDTH,
    address,
    first_element,
    number,
)

# State of a group, in float32: its scale so far, and the largest |w| and d of an exact search.
ALPHA, LARGEST, STEEPEST = map(tl.constexpr, range(3))
STATES = tl.constexpr(3)


@triton.jit
def chunk_of(table, programs, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """The table's row of this program's weight, its group there, where the chunk begins, which of
    its elements exist, and how many chunks a group has."""
    program = tl.program_id(0)
    entry = table + tl.load(programs + program) * COLUMNS
    block = program - number(entry, FIRST_BLOCK)
    chunks = number(entry, WIDTH)
    group, chunk = block // chunks, block % chunks
    per_row, row, length = number(entry, PER_ROW), tl.load(entry + ROW), tl.load(entry + LENGTH)
    offset = chunk.to(tl.int64) * TILE
    start = first_element(group, length, per_row, row, ALIGNED) + offset
    size = tl.minimum(length, row - (group % per_row) * length) - offset
    size = tl.maximum(tl.minimum(size, TILE), 0).to(tl.int32)
    if ALIGNED:
        start, size = tl.multiple_of(start, 8), tl.multiple_of(size, 8)
    return entry, group, start, tl.arange(0, TILE) < size, chunk, chunks


@triton.jit
def move_scale(a, d, alpha, max_iter, group, chunk, chunks, records, runs, states, active, tickets,
               LEVELS: tl.constexpr, OCTAVES: tl.constexpr, MEASURES: tl.constexpr):
    """Leaves the sums of one chunk; the last program moves the group's scale on. ``d`` is zero
    where there is no element. ``MEASURES`` also finds the largest |w| and d."""
    leave_sums(records, a, d, alpha, LEVELS, OCTAVES)
    if MEASURES:
        maxima = records + tl.program_id(0).to(tl.int64) * RECORD + MAXIMA
        tl.store(maxima, tl.max(tl.where(d > 0.0, a, 0.0), 0))
        tl.store(maxima + 1, tl.max(d, 0))
    if last_of_group(records, runs, tickets, group, chunk, chunks, len(OCTAVES), MEASURES):
        scale, moves = alternated(runs, chunk, chunks, alpha, max_iter, OCTAVES)
        state = states + group * STATES
        tl.store(state + ALPHA, scale)
        if active is not None:
            tl.store(active + group, moves.to(tl.int32))
        if MEASURES:
            lane = tl.arange(0, LANES)
            tl.store(state + LARGEST + lane, of_group(runs, chunk, chunks, MAXIMA, True),
                     mask=lane < 2)


@triton.jit(do_not_specialize=["max_iter"])
def step_long_groups(table, programs, lr, step, backtrack, grad_scale, found_inf, flips, beta1,
                     one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps,
                     weight_decay, clip, max_iter, w_scratch, d_scratch, code_scratch, records, runs,
                     states, active, tickets, DTYPE: tl.constexpr, COMMITS: tl.constexpr,
                     BLENDS: tl.constexpr, LEVELS: tl.constexpr, OCTAVES: tl.constexpr,
                     EXACT: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pass 1, stage 2 where ``COMMITS``, else stage 1. A step that is skipped ends at once, with no
    group active, so the passes between end at once too."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    entry, group, start, mask, chunk, chunks = chunk_of(table, programs, TILE, ALIGNED)
    at = tl.arange(0, TILE)
    latents = address(entry, LATENT, tl.float32, ALIGNED) + start
    exp_avgs = address(entry, EXP_AVG, tl.float32, ALIGNED) + start
    exp_avg_sqs = address(entry, EXP_AVG_SQ, tl.float32, ALIGNED) + start
    g = tl.load(address(entry, GRAD, DTYPE, ALIGNED) + start + at, mask=mask, other=0.0).to(tl.float32)
    latent = tl.load(latents + at, mask=mask, other=0.0)
    m = tl.load(exp_avgs + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sqs + at, mask=mask, other=0.0)
    old_scale = tl.load(address(entry, SCALE, tl.float32, False) + group)
    trial = g
    a = 1.0
    if BLENDS:
        a = scalar_of(backtrack)
        trial_grads = address(entry, TRIAL_GRAD, DTYPE, ALIGNED) + start
        trial = tl.load(trial_grads + at, mask=mask & everywhere(a < 1.0, mask), other=0.0).to(
            tl.float32)
    if grad_scale is not None:
        factor = 1.0 / tl.load(grad_scale)
        g, trial = g * factor, trial * factor
    w, m, v, d = advance(g, trial, latent, m, v, scalar_of(lr), scalar_of(step), a, beta1,
                         one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps,
                         weight_decay, clip, BLENDS)
    scratch = tl.load(entry + SCRATCH) + start
    if ALIGNED:
        scratch = tl.multiple_of(scratch, 8)
    if COMMITS:
        tl.store(latents + at, w, mask=mask)
        tl.store(exp_avgs + at, m, mask=mask)
        tl.store(exp_avg_sqs + at, v, mask=mask)
    else:
        tl.store(w_scratch + scratch + at, w, mask=mask)
    if d_scratch is not None:
        tl.store(d_scratch + scratch + at, d, mask=mask)
    if flips is not None:
        if len(LEVELS) > 1:
            old_code = code_of(latent, old_scale, LEVELS).to(tl.uint8)
            tl.store(code_scratch + scratch + at, old_code, mask=mask)
        else:  # codes are signs, which the scale has no part in
            count_flips(flips, entry, mask & ((latent < 0.0) != (w < 0.0)))
    alpha = tl.where(old_scale > 0.0, old_scale, 0.0)
    if EXACT:
        alpha = tl.zeros_like(alpha)  # the top level of every weight: the weighted mean
    group += number(entry, FIRST_GROUP)
    move_scale(tl.abs(w), tl.where(mask, floored(d), 0.0), alpha, max_iter, group, chunk, chunks,
               records, runs, states, active, tickets, LEVELS, OCTAVES, EXACT)


@triton.jit
def count_flips(flips, entry, changed):
    count = tl.sum(changed.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(flips + number(entry, INDEX), count, sem="relaxed")  # integers: any order


@triton.jit
def sum_long_groups(table, programs, w_scratch, curvature, init, records, runs, states, active,
                    tickets, FIRST: tl.constexpr, LEVELS: tl.constexpr, OCTAVES: tl.constexpr,
                    EXACT: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pass 2: one alternation, or one refit of an exact scale. ``FIRST`` begins a solve: from
    ``init``, or from the weighted mean."""
    entry, group, start, mask, chunk, chunks = chunk_of(table, programs, TILE, ALIGNED)
    numbered = group + number(entry, FIRST_GROUP)
    if FIRST:
        alpha = tl.full([], 0.0, tl.float32)
        if init is not None:
            if not EXACT:
                alpha = tl.load(init + group)
                alpha = tl.where(alpha > 0.0, alpha, 0.0)
    else:
        if tl.load(active + numbered) == 0:
            return
        alpha = tl.load(states + numbered * STATES + ALPHA)
    a, d = weights_of(entry, start, mask, w_scratch, curvature, TILE, ALIGNED)
    move_scale(a, d, alpha, 1, numbered, chunk, chunks, records, runs, states, active, tickets, LEVELS,
               OCTAVES, FIRST and EXACT)


@triton.jit
def weights_of(entry, start, mask, w_scratch, curvature, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """|w|, of the latents if there is no scratch for it, and d of a chunk, zero where there is none."""
    at = tl.arange(0, TILE)
    scratch = tl.load(entry + SCRATCH) + start
    if ALIGNED:
        scratch = tl.multiple_of(scratch, 8)
    if w_scratch is not None:
        w = tl.load(w_scratch + scratch + at, mask=mask, other=0.0)
    else:
        w = tl.load(address(entry, LATENT, tl.float32, ALIGNED) + start + at, mask=mask, other=0.0)
    d = tl.load(curvature + scratch + at, mask=mask, other=0.0)
    return tl.abs(w), tl.where(mask, floored(d), 0.0)


@triton.jit
def write_long_groups(table, programs, found_inf, flips, w_scratch, code_scratch, states,
                      DTYPE: tl.constexpr, COMMITS: tl.constexpr, LEVELS: tl.constexpr,
                      TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pass 3: params, and where ``COMMITS`` the scales. After a skipped step a trial's params go
    back to what (latent, scale) stand for."""
    skips = tl.program_id(0) < 0
    if found_inf is not None:
        skips = tl.load(found_inf) != 0.0
        if not COMMITS:
            if skips:
                return
    entry, group, start, mask, chunk, chunks = chunk_of(table, programs, TILE, ALIGNED)
    at = tl.arange(0, TILE)
    scratch = tl.load(entry + SCRATCH) + start
    if ALIGNED:
        scratch = tl.multiple_of(scratch, 8)
    scales = address(entry, SCALE, tl.float32, False) + group
    scale = usable(tl.load(states + (group + number(entry, FIRST_GROUP)) * STATES + ALPHA))
    if COMMITS:
        if skips:
            scale = tl.load(scales)
        else:
            if chunk == 0:
                tl.store(scales, scale)
    if w_scratch is not None:
        w = tl.load(w_scratch + scratch + at, mask=mask, other=0.0)
    else:
        w = tl.load(address(entry, LATENT, tl.float32, ALIGNED) + start + at, mask=mask, other=0.0)
    params = address(entry, PARAM, DTYPE, ALIGNED) + start
    tl.store(params + at, value_of(w, scale, LEVELS).to(DTYPE), mask=mask)
    if code_scratch is not None:
        old = tl.load(code_scratch + scratch + at, mask=mask, other=0).to(tl.int32)
        changed = mask & (old != code_of(w, scale, LEVELS))
        count_flips(flips, entry, changed & ~everywhere(skips, mask))


@triton.jit
def code_long_groups(table, programs, codes, states, LEVELS: tl.constexpr, TILE: tl.constexpr,
                     ALIGNED: tl.constexpr):
    """Ends a solve: codes and scales of one weight."""
    entry, group, start, mask, chunk, chunks = chunk_of(table, programs, TILE, ALIGNED)
    at = tl.arange(0, TILE)
    scale = usable(tl.load(states + group * STATES + ALPHA))
    if chunk == 0:
        tl.store(address(entry, SCALE, tl.float32, False) + group, scale)
    w = tl.load(address(entry, LATENT, tl.float32, ALIGNED) + start + at, mask=mask, other=0.0)
    tl.store(codes + start + at, code_of(w, scale, LEVELS).to(tl.uint8), mask=mask)

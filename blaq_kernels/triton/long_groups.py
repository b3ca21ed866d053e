"""Long groups: a program takes a chunk; what a group's scale needs is summed over its chunks.

The last program of a group to finish, known by a ticket, adds the chunks' sums in their order, in
float64, so the same input gives the same bits, and moves the group's scale on. The passes are

1. ``step_long_groups``: update, and the sums at the last scale, which is the first alternation;
2. ``sum_long_groups``, as often as the alternation may go on: programs of a group whose scale has
   settled end at once, so the number of launches needs no look at the device;
   or, for the exact scale, ``histogram.py`` and two of these;
3. ``write_long_groups``: params from latents and scales.

Between them the curvature, and in a trial ω*, lie in scratch memory. With one level passes 1 and 3 are
all: 20 bytes read and 16 written by 1, 4 read and 4 written by 3, a float32 parameter.
"""

import triton
import triton.language as tl

from .adam import advance, everywhere, scalar_of
from .levels import code_of, floored, nearest, usable, value_of
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
from .scale_rows import TOLERANCE

LANES = tl.constexpr(256)  # sums that the last program adds side by side

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
def last_of_group(tickets, group, chunks):
    """Whether every other program of the group has finished: then what they stored can be read.

    One thread takes the ticket. The barrier puts every thread's stores before it, it releases them to
    the whole GPU and acquires those of the others, and its result reaches the other threads by a barrier
    again. Sums are read past L1 (``.cg``), which may hold lines from before."""
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets + group, 1, sem="acq_rel")
    return ticket == chunks - 1


@triton.jit
def in_order(sums, chunks):
    """Sum of a group's chunks, in float64, in an order that does not change."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    first = 0
    while first < chunks:
        total += tl.load(sums + lane, mask=lane < chunks, other=0.0, cache_modifier=".cg").to(
            tl.float64)
        first, lane = first + LANES, lane + LANES
    return tl.sum(total, 0)


@triton.jit
def largest_of(values, chunks):
    lane = tl.arange(0, LANES)
    most = tl.zeros([LANES], tl.float32)
    first = 0
    while first < chunks:
        most = tl.maximum(most, tl.load(values + lane, mask=lane < chunks, other=0.0,
                                        cache_modifier=".cg"))
        first, lane = first + LANES, lane + LANES
    return tl.max(most, 0)


@triton.jit
def move_scale(a, d, alpha, group, chunk, chunks, sums, states, active, tickets,
               LEVELS: tl.constexpr, MEASURES: tl.constexpr):
    """Sums of one chunk with the codes of ``alpha``; the last program refits the group's scale.
    ``d`` is zero where there is no element. ``MEASURES`` also finds the largest |w| and d."""
    programs = tl.num_programs(0).to(tl.int64)
    program = tl.program_id(0)
    beta = nearest(a, alpha, LEVELS)
    weighted = d * beta
    tl.store(sums + program, tl.sum(weighted * a, 0))
    tl.store(sums + programs + program, tl.sum(weighted * beta, 0))
    if MEASURES:
        tl.store(sums + 2 * programs + program, tl.max(tl.where(d > 0.0, a, 0.0), 0))
        tl.store(sums + 3 * programs + program, tl.max(d, 0))
    if last_of_group(tickets, group, chunks):
        mine = sums + program - chunk
        first, second = in_order(mine, chunks), in_order(mine + programs, chunks)
        # Every weight on a zero level: α has no say in E; smaller is where E can fall.
        refit = tl.where(second > 0.0, (first / second).to(tl.float32), alpha * 0.5)
        state = states + group * STATES
        tl.store(state + ALPHA, refit)
        tl.store(active + group, (tl.abs(refit - alpha) > alpha * TOLERANCE).to(tl.int32))
        tl.store(tickets + group, 0)
        if MEASURES:
            tl.store(state + LARGEST, largest_of(mine + 2 * programs, chunks))
            tl.store(state + STEEPEST, largest_of(mine + 3 * programs, chunks))


@triton.jit
def step_long_groups(table, programs, lr, step, backtrack, grad_scale, found_inf, flips, beta1,
                     one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps,
                     weight_decay, clip, w_scratch, d_scratch, code_scratch, sums, states, active,
                     tickets, DTYPE: tl.constexpr, COMMITS: tl.constexpr, BLENDS: tl.constexpr,
                     LEVELS: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
                     ALIGNED: tl.constexpr):
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
    if len(LEVELS) > 1:
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
    move_scale(tl.abs(w), tl.where(mask, floored(d), 0.0), alpha, group, chunk, chunks, sums, states,
               active, tickets, LEVELS, EXACT)


@triton.jit
def count_flips(flips, entry, changed):
    count = tl.sum(changed.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(flips + number(entry, INDEX), count, sem="relaxed")  # integers: any order


@triton.jit
def sum_long_groups(table, programs, w_scratch, curvature, init, sums, states, active, tickets,
                    FIRST: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
                    TILE: tl.constexpr, ALIGNED: tl.constexpr):
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
    move_scale(a, d, alpha, numbered, chunk, chunks, sums, states, active, tickets, LEVELS,
               FIRST and EXACT)


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

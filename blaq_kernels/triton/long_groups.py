"""Long groups: a program takes a chunk; what a group's scale needs is summed over its chunks.

The last program of a group to finish (``chunk_sums.py``) has its scale from these sums: by
alternation (``alternate.py``), or by a search for the least E (``histogram.py``). A step is

1. ``step_long_groups``: update, sums, scales;
2. ``write_long_groups``: params from latents and scales.

20 bytes of a float32 parameter are read and 16 written by 1, 4 read and 4 written by 2. In a trial
ω* lies in scratch memory in between. ``solve``, which has no last scale, takes the weighted mean for
it by ``sum_long_groups``, and alternates by the same, as often as the alternation may go on:
programs of a group whose scale has settled end at once, so the number of launches needs no look at
the device. Or it searches around the mean, and refits once.
"""

import triton
import triton.language as tl

from .adam import advance, everywhere, scalar_of
from .alternate import alternated, leave_sums, octaves_from
from .chunk_sums import (
    FIRSTS,
    LANES,
    MAXIMA,
    RECORD,
    SECONDS,
    last_of_group,
    of_group,
)
from .histogram import BINS, UNITS, add_to_bins, best_scale, unit_of
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

MOST_CURVATURE = tl.constexpr(2.0**37)  # that the units of a histogram hold
POLISH = tl.constexpr(3)  # alternations after a search that ends near the last scale


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
def move_scale(entry, a, d, mask, alpha, max_iter, group, chunk, chunks, records, runs, bins, states,
               active, tickets, LEVELS: tl.constexpr, OCTAVES: tl.constexpr, EXACT: tl.constexpr,
               COPIES: tl.constexpr):
    """Leaves the sums of one chunk; the last program moves the group's scale on from ``alpha``.
    ``d`` is zero where there is no element. ``EXACT``: by a histogram, of which there are copies,
    so that fewer programs meet at one address."""
    leave_sums(records, a, d, alpha, LEVELS, OCTAVES, EXACT)
    WIDTH: tl.constexpr = len(OCTAVES) + EXACT
    if EXACT:
        largest, steepest = tl.max(tl.where(mask, a, 0.0), 0), tl.max(d, 0)
        record = records + tl.program_id(0).to(tl.int64) * RECORD + MAXIMA
        unit = unit_of(steepest).to(tl.float32)
        tl.store(record, steepest)
        tl.store(record + 1, unit)
        tl.store(record + 2, -unit + (UNITS - 1))
        tl.store(record + 3, largest)
        length = tl.minimum(tl.load(entry + LENGTH), tl.load(entry + ROW))
        bins += group.to(tl.int64) * (COPIES * UNITS * BINS)
        add_to_bins(bins + chunk % COPIES * (UNITS * BINS), a, d, mask, alpha, largest, steepest,
                    length)
    if last_of_group(records, runs, tickets, group, chunk, chunks, WIDTH, 4 * EXACT):
        firsts = of_group(runs, chunk, chunks, FIRSTS)
        seconds = of_group(runs, chunk, chunks, SECONDS)
        if EXACT:
            maxima = of_group(runs, chunk, chunks, MAXIMA, True)
            PIECE: tl.constexpr = 256 if active is None else 128  # what does not spill on sm_120
            scale = searched(bins, firsts, seconds, maxima, alpha, max_iter, length, LEVELS, OCTAVES,
                             COPIES, PIECE)
        else:
            scale, moves = alternated(firsts, seconds, alpha, alpha, max_iter, OCTAVES)
            if active is not None:
                tl.store(active + group, moves.to(tl.int32))
        tl.store(states + group, scale)


@triton.jit
def column(values, k):
    return tl.sum(tl.where(tl.arange(0, LANES) == k, values, 0.0), 0)


@triton.jit
def searched(bins, firsts, seconds, maxima, alpha, max_iter, length, LEVELS: tl.constexpr,
             OCTAVES: tl.constexpr, COPIES: tl.constexpr, PIECE: tl.constexpr):
    """The scale of least E. Close to the last, whose sums are exact, it has theirs."""
    most, least = column(maxima, 1).to(tl.int32), (-column(maxima, 2) + (UNITS - 1)).to(tl.int32)
    mean = (column(firsts, len(OCTAVES)) / column(seconds, len(OCTAVES))).to(tl.float32)
    held = column(maxima, 0) < MOST_CURVATURE
    largest = column(maxima, 3).to(tl.float32)
    best = best_scale(bins, alpha, mean, largest, least, most, length, LEVELS, COPIES, PIECE)
    scale = tl.where(held, best, alpha)
    turns = tl.where(held, POLISH, max_iter)
    if tl.abs(octaves_from(alpha, scale)) <= OCTAVES[len(OCTAVES) - 1]:
        scale = alternated(firsts, seconds, alpha, scale, turns, OCTAVES)[0]
    return scale


@triton.jit(do_not_specialize=["max_iter"])
def step_long_groups(table, programs, lr, step, backtrack, grad_scale, found_inf, flips, w_scratch,
                     code_scratch, records, runs, bins, states, tickets, beta1, one_minus_beta1,
                     log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay, clip, max_iter,
                     DTYPE: tl.constexpr, COMMITS: tl.constexpr, BLENDS: tl.constexpr,
                     LEVELS: tl.constexpr, OCTAVES: tl.constexpr, EXACT: tl.constexpr,
                     COPIES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pass 1, stage 2 where ``COMMITS``, else stage 1. A step that is skipped ends at once."""
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
    if flips is not None:
        if len(LEVELS) > 1:
            old_code = code_of(latent, old_scale, LEVELS).to(tl.uint8)
            tl.store(code_scratch + scratch + at, old_code, mask=mask)
        else:  # codes are signs, which the scale has no part in
            count_flips(flips, entry, mask & ((latent < 0.0) != (w < 0.0)))
    alpha = tl.where(old_scale > 0.0, old_scale, 0.0)
    group += number(entry, FIRST_GROUP)
    move_scale(entry, tl.abs(w), tl.where(mask, floored(d), 0.0), mask, alpha, max_iter, group,
               chunk, chunks, records, runs, bins, states, None, tickets, LEVELS, OCTAVES, EXACT,
               COPIES)


@triton.jit
def count_flips(flips, entry, changed):
    count = tl.sum(changed.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(flips + number(entry, INDEX), count, sem="relaxed")  # integers: any order


@triton.jit
def sum_long_groups(table, programs, curvature, init, records, runs, bins, states, active, tickets,
                    FIRST: tl.constexpr, LEVELS: tl.constexpr, OCTAVES: tl.constexpr,
                    EXACT: tl.constexpr, COPIES: tl.constexpr, TILE: tl.constexpr,
                    ALIGNED: tl.constexpr):
    """A pass of ``solve``: one alternation, or a search. ``FIRST`` begins: from ``init``, or from
    the top level of every weight, which gives the weighted mean."""
    entry, group, start, mask, chunk, chunks = chunk_of(table, programs, TILE, ALIGNED)
    if FIRST:
        alpha = tl.full([], 0.0, tl.float32)
        if init is not None:
            alpha = tl.load(init + group)
            alpha = tl.where(alpha > 0.0, alpha, 0.0)
    else:
        if tl.load(active + group) == 0:
            return
        alpha = tl.load(states + group)
    at = tl.arange(0, TILE)
    w = tl.load(address(entry, LATENT, tl.float32, ALIGNED) + start + at, mask=mask, other=0.0)
    d = tl.load(curvature + start + at, mask=mask, other=0.0)
    move_scale(entry, tl.abs(w), tl.where(mask, floored(d), 0.0), mask, alpha, 1, group, chunk,
               chunks, records, runs, bins, states, active, tickets, LEVELS, OCTAVES, EXACT, COPIES)


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
    scale = usable(tl.load(states + group + number(entry, FIRST_GROUP)))
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
    scale = usable(tl.load(states + group))
    if chunk == 0:
        tl.store(address(entry, SCALE, tl.float32, False) + group, scale)
    w = tl.load(address(entry, LATENT, tl.float32, ALIGNED) + start + at, mask=mask, other=0.0)
    tl.store(codes + start + at, code_of(w, scale, LEVELS).to(tl.uint8), mask=mask)

"""Device functions: sums over the chunks of a long group, in an order that does not change.

A program leaves a record of its chunk. The last to finish of a run of chunks, known by a ticket,
adds the run's records in float64; the last run's adds the runs'. So no program has more than a few
thousand records to read, however long the group is, and the same input gives the same bits. Tickets
start at zero and are left there.
"""

import triton
import triton.language as tl

RUN = tl.constexpr(64)  # chunks
LANES = tl.constexpr(16)  # of one kind
FIRSTS, SECONDS, MAXIMA = tl.constexpr(0), tl.constexpr(16), tl.constexpr(32)
RECORD = tl.constexpr(48)


@triton.jit
def last_of(ticket, count):
    """Whether the other ``count - 1`` that take this ticket have: then what they stored can be
    read.

    One thread takes it. The barrier puts every thread's stores before it, it releases them to the
    whole GPU and acquires those of the others, and its result reaches the other threads by a
    barrier again. What others stored is read past L1 (``.cg``), which may hold lines from
    before."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def folded(records, count, KIND: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
           MAXIMUM: tl.constexpr):
    """Sums, or maxima, of one kind over ``count`` records, ``STRIDE`` apart; zero beyond ``WIDTH``
    columns."""
    column = tl.arange(0, LANES)
    row = tl.arange(0, RUN)
    total = tl.zeros([LANES], tl.float64)
    while count > 0:
        at = row[:, None] * (STRIDE * RECORD) + (column + KIND)[None, :]
        there = (row < count)[:, None] & (column < WIDTH)[None, :]
        values = tl.load(records + at, mask=there, other=0.0, cache_modifier=".cg").to(tl.float64)
        if MAXIMUM:
            total = tl.maximum(total, tl.max(values, 0))
        else:
            total += tl.sum(values, 0)
        records += STRIDE * RUN * RECORD
        count -= RUN
    return total


@triton.jit
def last_of_group(records, runs, tickets, group, chunk, chunks, WIDTH: tl.constexpr,
                  MEASURES: tl.constexpr):
    """Whether this program is the last of its group; then ``runs`` holds the sums of every run.
    ``MEASURES``: how many maxima a record holds. ``tickets``: one for each program, of which a run's
    first counts, then one for each group."""
    program = tl.program_id(0).to(tl.int64)
    first = program - chunk % RUN
    in_run = tl.minimum(chunks - chunk // RUN * RUN, RUN)
    last = last_of(tickets + first, in_run)
    if last:
        column = tl.arange(0, LANES)
        own, run = records + first * RECORD, runs + first * RECORD + column
        tl.store(run + FIRSTS, folded(own, in_run, FIRSTS, 1, WIDTH, False))
        tl.store(run + SECONDS, folded(own, in_run, SECONDS, 1, WIDTH, False))
        if MEASURES:
            tl.store(run + MAXIMA, folded(own, in_run, MAXIMA, 1, MEASURES, True))
        last = last_of(tickets + tl.num_programs(0) + group, (chunks + RUN - 1) // RUN)
    return last


@triton.jit
def of_group(runs, chunk, chunks, KIND: tl.constexpr, MAXIMUM: tl.constexpr = False):
    """Sums, or maxima, of one kind over a group, in the last program."""
    program = tl.program_id(0).to(tl.int64)
    return folded(runs + (program - chunk) * RECORD, (chunks + RUN - 1) // RUN, KIND, RUN, LANES,
                  MAXIMUM)

"""Questions that take many cases: ``packed``, packed layers against every peer over the batch size;
``sweep``, whether torch is faster than a packed layer on any of 60 shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from blaq_kernels.reference import dequantize

from ..nn import PackedLinear
from .case import BLAQ, Case, Result, Table, Variant, run_case
from .packed import LINEAR_FLOAT32, TABLES, make_weight, relative_error, torch_linears

__all__ = ["SUITES", "SWEEP", "worst"]

FAST = "blaq, fast"
NOISE = 0.05
"""What a ratio of two runs of the same code may be off, on a quiet machine."""
Show = Callable[[Result], None]

_PAIRS = ((1, 1), (1, 8192), (10, 84), (33, 70), (64, 64), (127, 1001), (256, 256), (500, 784),
          (1000, 512), (1024, 1024), (4096, 300), (4096, 4096), (8192, 8192))
SHAPES = tuple((m, n, k) for m in (1, 5, 32, 300, 8192) for n, k in _PAIRS if m * n * k <= 1 << 32
               ) + ((77, 8191, 513),)
"""M, N, K of the sweep: 60, the largest of 4 billion products."""


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def packed(show: Show, bits: Sequence[int], rounds: int, sizes: Sequence[tuple[int, ...]],
           threads: Sequence[int]) -> None:
    """packed_linear at 4096 x 4096 for M of 1 to 256, 1 and 2 threads, weights cached and not"""
    table = TABLES["packed_linear"]
    for count in threads or (1, 2):
        for stream in (False, True):
            for case in table.cases(sizes, bits=bits):
                with _threads(count):
                    show(run_case(case, table, rounds, stream=stream))


def _layers(case: Case, full: bool) -> list[Variant]:
    """Whole layers as users call them, Python included, and made as users make them: in no mode."""
    m, n, k = case.size
    with torch.inference_mode(False), torch.no_grad():
        codes, qweight, scale = make_weight(case, n, k)
        weight = dequantize(codes, scale, case.levels, case.group_size)
        x, bias = torch.randn(m, k), torch.randn(n)
        exact = F.linear(x.double(), weight.double(), bias.double())
        variants = []
        for name, accuracy in ((BLAQ, "high"), (FAST, "fast")):
            layer = PackedLinear(k, n, levels=case.levels).requires_grad_(False)
            layer.qweight, layer.scale, layer.accuracy = qweight, scale, accuracy
            layer.bias.copy_(bias)
            layer = layer.to(case.torch_dtype)
            variants.append((name, functools.partial(layer, x.to(case.torch_dtype))))
        for name, call in torch_linears(weight, bias, x).items():
            if name.startswith("F.linear"):  # as a layer too
                dtype = torch.float32 if name == LINEAR_FLOAT32 else torch.bfloat16
                plain = nn.Linear(k, n).requires_grad_(False)
                plain.weight.copy_(weight)
                plain.bias.copy_(bias)
                call = functools.partial(plain.to(dtype), x.to(dtype))
            if case.dtype == "float32" or case.dtype in name:
                variants.append((name, call))
        return [Variant(name, call, error=relative_error(call(), exact)) for name, call in variants]


SWEEP = Table("sweep", ("M", "N", "K"), SHAPES, _layers,
              axes={"dtype": ("float32", "bfloat16"), "bits": (1, 2, 4)}, ops=("packed_linear",))


def sweep(show: Show, bits: Sequence[int], rounds: int, sizes: Sequence[tuple[int, ...]],
          threads: Sequence[int]) -> None:
    """PackedLinear against torch's layers of the input's dtype: 60 shapes of 1 to 8192"""
    results = []
    for count in threads or (torch.get_num_threads(),):
        for case in SWEEP.cases(sizes, bits=bits):
            with _threads(count), torch.inference_mode():
                results.append(run_case(case, SWEEP, rounds))
            show(results[-1])
    for line in worst(results):
        print(line)


def worst(results: Sequence[Result]) -> list[str]:
    """For each accuracy, dtype of inputs and kind of torch's products the worst ratio, how often
    torch is faster, and the shapes where it is by more than ``NOISE``.

    Products in the input's own dtype are the bound; those that round a float32 input to bfloat16 or
    to 8 bits do another thing, and are counted for information, without shapes.
    """
    lines = []
    kinds = ("float32", "bfloat16", "int8")
    for dtype, own, kind in itertools.product(kinds, (BLAQ, FAST), kinds):
        ratios = []
        for result in results:
            peers = [name for name in result.timings if kind in name]
            if result.case.dtype == dtype and peers:
                best = min(peers, key=lambda name: result.timings[name].median)
                ratios.append((result.ratio(best, own), result.case.name, best))
        if not ratios:
            continue
        faster = sum(ratio < 1 for ratio, *_ in ratios)
        slower = sorted(ratio for ratio in ratios if ratio[0] < 1 - NOISE)
        rounds = "" if kind == dtype else " (rounds them)"
        lines.append(f"{own}, {dtype} inputs, torch in {kind}{rounds}: worst ratio "
                     f"{min(ratios)[0]:.2f}; torch is faster on {faster} of {len(ratios)}, by more "
                     f"than {NOISE:.0%} on {len(slower)}")
        if kind == dtype:
            lines += [f"  {ratio:.2f}  {case}: {peer}" for ratio, case, peer in slower]
    return lines


SUITES: dict[str, Callable[[Show, Sequence[int], int, Sequence[tuple[int, ...]], Sequence[int]],
                           None]] = {"packed": packed, "sweep": sweep}

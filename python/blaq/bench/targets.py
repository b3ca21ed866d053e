"""What the project aims at, as named measurements: each target yields what it measured and whether
the bound is met."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blaq_kernels import reference

from .._extras import import_extra
from ..codebook import levels_of
from ..optim import BLAQ as BLAQOptimizer
from ..param_groups import param_groups
from .case import BLAQ, Case, Result
from .packed import LINEAR_BFLOAT16, LINEAR_FLOAT32
from .training import ADAMW, COMPILED

__all__ = ["TARGETS", "Verdict"]

Run = Callable[[Case, bool], Result]
"""Runs a case, with its slow alternatives or without, and shows and keeps its rows."""


@dataclass(frozen=True)
class Verdict:
    """One measured quantity beside its bound.

    Attributes:
        target: name of the target.
        quantity: what was measured, with its unit.
        measured: the value.
        rule: ``at most``, ``at least``, or empty for a quantity without a bound.
        bound: of the rule; None without.
        met: whether the value obeys; None without a bound.
    """

    target: str
    quantity: str
    measured: float
    rule: str = ""
    bound: float | None = None
    met: bool | None = None


def _at_most(target: str, quantity: str, measured: float, bound: float) -> Verdict:
    return Verdict(target, quantity, measured, "at most", bound, measured <= bound)


def _at_least(target: str, quantity: str, measured: float, bound: float) -> Verdict:
    return Verdict(target, quantity, measured, "at least", bound, measured >= bound)


def step_10m(run: Run) -> Iterator[Verdict]:
    """fused_trial + fused_step, 10 million parameters in 16 tensors, against AdamW and the compiled
    reference"""
    name, size = "step-10m", (16, 625_000)

    def case(bits: int, method: str) -> Case:
        return Case("trial_and_step", size, bits=bits, group_size=0, method=method)

    one = run(case(1, "alternating"), True)
    yield _at_most(name, "1 bit: time over AdamW's", one.ratio(BLAQ, ADAMW), 2.3)
    yield _at_least(name, "1 bit: compiled reference's time over blaq's",
                    one.ratio(COMPILED, BLAQ), 2)
    two = run(case(2, "alternating"), False)
    yield Verdict(name, "2 bits, alternating: time over AdamW's", two.ratio(BLAQ, ADAMW))
    four = run(case(4, "exact"), False)
    yield _at_most(name, "4 bits, exact: time over AdamW's", four.ratio(BLAQ, ADAMW), 3)


def step_small(run: Run) -> Iterator[Verdict]:
    """one call over 200 tensors of 100 elements, 1 bit"""
    for op in ("fused_trial", "fused_step"):
        result = run(Case(op, (200, 100), bits=1, group_size=0, method="alternating"), False)
        yield _at_most("step-small", f"{op}: µs", result.timings[BLAQ].median * 1e6, 150)


def linear_4096(run: Run) -> Iterator[Verdict]:
    """packed_linear, 1 bit, 4096 x 4096, against F.linear float32; error against bfloat16's"""
    name = "linear-4096"
    for m in (1, 4, 16, 64, 256):
        result = run(Case("packed_linear", (m, 4096, 4096), bits=1, group_size=0), False)
        quantity = f"batch {m}: F.linear float32's time over blaq's"
        ratio = result.ratio(LINEAR_FLOAT32, BLAQ)
        yield _at_least(name, quantity, ratio, 8) if m == 1 else Verdict(name, quantity, ratio)
        yield _at_most(name, f"batch {m}: error over bfloat16's",
                       result.error(BLAQ) / result.error(LINEAR_BFLOAT16), 1)


def solve_exact(run: Run) -> Iterator[Verdict]:
    """solve: gap of the exact method to the optimum, which the reference finds by trying every
    threshold; and that no iteration of the alternation raises E"""
    weights = {"random": (torch.randn(256, 256), torch.rand(256, 256) + 0.01),
               "trained": trained_weights()}
    for origin, (latent, curvature) in weights.items():
        for bits, group_size in ((2, 0), (3, 0), (4, 0), (4, -1)):
            at = f"{origin} weights, {bits} bits, group {group_size}"
            levels = levels_of("pow2", bits)
            best, found = (_objective(latent, curvature, levels, group_size, 1, "exact", solve)
                           for solve in (reference.solve, torch.ops.blaq.solve))
            yield _at_most("solve-exact", f"{at}: gap to the optimum, %",
                           float((found / best - 1).max()) * 100, 0.1)
            path = [_objective(latent, curvature, levels, group_size, count, "alternating",
                               torch.ops.blaq.solve) for count in range(1, 11)]
            rise = max(float((b / a - 1).max()) for a, b in itertools.pairwise(path))
            # α is stored in float32: E may move by its rounding, squared.
            yield _at_most("solve-exact", f"{at}: largest rise of E in an alternation, %",
                           max(rise, 0.0) * 100, 1e-7)


def _objective(latent: Tensor, curvature: Tensor, levels: Sequence[float], group_size: int,
               max_iter: int, method: str, solve: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    codes, scale = solve(latent, curvature, None, levels, group_size, max_iter, method)
    return reference.objective(latent, curvature, codes, scale, levels, group_size)


def trained_weights(steps: int = 200) -> tuple[Tensor, Tensor]:
    """Latent weights and curvature of a layer after some training on scikit-learn's digits."""
    images, labels = import_extra("sklearn.datasets", "train").load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(64, 256), nn.Linear(256, 10)
        model = nn.Sequential(first, nn.ReLU(), last)
        optimizer = BLAQOptimizer(param_groups(model, bits=2), clip=1.0)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            return loss

        for _ in range(steps):
            batch = torch.randint(len(x), (64,))
            optimizer.step(closure)
    state = optimizer.state[first.weight]
    return state["latent"], state["exp_avg_sq"].sqrt() + optimizer.param_groups[0]["eps"]


TARGETS: dict[str, Callable[[Run], Iterator[Verdict]]] = {
    "step-10m": step_10m, "step-small": step_small, "linear-4096": linear_4096,
    "solve-exact": solve_exact}

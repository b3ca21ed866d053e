"""What theory says of LAQ and BLAQ, measured through the ops and the optimizer."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import blaq_kernels  # noqa: F401  (registers torch.ops.blaq)

from ..optim import BLAQ
from .results import Claim, Spread, spread
from .toy import best_quantized, train_toy

__all__ = ["FLIPS", "LIMITS", "figure_1", "power_law", "stability_limit", "theory"]

LIMITS = {1.0: 2.0, 0.6: 2.5, 0.9: 5 * (1 - math.sqrt(0.2)), 0.75: 4.0, 0.8: 5.0, 0.875: 8.0}
"""Largest stable x = lr × curvature of an unquantized quadratic by ``backtrack``: the first x at
which |1 - x + (1 - backtrack) x²| exceeds 1."""
FLIPS = {(1.9, 1.0): 72.0, (1.9, 0.9): 5.3, (1.9, 0.75): 1.3, (1.9, 0.6): 1.3, (0.3, 1.0): 2.9,
         (0.3, 0.6): 1.0}
"""Mean sign flips of Fig. 1's toy by (η, backtrack), measured once on other random starts."""
EPS = 1e8
"""So large that Adam's curvature (√v + eps) / lr is eps / lr to the last bit of float32: with a
learning rate of 1e8 the optimizer then is gradient descent with a step of 1."""
ROWS, STEPS, GROWTH = 200, 20, 1e-5


def stability_limit(backtrack: float, largest: float = 10.0, precision: float = 1e-5) -> float:
    """First x = lr × curvature at which :class:`blaq.BLAQ` diverges on ½ x w².

    One row of one weight for each x: a scale of its own leaves a single weight unquantized. The
    interval of the first row that grows is cut into rows again, until it is narrow enough.

    Raises:
        ValueError: nothing diverges up to ``largest``.
    """
    low, high = 0.0, largest
    while high - low > precision:
        x = torch.linspace(low, high, ROWS + 1)[1:, None]
        growing = _growth(x, backtrack) > 1 + GROWTH
        if not growing.any():
            raise ValueError(f"blaq.reproduce: largest must exceed the limit, got {largest}")
        first = int(growing.int().argmax())
        low, high = (x[first - 1].item() if first else low), x[first].item()
    return (low + high) / 2


def _growth(x: torch.Tensor, backtrack: float) -> torch.Tensor:
    """|w| after ``STEPS`` steps of the optimizer over |w| before, for each row's curvature x."""
    weight = nn.Parameter(torch.full_like(x, 1e-3))
    opt = BLAQ([{"params": [weight], "bits": 1}], lr=EPS, eps=EPS, betas=(0.0, 0.999),
               group_size=-1, backtrack=backtrack)

    def closure() -> torch.Tensor:
        weight.grad = x * weight.detach()
        return weight.grad.sum()

    for _ in range(STEPS):
        opt.step(closure)
    return (weight.detach() / 1e-3).abs()[:, 0]


def power_law(backtrack: float, start: float = 0.7, steps: int = 6) -> list[float]:
    """w before each step and at the end on |w|^1.5, with the exact Hessian as D, 1 bit, β₁ = 0.

    In float64. LAQ must map w to -w, BLAQ to (3 - 4 · ``backtrack``) w. Ends where w is 0: the
    Hessian is infinite there.
    """
    ops = torch.ops.blaq
    w = torch.tensor([[start]], dtype=torch.float64)
    path = [start]
    for _ in range(steps):
        grad, d = 1.5 * w.sign() * w.abs().sqrt(), 0.75 / w.abs().sqrt()
        if backtrack < 1:
            trial = ops.scaled_update(w, grad, d)
            grad = ops.blend(grad, 1.5 * trial.sign() * trial.abs().sqrt(), backtrack)
            d = ops.blend(d, 0.75 / trial.abs().sqrt(), backtrack)
        w = ops.scaled_update(w, grad, d)
        path.append(w.item())
        if abs(w.item()) < 1e-12 * start:
            break
    return path


def theory(starts: int = 200) -> tuple[dict[str, Any], list[Claim]]:
    """All of it: content and claims."""
    claims, laws, limits, flips = [], [], [], []
    for backtrack in (1.0, 0.9, 0.75, 0.6):
        path = power_law(backtrack)
        factor, found = (3 - 4 * backtrack), [b / a for a, b in pairwise(path)]
        error = max(abs(ratio - factor) for ratio in found)
        laws.append({"backtrack": backtrack, "path": path, "factor": factor, "error": error})
        claims.append(Claim(
            f"|w|^1.5, {_method(backtrack)}: a step multiplies w by", f"{factor:g}",
            f"{found[0]:.15g} (worst error of {len(found)} steps {error:.0e})",
            _holds(error < 1e-12), "theory"))
    for backtrack, limit in LIMITS.items():
        measured = stability_limit(backtrack)
        limits.append({"backtrack": backtrack, "theory": limit, "measured": measured})
        claims.append(Claim(f"quadratic, {_method(backtrack)}: stable up to lr × curvature",
                            f"{limit:.4g}", f"{measured:.5f}", _holds(abs(measured - limit) < 1e-4),
                            "theory"))
    scale, signs, value = best_quantized()
    claims.append(Claim("Fig. 1 toy: best scale, signs, loss", "0.0541667, (+, -), 8.33e-07",
                        f"{scale:.7f}, ({', '.join('+-'[s < 0] for s in signs)}), {value:.2e}",
                        _holds(abs(scale - 0.65 / 12) < 1e-7 and signs == [1, -1]),
                        "theory"))
    for (eta, backtrack), expected in FLIPS.items():
        counts = spread(train_toy(backtrack, eta, starts).flips.tolist())
        flips.append({"eta": eta, "backtrack": backtrack, "expected": expected,
                      "mean": counts.mean, "sd": counts.sd, "starts": starts})
        error = (counts.sd or 0.0) / math.sqrt(starts)
        claims.append(Claim(f"Fig. 1 toy, η = {eta}, {_method(backtrack)}: mean sign flips",
                            f"{expected:g}", f"{counts.mean:.2f} ± {error:.2f} (standard error)",
                            _holds(_agree(counts, expected)), "theory"))
    content = {"power_law": laws, "limits": limits, "flips": flips,
               "optimum": {"scale": scale, "signs": signs, "loss": value}}
    return content, claims


def figure_1(starts: int = 200, steps: int = 200) -> tuple[dict[str, Any], list[Claim]]:
    """Fig. 1: what the paper draws is a zig-zag of LAQ between sign patterns that BLAQ avoids.

    The figure itself shows paths on the loss; which start and learning rate the paper drew is not
    known. Here: the paths of one start at η = 1.9, and the flips over all η.
    """
    etas = [round(0.1 * i, 1) for i in range(1, 25)]
    curves = {_method(a): [train_toy(a, eta, starts, steps).flips.mean().item() for eta in etas]
              for a in (1.0, 0.9, 0.75, 0.6)}
    eta, shown = 1.9, 30
    flips = {a: train_toy(a, eta, starts, steps).flips for a in (1.0, 0.6)}
    start = int(flips[1.0].argmax())
    paths = {name: train_toy(a, eta, starts, shown).path[:, start].tolist()
             for name, a in (("laq", 1.0), ("blaq", 0.6))}
    laq, blaq = flips[1.0].mean().item(), flips[0.6].mean().item()
    worse = [e for e, old, new in zip(etas, curves["LAQ"], curves["BLAQ a = 0.6"], strict=True)
             if new >= old]
    where = "holds" if not worse else f"holds only where η is none of {worse}"
    claims = [Claim("Fig. 1: BLAQ overcomes LAQ's zig-zag between signs", "fewer flips",
                    f"{laq:.1f} flips by LAQ, {blaq:.1f} by BLAQ (a = 0.6) at η = {eta}",
                    where)]
    content = {"etas": etas, "curves": curves, "starts": starts, "steps": steps, "paths": paths,
               "path_eta": eta, "start": start}
    return content, claims


def _agree(counts: Spread, expected: float) -> bool:
    """Two means of starts of their own: 4 standard errors of their difference, and half a unit of
    the expected number's last digit."""
    error = (counts.sd or 0.0) * math.sqrt(1 / counts.count + 1 / 200)
    return abs(counts.mean - expected) < 4 * error + (0.5 if expected > 10 else 0.05)


def _method(backtrack: float) -> str:
    return "LAQ" if backtrack == 1 else f"BLAQ a = {backtrack:g}"


def _holds(true: bool) -> str:
    return "holds" if true else "does not hold"

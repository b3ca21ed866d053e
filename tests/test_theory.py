"""What theory says of LAQ and BLAQ, through ops and optimizer (docs/algorithm.md)."""

import itertools
import math

import pytest
import torch
from torch import nn

import blaq
import blaq_kernels  # noqa: F401
from blaq.reproduce.toy import loss, train_toy

ops = torch.ops.blaq


@pytest.mark.parametrize("backtrack", [0.6, 0.75, 0.9, 1.0])
def test_scalar_power_law(backtrack):
    """|w|^1.5, the exact Hessian as D, one bit: LAQ maps w to -w for ever, BLAQ to (3 - 4a) w."""
    w = torch.tensor([0.7], dtype=torch.float64)
    for _ in range(6):
        quantized = w  # one weight and one scale: α = |w|, so quantization changes nothing
        d = 0.75 / quantized.abs().sqrt()
        grad = 1.5 * quantized.sign() * quantized.abs().sqrt()
        trial = ops.scaled_update(w, grad, d)
        torch.testing.assert_close(trial, -w)
        trial_grad = 1.5 * trial.sign() * trial.abs().sqrt()
        blended = ops.blend(grad, trial_grad, backtrack)
        curvature = ops.blend(d, 0.75 / trial.abs().sqrt(), backtrack)
        after = ops.scaled_update(w, blended, curvature)
        torch.testing.assert_close(after, (3 - 4 * backtrack) * w)
        if backtrack == 0.75:
            break  # arrived in one step; the curvature is infinite there
        w = after


def test_quadratic_factor():
    """Unquantized quadratic, x = lr · curvature: the factor is 1 - x + (1 - a) x²."""
    w = torch.tensor([1.3], dtype=torch.float64)
    for x, a in itertools.product((0.3, 1.0, 1.9, 2.4), (0.6, 0.75, 0.875, 1.0)):
        d = torch.full_like(w, 1 / x)
        trial = ops.scaled_update(w, w, d)
        stepped = ops.scaled_update(w, ops.blend(w, trial, a), d)
        torch.testing.assert_close(stepped, (1 - x + (1 - a) * x * x) * w)


@pytest.mark.parametrize("backtrack,limit", [(1.0, 2.0), (0.6, 2.5), (0.75, 4.0), (0.8, 5.0),
                                             (0.875, 8.0), (0.9, 2.76)])
def test_quadratic_is_stable_up_to_its_limit_and_not_beyond(backtrack, limit):
    for x, stable in ((limit * 0.99, True), (limit * 1.01, False)):
        w = torch.tensor([1.0], dtype=torch.float64)
        d = torch.full_like(w, 1 / x)
        for _ in range(4000):
            trial = ops.scaled_update(w, w, d)
            w = ops.scaled_update(w, ops.blend(w, trial, backtrack), d)
            if w.abs() > 1e6:
                break
        assert (w.abs().item() < 1e-2) is stable


# Mean flips measured once on other random starts, with half a unit of its last digit.
FIGURE_1 = [(1.9, 1.0, 72, 0.5), (1.9, 0.9, 5.3, 0.05), (1.9, 0.75, 1.3, 0.05),
            (1.9, 0.6, 1.3, 0.05), (0.3, 1.0, 2.9, 0.05), (0.3, 0.6, 1.0, 0.05)]


@pytest.mark.parametrize("eta,backtrack,expected,rounding", FIGURE_1)
def test_figure_1_sign_flips(eta, backtrack, expected, rounding):
    flips, _, _ = train_toy(backtrack, eta)
    # Two independent means of 200 starts: 4 standard errors of their difference, and the rounding.
    tolerance = 4 * math.sqrt(2) * (flips.std() / math.sqrt(len(flips))).item() + rounding
    assert abs(flips.mean().item() - expected) < tolerance


def test_figure_1_optimum():
    """α = 0.0541667, β = (+, -). The loss still has a slope there in each latent weight (only their
    sum is balanced), so latents go on drifting and a few starts have just left it again."""
    _, weight, _ = train_toy(0.6, 0.3)
    error = (weight - torch.tensor([0.0541667, -0.0541667])).abs().amax(1)
    settled = weight[error < 1e-5]
    assert len(settled) > 0.9 * len(weight)
    value = loss(settled)
    torch.testing.assert_close(value, torch.full_like(value, 8.33e-7), rtol=1e-2, atol=0)


def test_figure_1_blaq_flips_fewer_signs_than_laq():
    laq, blaq_flips = train_toy(1.0, 1.9).flips, train_toy(0.6, 1.9).flips
    assert laq.mean() > 20 * blaq_flips.mean()


def test_blaq_calms_an_overshooting_optimizer():
    """The same toy by the optimizer itself, with Adam's curvature."""
    def flips(backtrack):
        weight = nn.Parameter(torch.tensor([0.3, 0.2]))
        opt = blaq.BLAQ([{"params": [weight], "bits": 1}], lr=0.1, betas=(0.0, 0.99),
                        backtrack=backtrack)

        def closure():
            opt.zero_grad()
            value = loss(weight)
            value.backward()
            return value

        total = 0.0
        for _ in range(100):
            opt.step(closure)
            total += blaq.flip_ratio(opt) * 2
        return total

    assert flips(0.6) < flips(1.0) / 4

"""Metrics of flips, oscillations and amplitudes against counts by hand."""

import math

import pytest
import torch
from small_network import make_closure, make_model, make_optimizer
from torch import nn

import blaq
from blaq_kernels import reference as ref


def codes_of(opt, param, bits):
    state = opt.state[param]
    return ref.quantize_codes(state["latent"], state["scale"], blaq.levels_of("pow2", bits), 0)


def test_flip_ratio_counts_changed_codes():
    model = make_model()
    opt = make_optimizer(model, lr=0.05)
    assert blaq.flip_ratio(opt) == 0.0
    weights = [(model[0].weight, 2), (model[5].weight, 1)]
    total, seen = sum(w.numel() for w, _ in weights), 0.0
    for _ in range(6):
        before = [codes_of(opt, w, bits) for w, bits in weights]
        opt.step(make_closure(model, opt))
        changed = sum((codes_of(opt, w, bits) != old).sum().item()
                      for (w, bits), old in zip(weights, before, strict=True))
        assert blaq.flip_ratio(opt) == changed / total
        seen += changed
    assert seen > 0


def test_flip_ratio_without_quantized_weights_is_zero():
    assert blaq.flip_ratio(blaq.BLAQ([torch.ones(2)])) == 0.0


def scripted(values):
    """An optimizer whose 2-bit latent weights a test writes itself: levels ±1/2, ±1 of scale 1."""
    weight = nn.Parameter(torch.tensor(values))
    opt = blaq.BLAQ([{"params": [weight], "bits": 2}])
    opt.state[weight]["latent"].copy_(weight.new_tensor(values))
    opt.state[weight]["scale"].fill_(1.0)
    return opt, opt.state[weight]["latent"]


# One weight a column: still; one way up; there and back; there, a pause, back; up twice, then down.
PATH = [[0.9, -1.0, -0.5, 0.5, -0.9],
        [0.9, -0.5, 0.5, 0.9, -0.5],
        [0.8, 0.5, -0.5, 0.9, 0.5],
        [0.9, 1.0, 0.5, 0.5, -0.5]]


def test_oscillation_is_a_change_opposite_to_the_last_change():
    opt, latent = scripted(PATH[0])
    momentum = 0.25
    tracker = blaq.OscillationTracker(opt, momentum=momentum)
    expected, oscillations = torch.zeros(5), [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]
    for row, happened in zip(PATH[1:], oscillations, strict=True):
        latent.copy_(torch.tensor(row))
        tracker.update()
        expected = (1 - momentum) * expected + momentum * torch.tensor(happened)
        assert tracker.frequency() == pytest.approx(expected.mean().item())
    assert tracker.share_above(0.0) == pytest.approx(3 / 5)
    assert tracker.share_above(0.3) == pytest.approx((expected > 0.3).float().mean().item())
    assert tracker.share_above(0.3) == pytest.approx(1 / 5)


def test_amplitude_and_frequency_of_a_window():
    opt, latent = scripted(PATH[0])
    tracker = blaq.AmplitudeTracker(opt)
    for row in PATH[1:]:
        latent.copy_(torch.tensor(row))
        tracker.update()
    path = torch.tensor(PATH)
    assert tracker.steps == 3
    assert tracker.amplitude() == pytest.approx(((path.amax(0) - path.amin(0)) / 2).mean().item())
    assert tracker.frequency() == pytest.approx((0 + 3 + 3 + 2 + 3) / 5)
    tracker.reset()
    assert tracker.amplitude() == 0.0 and tracker.frequency() == 0.0 and tracker.steps == 0


def test_laq_oscillates_more_than_blaq_where_the_step_overshoots():
    """algorithm.md's toy: amplitude, frequency and oscillation all tell the two apart."""
    hessian, optimum = torch.tensor([10.0, 2.0]), torch.tensor([0.054, -0.055])
    measured = {}
    for backtrack in (1.0, 0.6):
        weight = nn.Parameter(torch.tensor([0.3, 0.2]))
        opt = blaq.BLAQ([{"params": [weight], "bits": 1}], lr=0.1, betas=(0.0, 0.99),
                        backtrack=backtrack)

        def closure(opt=opt, weight=weight):
            opt.zero_grad()
            loss = (hessian / 2 * (weight - optimum).square()).sum()
            loss.backward()
            return loss

        window, oscillation = blaq.AmplitudeTracker(opt), blaq.OscillationTracker(opt)
        flips = 0.0
        for _ in range(100):
            opt.step(closure)
            window.update()
            oscillation.update()
            flips += blaq.flip_ratio(opt)
        assert window.frequency() == pytest.approx(flips)
        measured[backtrack] = (window.amplitude(), window.frequency(), oscillation.frequency())
    assert all(laq > ours for laq, ours in zip(measured[1.0], measured[0.6], strict=True)), measured
    assert all(math.isfinite(value) for values in measured.values() for value in values)


def test_trackers_follow_groups_added_later_from_then_on():
    opt, latent = scripted(PATH[0])
    tracker, window = blaq.OscillationTracker(opt), blaq.AmplitudeTracker(opt)
    late = nn.Parameter(torch.tensor([0.5, -0.5]))
    opt.add_param_group({"params": [late], "bits": 1})
    for sign in (-1, -1, -1):
        opt.state[late]["latent"].mul_(sign)
        tracker.update()
        window.update()
    assert tracker.frequency() > 0.0 and window.frequency() > 0.0


@pytest.mark.parametrize("momentum", [0.0, 1.5])
def test_a_bad_momentum_is_named(momentum):
    with pytest.raises(ValueError, match=r"blaq.OscillationTracker: momentum must be in \(0, 1\]"):
        blaq.OscillationTracker(scripted(PATH[0])[0], momentum=momentum)

"""Quantizers of the methods that train through one: values and gradients by hand, optima by brute
force."""

import itertools
import math

import pytest
import torch

from blaq.methods.dsq import LearnedSoftStep, SoftStep, slope_of_soft_step, soft_step
from blaq.methods.grouped import scaled_gradient
from blaq.methods.lotion import RandomizedRounding
from blaq.methods.lq_net import LearnedBasis, nearest, refit
from blaq.methods.lr_net import RandomWeight
from blaq.methods.lsq import LearnedStep
from blaq.methods.octav import OptimalClip, optimal_clip
from blaq.methods.paretoq import ElasticBinary, RowStep, StretchedElastic, StretchedTernary
from blaq.methods.qil import LearnedInterval
from blaq.methods.quantizer import straight_through
from blaq.methods.trq import StemResidual

WEIGHT = torch.tensor([[0.9, -0.35, 0.1], [-2.0, 0.6, -0.05]])


def gradients(quantizer, values, upstream):
    """Output, and gradients to the values and to every parameter by name."""
    values = values.clone().requires_grad_()
    output = quantizer(values)
    output.backward(upstream)
    return output.detach(), values.grad, {n: p.grad for n, p in quantizer.named_parameters()}


def set_to(parameter, value):
    with torch.no_grad():
        parameter.fill_(value)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype))


def test_straight_through_has_one_tensors_value_and_the_others_gradient():
    x = torch.tensor([0.3, -1.7], requires_grad=True)
    value = straight_through(3 * x, torch.tensor([0.1, 0.7]))
    value.sum().backward()
    assert value.tolist() == torch.tensor([0.1, 0.7]).tolist()
    assert x.grad.tolist() == [3.0, 3.0]
    x.grad = None
    scaled = scaled_gradient(x, 0.1)
    scaled.sum().backward()
    assert torch.equal(scaled, x)
    close(x.grad, [0.1, 0.1])


def test_lsq_by_hand():
    quantizer = LearnedStep(WEIGHT, 2)
    assert quantizer.step.item() == pytest.approx(2 * WEIGHT.abs().mean().item())  # p = 1
    set_to(quantizer.step, 0.5)  # z = 1.8, -0.7, 0.2, -4, 1.2, -0.1; n = -2, p = 1
    output, grad, learned = gradients(quantizer, WEIGHT, torch.ones(2, 3))
    close(output, [[0.5, -0.5, 0.0], [-1.0, 0.5, 0.0]])
    close(grad, [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    # Eq. 3: p; round(-0.7) + 0.7; 0 - 0.2; n; p; 0 + 0.1; times 1/sqrt(6 * 1).
    close(learned["step"], [[(1 - 0.3 - 0.2 - 2 + 1 + 0.1) / math.sqrt(6)]])


def test_lsq_of_inputs_begins_with_its_first_batch_in_training():
    quantizer = LearnedStep.of_inputs(2)
    x = torch.tensor([[0.0, 0.4, 5.0, 1.1]])
    quantizer.eval()(x)
    assert not quantizer.ready
    quantizer.train()(x)
    assert quantizer.step.item() == pytest.approx(2 * x.mean().item() / math.sqrt(3))
    set_to(quantizer.step, 1.0)
    output, grad, learned = gradients(quantizer, x, torch.ones(1, 4))
    close(output, [[0.0, 0.0, 3.0, 1.0]])
    close(grad, [[1.0, 1.0, 0.0, 1.0]])
    close(learned["step"], [[(0 - 0.4 + 3 - 0.1) / math.sqrt(4 * 3)]])


def test_paretoq_2_bits_by_hand():
    quantizer = StretchedElastic(WEIGHT, 2)
    assert quantizer.scale.flatten().tolist() == pytest.approx([0.9, 2.0])
    set_to(quantizer.scale, 1.0)
    output, grad, learned = gradients(quantizer, WEIGHT, torch.ones(2, 3))
    close(output, [[0.75, -0.25, 0.25], [-0.75, 0.75, -0.25]])
    close(grad, [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    # Inside level - w/α, outside the level; times 1/sqrt(6 * 1).
    first = (0.75 - 0.9) + (-0.25 + 0.35) + (0.25 - 0.1)
    second = -0.75 + (0.75 - 0.6) + (-0.25 + 0.05)
    close(learned["scale"], [[first / math.sqrt(6)], [second / math.sqrt(6)]])


@pytest.mark.parametrize(("kind", "bits", "grid"), [
    (StretchedElastic, 2, [-0.75, -0.25, 0.25, 0.75]), (StretchedTernary, 2, [-2 / 3, 0, 2 / 3]),
    (ElasticBinary, 1, [-1.0, 1.0]), (StemResidual, 2, [-2.0, 0.0, 2.0])])
def test_grids_of_paretoq_and_trq(kind, bits, grid):
    """All levels, in units of α, and values that pack."""
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    quantizer = kind(weight, bits)
    set_to(quantizer.scale, 1.0)
    output = quantizer(weight)
    close(output.detach().unique(), grid)
    assert not (output.signbit() & (output == 0)).any()  # a packed weight has no -0


def test_paretoq_1_bit_by_hand():
    quantizer = ElasticBinary(WEIGHT, 1)
    assert quantizer.scale.flatten().tolist() == pytest.approx([1.35 / 3, 2.65 / 3])
    set_to(quantizer.scale, 0.5)
    output, grad, learned = gradients(quantizer, WEIGHT, torch.tensor([[1.0, 2, 4], [8, 16, 32]]))
    close(output, [[0.5, -0.5, 0.5], [-0.5, 0.5, -0.5]])
    close(grad, [[0.0, 2.0, 4.0], [0.0, 0.0, 32.0]])
    close(learned["scale"], [[3 / math.sqrt(6)], [-24 / math.sqrt(6)]])


def test_paretoq_3_bits_is_lsq_with_a_step_for_each_row():
    quantizer = RowStep(WEIGHT, 3)
    assert quantizer.step.flatten().tolist() == pytest.approx([0.3, 2 / 3])
    for row, result in zip(WEIGHT, quantizer(WEIGHT), strict=True):
        alone = LearnedStep(row[None], 3)
        set_to(alone.step, row.abs().max().item() / 3)
        assert torch.equal(result, alone(row[None])[0])


def test_trq_by_hand():
    quantizer = StemResidual(WEIGHT, 2)
    assert quantizer.scale.item() == pytest.approx(0.6 * WEIGHT.square().mean().sqrt().item())
    set_to(quantizer.scale, 0.5)  # 0.9: stem 0.5, residual sign(0.4); 0.1: residual sign(-0.4)
    output, grad, learned = gradients(quantizer, WEIGHT, torch.tensor([[1.0, 2, 4], [8, 16, 32]]))
    close(output, [[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    close(grad, [[1.0, 2.0, 4.0], [0.0, 16.0, 32.0]])
    close(learned["scale"], [[2 * (1 - 8 + 16) / math.sqrt(6)]])


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.74), (3, 2.16), (4, 2.57), (8, 3.87)])
def test_octav_finds_the_best_clip_of_a_normal_distribution(bits, clip):
    normal = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    assert optimal_clip(normal, bits).item() == pytest.approx(clip, rel=0.02)


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (2, False), (4, False)])
def test_octav_minimises_its_objective(bits, signed):
    """But for what moves across the clip, which the recursion leaves out: 0.3 % of J at 2 bits."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(20_000, generator=generator, dtype=torch.float64) ** 3
    if not signed:
        sample = sample.clamp_min(0)
    size = sample.abs()

    def objective(s):
        noise = 4.0**-bits / (3 if signed else 12) * s**2 * ((size > 0) & (size <= s)).double()
        return (noise + (size - s).square() * (size > s)).mean().item()

    found = optimal_clip(sample[None], bits, signed, iterations=20).item()
    grid = torch.linspace(0.05, size.max().item(), 2000).tolist()
    assert objective(found) <= min(map(objective, grid)) * 1.004


def test_octav_follows_its_weights():
    """From its last clip, also when that lies beyond the largest weight by now."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 40, generator=generator)
    quantizer = OptimalClip(weight, 3)
    for factor in (1.001, 1.05, 0.01, 0.01):
        weight = weight * factor
        quantizer(weight)
    for _ in range(3):
        quantizer(weight)
    best = optimal_clip(weight.reshape(1, -1), 3)
    torch.testing.assert_close(quantizer.clip, best)
    kept = quantizer.clip.clone()
    assert torch.equal(quantizer.eval()(2 * weight), quantizer(2 * weight))
    assert torch.equal(quantizer.clip, kept)


def test_octav_by_hand():
    quantizer = OptimalClip(WEIGHT, 2)
    clip = optimal_clip(WEIGHT.reshape(1, -1), 2).item()
    assert 0.9 < clip < 2.0
    output, grad, _ = gradients(quantizer, WEIGHT, torch.ones(2, 3))
    step = clip / 2
    integers = (WEIGHT / step).round().clamp(-2, 1)
    close(output, integers * step)
    close(grad, [[1.0, 1.0, 1.0], [clip / 2.0, 1.0, 1.0]])  # magnitude-aware outside the clip

    inputs = OptimalClip.of_inputs(2)
    x = torch.tensor([[0.0, 0.4, 9.0, 1.1, -1.0]])
    output, grad, _ = gradients(inputs, x, torch.ones(1, 5))
    kept = inputs.clip.item()
    assert 1.1 < kept < 9.0
    close(grad, [[1.0, 1.0, 0.0, 1.0, 0.0]])  # piecewise linear
    assert torch.equal(inputs.eval()(2 * x), inputs(2 * x)) and inputs.clip.item() == kept


def test_qil_at_the_ends_of_its_interval():
    quantizer = LearnedInterval(WEIGHT, 3)
    c, delta, gamma = 0.6, 0.4, 2.0
    for name, value in (("center", c), ("distance", delta), ("exponent", gamma)):
        set_to(getattr(quantizer, name), value)
    w = torch.tensor([[c - delta, c + delta, c, -(c + delta), c - delta - 0.1, -5.0, 0.0]])
    close(quantizer.transform(w).detach(), [[0.0, 1.0, 0.25, -1.0, 0.0, -1.0, 0.0]])
    quantizer.factor.fill_(3.0)
    close(quantizer(w).detach(), [[0.0, 3.0, 1.0, -3.0, 0.0, -3.0, 0.0]])  # round(3 * 0.25) / 3
    inputs = LearnedInterval.of_inputs(2)
    set_to(inputs.center, c)
    set_to(inputs.distance, delta)
    inputs.ready.fill_(True)
    close(inputs(w).detach(), [[0.0, 1.0, 2 / 3, 0.0, 0.0, 0.0, 0.0]])  # round(3 * 0.5) = 2


def test_qil_begins_as_the_best_linear_quantizer():
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedInterval(weight, 3)

    def error(clip):
        unit = (weight / clip).clamp(-1, 1)
        return (weight - clip * (unit * 3).round() / 3).square().sum().item()

    ours = (weight - quantizer(weight)).square().sum().item()
    assert ours <= 1.002 * min(error(clip) for clip in torch.linspace(0.5, 4, 2000).tolist())


def test_qil_gradients_are_those_of_the_transformer():
    """By finite differences in float64, to w, c, δ and γ, away from the interval's ends."""
    quantizer = LearnedInterval(WEIGHT, 3).double()
    for parameter, value in ((quantizer.center, 0.6), (quantizer.distance, 0.5),
                             (quantizer.exponent, 0.7)):
        set_to(parameter, value)
    w = torch.tensor([[0.05, 0.3, -0.5, 0.9, -1.3, 2.0]], dtype=torch.float64, requires_grad=True)

    def transform(w, center, distance, exponent):
        state = {"center": center, "distance": distance, "exponent": exponent}
        return torch.func.functional_call(quantizer, state, (w,))

    learned = [p.detach().clone().requires_grad_() for p in
               (quantizer.center, quantizer.distance, quantizer.exponent)]
    upstream = torch.arange(1.0, 7.0, dtype=torch.float64)[None]
    factor = quantizer.factor
    transform(w, *learned).backward(upstream)
    found = [w.grad, *(p.grad for p in learned)]
    smooth = LearnedInterval.transform

    def surrogate(w, center, distance, exponent):
        quantizer.center.data, quantizer.distance.data = center, distance
        quantizer.exponent.data = exponent
        return (smooth(quantizer, w) * factor * upstream).sum().item()

    for i, grad in enumerate(found):
        for j in range(grad.numel()):
            sides = []
            for sign in (1, -1):
                point = [t.detach().clone() for t in (w, *learned)]
                point[i].view(-1)[j] += sign * 1e-6
                sides.append(surrogate(*point))
            assert grad.view(-1)[j].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("softness", [0.05, 0.2, 0.4, 0.8])
def test_dsq_at_the_ends_and_middles_of_its_intervals(softness):
    low, high = torch.tensor([[-1.0]]).double(), torch.tensor([[2.0]]).double()
    x = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, -9.0, 9.0]]).double()  # Δ = 1
    soft, hard = soft_step(x, low, high, 2, softness)
    close(soft, [[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, -1.0, 2.0]])
    close(hard, [[-1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, -1.0, 2.0]])
    nearest = (x + 0.3).round().clamp(-1, 2)
    close(soft_step(x + 0.3, low, high, 2, softness)[1], nearest)


def test_dsq_gradients_by_finite_differences():
    """To x, l, u and α; inside the intervals, where the soft quantizer is smooth."""
    x = torch.tensor([[-0.8, -0.3, 0.2, 0.45, 1.3, 2.4, -1.9]], dtype=torch.float64)
    arguments = [x, *(torch.tensor([[v]], dtype=torch.float64) for v in (-1.1, 1.9, 0.3))]
    for argument in arguments:
        argument.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, low, high, softness: soft_step(x, low, high, 2, softness)[0], arguments)
    soft_step(arguments[0], *arguments[1:3], 2, arguments[3])[0].sum().backward()
    assert x.grad[0, 5:].tolist() == [0.0, 0.0]  # outside
    with torch.no_grad():
        slope, hard = slope_of_soft_step(x, *arguments[1:3], 2, 0.3)
    torch.testing.assert_close(slope, x.grad)
    torch.testing.assert_close(hard, soft_step(*arguments[:3], 2, 0.3)[1])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_dsq_rounds_to_the_nearest_of_its_levels(bits):
    weight = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    for kind in (SoftStep, LearnedSoftStep):
        quantizer = kind(weight, bits)
        low, high = (end.item() for end in quantizer.range(weight.reshape(1, -1)))
        assert low == pytest.approx(-high)
        levels = torch.linspace(low, high, 2**bits)
        nearest = levels[(weight[..., None] - levels).abs().argmin(-1)]
        close(quantizer(weight).detach(), nearest)

    def error(u):
        grid = torch.linspace(-u, u, 2**bits)
        return (weight[..., None] - grid).square().amin(-1).sum().item()

    ours = (weight - quantizer(weight)).square().sum().item()
    assert ours <= 1.002 * min(error(u) for u in torch.linspace(0.3, 4, 1000).tolist())


def test_dsq_learns_its_range_and_softness():
    quantizer = LearnedSoftStep(WEIGHT, 2)
    assert quantizer.softness().item() == pytest.approx(0.2)
    set_to(quantizer.high, 1.0)
    set_to(quantizer.low, -1.0)
    w = WEIGHT.double().requires_grad_()
    quantizer.double()
    quantizer(w).sum().backward()
    low, high, logit = (p.detach().clone().requires_grad_() for p in
                        (quantizer.low, quantizer.high, quantizer.softness_logit))
    soft_step(WEIGHT.double(), low, high, 2, logit.sigmoid())[0].sum().backward()
    for ours, theirs in ((quantizer.low, low), (quantizer.high, high),
                         (quantizer.softness_logit, logit)):
        assert theirs.grad.abs().item() > 1e-3
        torch.testing.assert_close(ours.grad, theirs.grad)


ENCODINGS = {b: torch.tensor(list(itertools.product((-1.0, 1.0), repeat=b))).double()
             for b in (1, 2, 3)}


def qem_error(groups, basis, encodings):
    levels = (basis @ encodings.t()).sort(1).values
    return (groups - levels.gather(1, nearest(groups, levels))).square().sum(1)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_qem_never_raises_the_error(bits):
    generator = torch.Generator().manual_seed(bits)
    groups = torch.randn(20, 40, generator=generator, dtype=torch.float64)
    basis = torch.randn(20, bits, generator=generator, dtype=torch.float64)
    errors = [qem_error(groups, basis, ENCODINGS[bits])]
    for _ in range(30):
        new = refit(groups, basis, ENCODINGS[bits])
        averaged = basis.lerp(new, 0.1)  # what a training step does
        assert (qem_error(groups, averaged, ENCODINGS[bits]) <= errors[-1] * (1 + 1e-12)).all()
        basis = new
        errors.append(qem_error(groups, basis, ENCODINGS[bits]))
        assert (errors[-1] <= errors[-2] * (1 + 1e-12)).all()
    assert errors[-1].sum() < 0.8 * errors[0].sum()


@pytest.mark.parametrize("bits", [1, 2])
def test_qem_reaches_the_optimum_of_all_assignments(bits):
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(6, generator=generator, dtype=torch.float64)
    best = math.inf
    for codes in itertools.product(range(2**bits), repeat=6):
        B = ENCODINGS[bits][list(codes)]
        v = torch.linalg.pinv(B) @ w
        best = min(best, (w - B @ v).square().sum().item())
    basis = torch.randn(200, bits, generator=generator, dtype=torch.float64)
    groups = w.expand(200, 6)
    for _ in range(50):
        basis = refit(groups, basis, ENCODINGS[bits])
    assert qem_error(groups, basis, ENCODINGS[bits]).min().item() == pytest.approx(best, abs=1e-9)


def test_qem_by_hand():
    """1 bit: v = mean |w|, but for the 1e-4 that holds it where it was."""
    w = torch.tensor([[1.0, -2.0, 6.0]], dtype=torch.float64)
    v = torch.tensor([[5.0]], dtype=torch.float64)
    close(refit(w, v, ENCODINGS[1]), [[(9 + 1e-4 * 5) / (3 + 1e-4)]])


def test_lq_net_steps_and_starts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 30, generator=generator) * 0.1
    quantizer = LearnedBasis(weight, 2)
    start = quantizer.basis.clone()
    rms = weight.square().mean().sqrt().item()
    close(start, [[0.6745 * rms / 2, 0.6745 * rms]] * 5)
    fitted = refit(weight, start, quantizer.encodings)
    output, grad, _ = gradients(quantizer, weight, torch.ones(5, 30))
    close(quantizer.basis, start.lerp(fitted, 0.1))
    levels = (quantizer.basis @ quantizer.encodings.t()).sort(1).values
    distance = (weight[..., None] - levels[:, None]).abs()
    close(output, levels.gather(1, distance.argmin(-1)))
    assert (grad == 1).all()
    kept = quantizer.basis.clone()
    assert torch.equal(quantizer.eval()(weight), quantizer(weight))
    assert torch.equal(quantizer.basis, kept)

    inputs = LearnedBasis.of_inputs(2)
    x = torch.randn(64, 10, generator=generator).clamp_min(0)
    x.requires_grad_()
    output = inputs(x)
    output.sum().backward()
    assert set(output.unique().tolist()) <= set((inputs.basis @ inputs.encodings.t())[0].tolist())
    assert (x - output).square().mean() < 0.05 * x.square().mean()
    assert torch.equal(x.grad == 0, (x > output.max()))


def test_lotion_rounds_at_random_without_bias():
    weight = torch.tensor([[0.9, -0.35, 0.1, 0.6, -0.82, 0.0]])
    quantizer = RandomizedRounding(weight, 3, None, {"sample": True})
    torch.manual_seed(0)
    draws = quantizer(weight.expand(20_000, 1, 6))
    s = 0.3  # max / 3
    r = torch.tensor([[0.0, 0.35 / 0.3 % 1, 1 / 3, 0.0, 0.82 / 0.3 % 1, 0.0]])
    r[0, 1], r[0, 4] = 1 - r[0, 1], 1 - r[0, 4]
    variance = s**2 * r * (1 - r)
    torch.testing.assert_close(quantizer.variance(weight), variance, rtol=1e-4, atol=1e-7)
    error = 5 * (variance / len(draws)).sqrt() + 1e-6
    assert ((draws.mean(0) - weight).abs() <= error).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=1e-6)
    assert len(draws.div(s).round().unique()) <= 7
    close(draws.div(s).round() * s, draws)


def test_lotion_s_regularizer_is_the_expected_loss_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator)
    hessian, target = torch.rand(3, 4, generator=generator), torch.randn(3, 4, generator=generator)

    def loss(w):
        return 0.5 * (hessian * (w - target).square()).sum((-2, -1))

    quantizer = RandomizedRounding(weight, 2)
    quantizer.after_step(weight, hessian.sqrt())  # Adam's curvature is the root of the moment
    sampled = RandomizedRounding(weight, 2, None, {"sample": True})
    torch.manual_seed(1)
    draws = loss(sampled(weight.expand(20_000, 3, 4)))
    smoothed = loss(quantizer(weight)) + quantizer.penalty(weight)
    assert abs(draws.mean() - smoothed) < 5 * draws.std() / math.sqrt(len(draws))
    assert sampled.penalty(weight) is None


def test_lotion_s_gradient_by_finite_differences():
    weight = torch.tensor([[0.9, -0.35, 0.13, 0.55, -0.82]], dtype=torch.float64)
    quantizer = RandomizedRounding(weight, 3)
    quantizer.after_step(weight, torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]).double())
    w = weight.clone().requires_grad_()
    quantizer.penalty(w).backward()
    for i in range(1, 5):  # the largest holds the scale, whose gradient is left out
        sides = [weight.clone() for _ in range(2)]
        sides[0][0, i] += 1e-6
        sides[1][0, i] -= 1e-6
        slope = (quantizer.penalty(sides[0]) - quantizer.penalty(sides[1])).item() / 2e-6
        assert w.grad[0, i].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2])
def test_lr_net_s_moments_by_drawing(bits):
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    quantizer = RandomWeight(weight, bits)
    latent = quantizer.right_inverse(weight) + 0.3 * torch.randn(4, 6)
    positive = latent.sigmoid()
    zero = torch.as_tensor(quantizer.zero()).expand(4, 6)
    count = 40_000
    sign = (torch.rand(count, 4, 6) < positive).float() * 2 - 1
    drawn = sign * (torch.rand(count, 4, 6) >= zero) * quantizer.factor
    mean, variance = quantizer.mean(latent).detach(), quantizer.variance(latent).detach()
    assert ((drawn.mean(0) - mean).abs() <= 5 * (variance / count).sqrt() + 1e-6).all()
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.05, atol=1e-3)
    # The mode, by comparing all probabilities.
    chances = torch.stack([(1 - zero) * (1 - positive), zero, (1 - zero) * positive])
    likely = chances.argmax(0).float() - 1
    close(quantizer.eval()(latent), likely * quantizer.factor)


def test_lr_net_begins_at_the_weights():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 0.05
    quantizer = RandomWeight(weight, 2)
    mean = quantizer.mean(quantizer.right_inverse(weight)).detach()
    scaled = weight / quantizer.factor
    zero = (0.95 - 0.9 * scaled.abs()).clamp(0.05, 0.95)
    torch.testing.assert_close(quantizer.zero().detach(), zero)
    reached = scaled.abs() < 0.9 * (1 - zero)  # elsewhere the clip of σ(θ_b) holds
    assert 100 < reached.sum() < 500
    torch.testing.assert_close(mean[reached], weight[reached], rtol=1e-4, atol=1e-6)
    bound = 0.9 * (1 - zero) * quantizer.factor
    torch.testing.assert_close(mean[~reached].abs(), bound[~reached])


@pytest.mark.parametrize("bits", [1, 2])
def test_lr_net_s_gradients_by_finite_differences(bits):
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    quantizer = RandomWeight(weight, bits).double()
    latent = quantizer.right_inverse(weight).detach().requires_grad_()
    logits = [] if bits == 1 else [quantizer.zero_logit.detach().clone().requires_grad_()]

    def moments(latent, *logit):
        if logit:
            del quantizer.zero_logit
            quantizer.zero_logit = logit[0]
        return quantizer.mean(latent), quantizer.variance(latent)

    assert torch.autograd.gradcheck(moments, [latent, *logits])


MEANINGLESS = [
    (LearnedStep, 1, "2 or 3 or 4"), (OptimalClip, 1, "2 or 3 or 4"), (StemResidual, 3, "2"),
    (LearnedInterval, 1, "2 or 3 or 4"), (StretchedElastic, 3, "2"), (ElasticBinary, 2, "1"),
    (RowStep, 2, "3 or 4"), (LearnedBasis, 5, "1 or 2 or 3 or 4"), (SoftStep, 0, "1 or 2 or 3"),
    (RandomizedRounding, 1, "2 or 3 or 4"), (RandomWeight, 3, "1 .binary. or 2 .ternary.")]


@pytest.mark.parametrize(("kind", "bits", "rule"), MEANINGLESS,
                         ids=lambda x: getattr(x, "__name__", None))
def test_a_width_without_meaning(kind, bits, rule):
    with pytest.raises(ValueError, match=rf"blaq.{kind.__name__}: bits must be {rule}.*got {bits}"):
        kind(WEIGHT, bits)


def test_inputs_that_a_method_does_not_quantize():
    with pytest.raises(ValueError, match="blaq.StemResidual: bits must be 0 for inputs, got 2"):
        StemResidual.of_inputs(2)


@pytest.mark.parametrize("kind", [LearnedStep, OptimalClip, LearnedInterval, LearnedBasis, SoftStep,
                                  LearnedSoftStep, StretchedElastic, StemResidual, RandomWeight,
                                  RandomizedRounding])
@pytest.mark.parametrize("shape", [(3, 7), (4, 3, 2, 2), (2, 1), (1, 1)])
def test_shapes_and_zeros(kind, shape):
    """Any shape of weight; weights and inputs that are all zero stay finite."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert kind(weight, 2)(weight).shape == shape
    zeros = torch.zeros(shape, requires_grad=True)
    quantizers = [kind(zeros.detach(), 2)]
    if getattr(kind, "input_widths", ()):
        quantizers.append(kind.of_inputs(2))
    for quantizer in quantizers:
        output = quantizer(zeros)
        output.sum().backward()
        assert output.isfinite().all() and zeros.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in quantizer.parameters())
        assert quantizer.eval()(zeros).isfinite().all()

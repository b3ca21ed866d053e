"""What each method computes, against hand-worked cases and brute force."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from blaq import functional
from blaq.methods import make_method
from blaq.methods.adaptive import FINEST, coarsest, tolerances
from blaq.methods.alq import MultiBit, nearest_codes, refit, sign_table
from blaq.methods.binary import RandomSign, ScaledSign, Sign
from blaq.methods.deep_compression import Shared, kmeans
from blaq.methods.sparsity import huffman_bits, keep_largest, sparse_bits
from blaq.methods.ternary import NearestLevel, SignedScales, SignedScalesExact, Threshold
from blaq.train.config import TrainConfig
from blaq_kernels import reference

TERNARY = (0.0, 1.0)


def latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def curvature(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.05


def quantizer(kind, weight, options=None, **fields):
    return kind(weight, 2, SimpleNamespace(**{"codebook": "ternary", "group_size": 0, "max_iter": 9,
                                              "epochs": 10, **fields}), options or {})


def error(weight, value, d=1.0):
    return (d * (weight - value).double().square()).sum().item() / 2


def solved(weight, d, levels, **options):
    codes, scale = functional.solve(weight, d, levels, **options)
    return reference.dequantize(codes, scale, levels, options.get("group_size", 0))


def brute_force(weight, d, levels):
    """Lowest error over all codes, the scale of each by least squares."""
    w, d = weight.flatten().double(), d.flatten().double()
    signed = sorted({s * level for level in levels for s in (-1.0, 1.0)})
    codes = torch.tensor(list(itertools.product(signed, repeat=len(w))), dtype=torch.float64)
    top, bottom = codes @ (d * w), codes.square() @ d
    gain = torch.where(bottom > 0, top.square() / bottom.clamp_min(1e-30), 0.0)
    return (d * w.square()).sum().item() / 2 - gain.max().item() / 2


# LAB, LAT, LAQ


@pytest.mark.parametrize("levels", [(1.0,), TERNARY, (0.5, 1.0), (0.0, 0.5, 1.0)])
@pytest.mark.parametrize("seed", range(5))
def test_exact_solve_against_brute_force(levels, seed):
    w, d = latent(1, 7, seed=seed), curvature(1, 7, seed=seed)
    best = brute_force(w, d, levels)
    assert error(w, solved(w, d, levels, method="exact"), d) <= best * 1.001 + 1e-9


def test_exact_ternary_keeps_all_weights_of_equal_magnitude():
    w = torch.tensor([[1.0, -1.01, 0.99, -1.0]])  # LAQ's published code never tries full support
    value = solved(w, torch.ones_like(w), TERNARY, method="exact")
    assert torch.equal(value, w.sign() * value[0, 0]) and value[0, 0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("levels", [TERNARY, (0.0, 1 / 3, 2 / 3, 1.0), (0.0, 0.25, 0.5, 1.0)])
def test_alternation_never_raises_the_objective(levels):
    w, d = latent(1, 500), curvature(1, 500)
    errors = [error(w, solved(w, d, levels, max_iter=m), d) for m in range(1, 12)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_laq_log_rounds_to_the_nearest_level(bits):
    n = 2 ** (bits - 1) - 1
    levels = (0.0, *(2.0 ** (i - n + 1) for i in range(n)))
    x = torch.linspace(-1.4, 1.4, 4001, dtype=torch.float64)
    exponent = (x.abs().log2() - (math.log2(1.5) - 0.5)).round().clamp(-(n - 1), 0)
    rule = torch.where(x.abs() < 2.0**-n, 0.0, x.sign() * 2.0**exponent)
    value = functional.fake_quantize(x, torch.ones(1, dtype=torch.float64), levels)
    thresholds = torch.tensor([0.75 * 2.0**-k for k in range(n)] + [2.0**-n])
    clear = (x.abs()[:, None] - thresholds).abs().amin(1) > 1e-9
    assert clear.sum() > 3900 and torch.equal(rule[clear], value[clear])


def test_constant_curvature_gives_the_methods_without_it():
    w, d = latent(8, 25), torch.full((8, 25), 0.37)
    bwn = quantizer(ScaledSign, w, {"rule": "identity"})(w)
    assert torch.allclose(solved(w, d, (1.0,)), bwn, rtol=1e-6, atol=0)
    assert bwn.unique().tolist() == pytest.approx([-w.abs().mean().item(), w.abs().mean().item()])
    exact = quantizer(NearestLevel, w)(w)
    assert torch.allclose(solved(w, d, TERNARY, method="exact"), exact, rtol=1e-6, atol=0)


def test_exact_ternary_weights_beat_the_rule_and_meet_brute_force():
    for seed in range(5):
        w = latent(1, 7, seed=seed)
        rule, exact = (error(w, quantizer(kind, w)(w)) for kind in (Threshold, NearestLevel))
        best = brute_force(w, torch.ones_like(w), TERNARY)
        assert best - 1e-9 <= exact <= best * 1.001 + 1e-9
        assert exact <= rule * 1.001


@pytest.mark.parametrize("kind", [SignedScales, SignedScalesExact])
def test_two_scales_are_solved_side_by_side(kind):
    w, d = latent(1, 7, seed=3), curvature(1, 7)
    module = quantizer(kind, w)
    for _ in range(8):  # alternation needs a few from its start
        module.after_step(w, d)
    value = module(w)
    best = sum(brute_force(w[side][None], d[side][None], TERNARY) for side in (w > 0, w < 0))
    assert value.unique().numel() == 3 and (value * w >= 0).all()
    loose = 1.001 if kind is SignedScalesExact else 1.3  # the alternation's local minimum
    assert best - 1e-9 <= error(w, value, d) <= loose * best
    one = error(w, solved(w, d, TERNARY, method="exact"), d)
    assert kind is SignedScales or error(w, value, d) <= one * 1.001
    w.requires_grad_()
    module(w).backward(d)
    assert torch.equal(w.grad, d)


# BinaryConnect, BWN, TWN


def test_binary_connect():
    w = torch.tensor([[0.3, -0.6, 2.0, -0.0]], requires_grad=True)
    fixed = quantizer(Sign, w.detach(), {"magnitude": 0.5})
    assert fixed(w).tolist() == [[0.5, -0.5, 0.5, 0.5]]
    random = quantizer(RandomSign, w.detach(), {"magnitude": 1.0})
    torch.manual_seed(0)
    draws = torch.stack([random(w).detach() for _ in range(4000)])
    assert draws.unique().tolist() == [-1.0, 1.0]
    share = (draws > 0).double().mean(0)[0].tolist()
    assert share == pytest.approx([0.65, 0.2, 1.0, 0.5], abs=4 * 0.5 / 4000**0.5)
    random(w).backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert w.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    state = torch.get_rng_state()
    assert random.eval()(w).tolist() == [[1.0, -1.0, 1.0, 1.0]]
    assert torch.equal(state, torch.get_rng_state())


def test_binary_connect_clips_latent_weights_after_a_step():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.95, -0.5]]))
    method = make_method(model, TrainConfig(method="bc", lr=0.1, clip=1.0), 10)
    method.set_lr(0.1)

    def closure():
        model.zero_grad()
        loss = -model(torch.tensor([[1.0, 1.0]])).sum()  # gradient -1 at both: Adam's step is +lr
        loss.backward()
        return loss

    assert method.step(closure).item() == 0.0  # at the signs (+1, -1)
    weight = model[0].parametrizations.weight.original
    assert weight[0].tolist() == pytest.approx([1.0, -0.4])


@pytest.mark.parametrize("group_size", [0, -1, 3])
def test_gradient_of_binary_weight_networks(group_size):
    w, g = latent(2, 7) * 1.5, latent(2, 7, seed=5)
    w.requires_grad_()
    quantizer(ScaledSign, w.detach(), {"rule": "scaled"}, group_size=group_size)(w).backward(g)
    chunks = {0: [slice(0, 14)], -1: [slice(0, 7), slice(7, 14)], 3: [
        slice(a, min(a + 3, end)) for end in (7, 14) for a in range(end - 7, end, 3)]}[group_size]
    flat, grad = w.detach().flatten(), g.flatten()
    expected = torch.empty(14)
    for chunk in chunks:
        v, h = flat[chunk], grad[chunk]
        expected[chunk] = (v.sign() * (h * v.sign()).sum() / len(v)
                           + h * v.abs().mean() * (v.abs() <= 1))
    assert torch.allclose(w.grad.flatten(), expected, atol=1e-6)
    assert (flat.abs() > 1).any()


def test_ternary_weight_networks_by_hand():
    # 0.7 · mean = 0.378; the mean of those above, 1, 0.5 and 0.9, is 0.8
    w = torch.tensor([[1.0, -0.2, 0.5, -0.9, 0.1]])
    assert quantizer(Threshold, w)(w)[0].tolist() == pytest.approx([0.8, 0.0, 0.8, -0.8, 0.0])
    rows = torch.cat([w, 10 * w])
    assert torch.allclose(quantizer(Threshold, rows, group_size=-1)(rows)[1], 10 * quantizer(
        Threshold, w)(w)[0])
    assert torch.equal(quantizer(Threshold, 0 * w)(0 * w), 0 * w)


# error compensation


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_error_compensation_by_hand(strength):
    lr, w = 0.01, torch.tensor([[0.3, -0.5, 0.1, 0.7]])
    model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    run = TrainConfig(method="error-compensation", bits=1, lr=lr, clip=0.0, weight_decay=0.0,
                      options=f"strength={strength}")
    method = make_method(model, run, 10)
    method.set_lr(lr)
    quantized = model[0].weight.detach().clone()
    assert torch.allclose(quantized, 0.4 * w.sign())

    def closure():
        model.zero_grad()
        loss = model(torch.tensor([[1.0, 2.0, -3.0, 4.0]])).sum()
        loss.backward()
        return loss

    method.step(closure)  # Adam's first step is lr · sign of the gradient
    step = lr * torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    share = lr * strength  # 1: LAB's Eq. 7, a step from the quantized weight
    expected = w + share * (quantized - w) - step
    assert torch.allclose(method.optimizer.state[model[0].weight]["latent"], expected, atol=1e-6)


# ADMM


def admm(w, **options):
    model = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    name = options.pop("method", "admm")
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return model, make_method(model, TrainConfig(method=name, bits=1, epochs=4, options=text), 2)


def test_admm_by_hand():
    w = torch.tensor([[0.3, -0.5], [0.1, 0.7]])  # nearest binary: 0.4 · signs
    model, method = admm(w, rho=0.2, growth=3.0, decay=0.1)
    target = 0.4 * w.sign()
    expected = 0.1 * (w - target).square().sum() + 0.05 * w.square().sum()
    assert method.penalty().item() == pytest.approx(expected.item())
    method.epoch_ended(1)
    assert torch.allclose(method.targets[0], target) and method.rho == pytest.approx(0.6)
    assert torch.allclose(method.duals[0], w - target)
    method.epoch_ended(2)  # projects W + U = 2 W - Z
    moved = 2 * w - target
    assert torch.allclose(method.targets[0], moved.abs().mean() * moved.sign())
    with method.evaluating():
        assert torch.allclose(model[0].weight, target)
    assert torch.equal(model[0].weight, w)


def test_admm_pruning_by_hand():
    w = torch.tensor([[0.3, -0.5], [0.1, 0.7]])
    model, method = admm(w, method="admm-pruning", sparsity=0.5, retrain=0.5)
    assert torch.equal(method.targets[0], torch.tensor([[0.0, -0.5], [0.0, 0.7]]))
    method.epoch_ended(1)
    assert not method.masks and method.penalty() is not None
    method.epoch_ended(2)  # from here on half of the epochs are retraining
    assert method.penalty() is None
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    method.after_step()
    assert model[0].weight.tolist() == [[0.0, 1.0], [0.0, 1.0]]


# Deep Compression


def test_kmeans_finds_separated_clusters_and_ends_at_a_fixed_point():
    values = torch.cat([latent(50, seed=i) * 0.01 + centre for i, centre in
                        enumerate((-1.0, 0.1, 0.5, 2.0))])
    centroids, nearest = kmeans(values, 4)
    assert torch.equal(nearest, torch.arange(4).repeat_interleave(50))
    assert torch.allclose(centroids, values.reshape(4, 50).mean(1))
    values = latent(1000)
    centroids, nearest = kmeans(values, 8, iterations=500)
    distance = (values[:, None] - centroids).abs()
    assert torch.equal(distance.gather(1, nearest[:, None])[:, 0], distance.amin(1))
    means = torch.stack([values[nearest == k].mean() for k in range(8)])
    assert torch.allclose(centroids, means, atol=1e-5)


def test_shared_weights_pass_the_sum_of_a_cluster_s_gradients():
    w = torch.tensor([[0.1, -0.9, 1.0, 0.9, -1.1, 0.2]])
    module = quantizer(Shared, w, {"dense": 0.1, "sparse": 0.2})
    module.sparsity = 1 / 3
    module.centroids = torch.nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        module.epoch_ended(w, 1)
        assert torch.equal(module(w), w * (w.abs() > 0.5))
        module.epoch_ended(w, 2)
    value = module(w)
    expected = torch.tensor([[0.0, -1.0, 0.95, 0.95, -1.0, 0.0]])
    assert torch.allclose(value, expected)
    value.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]]))
    assert module.centroids.grad.tolist() == [18.0, 12.0]


def test_sizes_of_sparse_weights():
    symbols = torch.tensor([0] * 4 + [1] * 2 + [2] + [3])
    assert huffman_bits(symbols) == 4 * 1 + 2 * 2 + 1 * 3 + 1 * 3
    assert huffman_bits(torch.zeros(5)) == 5 and huffman_bits(torch.zeros(0)) == 0
    mask = torch.zeros(1, 100, dtype=torch.bool)
    mask[0, [3, 10, 90]] = True  # gaps 3, 6, 79 = 32 + 32 + 15: two paddings
    codes = torch.zeros(1, 100, dtype=torch.uint8)
    codes[0, 10] = 1
    gaps, kept = torch.tensor([3, 6, 15, 31, 31]), torch.tensor([0, 1, 0, -1, -1])
    assert sparse_bits(codes, mask) == huffman_bits(gaps) + huffman_bits(kept) == 10 + 8
    w = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    assert keep_largest(w, 0.5).tolist() == [[False, True], [True, False]]
    assert keep_largest(w, 0.0).all()


# ALQ


def test_alq_takes_the_nearest_of_all_levels():
    target, alpha = latent(3, 40), torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    alpha[1, 2] = 0.0  # a pruned coordinate
    codes = nearest_codes(target, alpha)
    levels = alpha @ sign_table(3, alpha).T
    distance = (target[..., None] - levels[:, None, :]).abs()
    taken = distance.gather(2, codes.long()[..., None])[..., 0]
    assert torch.allclose(taken, distance.amin(2), atol=1e-6)
    assert sign_table(2, alpha).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_alq_coordinates_are_weighted_least_squares():
    target, h = latent(2, 60).double(), curvature(2, 60).double()
    codes = torch.randint(8, (2, 60), generator=torch.Generator().manual_seed(0))
    signs, active = sign_table(3, target)[codes], torch.tensor([[True] * 3, [True, False, True]])
    alpha = refit(target, h, codes.to(torch.uint8), active)
    for g in range(2):
        root, columns = h[g].sqrt(), signs[g][:, active[g]]
        best = torch.linalg.lstsq(columns * root[:, None], target[g] * root).solution
        assert torch.allclose(alpha[g][active[g]], best, rtol=1e-4)
    assert alpha[1, 1] == 0.0


def resolved(weight, bits):
    layer = MultiBit(weight.clone(), bits, -1)
    layer.begin()
    return layer


def test_alq_begins_greedily_and_minimises_its_model():
    w = latent(4, 30)
    errors = [error(w, resolved(w, bits).values()) for bits in (1, 2, 3, 4)]
    assert errors[0] == pytest.approx(error(w, solved(w, torch.ones_like(w), (1.0,),
                                                      group_size=-1)), rel=1e-4)
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors))
    layer = resolved(w, 2)
    layer.weight.grad = latent(4, 30, seed=9)
    before, grad = layer.values(), layer.gradient().clone()
    layer.step_bases(0.01)  # AMSGrad's first step is lr · sign of the gradient, where h is |g|
    target, h = before - 0.01 * grad.sign(), grad.abs()
    assert error(target, layer.values(), h) <= error(target, before, h)
    assert torch.equal(layer.values(), layer.weight)


def test_alq_drops_the_least_important_coordinates():
    layer = resolved(latent(2, 50), 2)
    layer.weight.grad = latent(2, 50, seed=4)
    signs = sign_table(2, layer.alpha)[layer.codes.long()]
    alpha, grad = layer.alpha.clone(), (signs * layer.gradient()[..., None]).sum(1)
    layer.step_coordinates(0.1)
    assert torch.allclose(layer.alpha, alpha - 0.1 * grad.sign(), atol=1e-5)
    rise = -0.1 * grad * layer.alpha + 0.5 * grad.abs() * layer.alpha.square()
    assert torch.allclose(layer.importance(0.1), rise, rtol=1e-3)
    gone = layer.importance(0.1) == layer.importance(0.1).min()
    layer.drop(gone)
    assert layer.active.sum() == 3 and (layer.alpha[gone] == 0).all()
    assert layer.values()[gone.any(1)].unique().numel() == 2


def test_alq_schedule():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    method = make_method(model, TrainConfig(method="alq", bits=2, group_size=-1, epochs=2, lr=0.01,
                                            options="dense=0,rounds=1,prune=0.4"), 6)

    def closure():
        model.zero_grad()
        loss = model(latent(3, 6)).square().sum()
        loss.backward()
        return loss

    places, bits = [], []
    for _ in range(12):  # two rounds of 4 steps of bases and 2 of coordinates
        method.step(closure)
        places.append(tuple(method.place))
        bits.append(method.weight_bits)
    half = [False] * 4 + [True] * 2
    assert places == [(r, c) for r in (0, 1) for c in half]
    assert bits == pytest.approx([2.0] * 6 + [1.2] * 6)  # 4 of 10 coordinates


# AQ


def test_tolerances_share_the_rise_that_is_left():
    grads = [latent(3, 4), latent(5, seed=2)]
    free = tolerances(grads, 0.3, [math.inf, math.inf])
    assert sum((g.abs() * t).sum().item() for g, t in zip(grads, free, strict=True)
               ) == pytest.approx(0.3)
    bound = tolerances(grads, 0.3, [0.01, 0.02])
    assert all(t.max() <= radius + 1e-9 for t, radius in zip(bound, (0.01, 0.02), strict=True))
    assert all((t == 0).all() for t in tolerances(grads, -1.0, [1.0, 1.0]))


def test_each_weight_gets_the_coarsest_number_within_its_tolerance():
    w, tolerance = latent(200) * 0.3, torch.rand(200) * 0.1
    w[0], tolerance[0] = 0.123456, 0.0
    unit = 1.0
    values, bits = coarsest(w, tolerance, unit)
    for x, t, value, k in zip(w.tolist(), tolerance.tolist(), values.tolist(), bits.tolist(),
                              strict=True):
        def best(width, x=x):
            if width == 0:
                return 0.0
            grid = [m * unit / 2 ** (width - 1) for m in
                    range(-2 ** (width - 1), 2 ** (width - 1))]
            return min(grid, key=lambda number: abs(number - x))

        widths = [width for width in range(9) if abs(best(width) - x) <= t * (1 + 1e-6)]
        if widths:
            assert k == widths[0] and value == pytest.approx(best(k), abs=1e-7)
        else:
            assert k > 8
    assert bits[0] == FINEST and values[0].item() == pytest.approx(0.123456, abs=2.0**-16)

"""blaq.BLAQ against the equations, and against what PyTorch expects of an optimizer."""

import copy
import pickle

import pytest
import torch
from small_network import (
    assert_param_is_quantized_latent,
    assert_same,
    make_closure,
    make_model,
    make_optimizer,
    snapshot,
)
from torch import nn

import blaq
from blaq.quantization import quantization_of
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of


def equations_step(grads, latent, exp_avg, exp_avg_sq, scale, t, a, levels, hyper):
    """One step for one tensor from the equation-level ops; ``grads(weight)`` is the gradient.
    Returns the new (param, latent, exp_avg, exp_avg_sq, scale)."""
    lr, beta1, beta2, eps, decay, clip, group_size, max_iter, method = hyper
    ops = torch.ops.blaq
    ones = torch.ones_like(latent)

    def curvature(grad):
        v = beta2 * exp_avg_sq + (1 - beta2) * (grad * grad)
        return (v / (1 - beta2**t)).sqrt() + eps

    def target(m, d):  # Eqs. 6 and 8; d is lr · D
        decayed = latent * (1 - lr * decay)
        return ops.scaled_update(decayed, lr * (m / (1 - beta1**t)), d.contiguous())

    def quantize(w, d):
        codes, alpha = ops.solve(w, d, scale, levels, group_size, max_iter, method)
        return ref.dequantize(codes, alpha, levels, group_size), alpha

    current = ops.fake_quantize(latent, scale, levels, group_size)
    grad = grads(current)
    d = curvature(grad)
    if a < 1:
        trial_weight, _ = quantize(target(beta1 * exp_avg + (1 - beta1) * grad, d), d)
        trial = grads(trial_weight)
        d = ops.blend(d, curvature(trial), a)  # Eq. 10
        grad = ops.blend(grad, trial, a)  # Eq. 9
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * (grad * grad)
    new = target(m, d)
    if clip > 0:
        new = new.clamp(-clip * ones, clip * ones)
    param, alpha = quantize(new, d)
    return param, new, m, v, alpha


@pytest.mark.parametrize("backtrack", [1.0, 0.6], ids=["laq", "blaq"])
@pytest.mark.parametrize("method", ["alternating", "exact"])
@pytest.mark.parametrize("bits,group_size", [(1, 0), (2, -1), (4, 5)])
def test_trajectory_equals_the_equations(bits, group_size, method, backtrack):
    torch.manual_seed(0)
    wanted = torch.randn(6, 11)
    weight = nn.Parameter(torch.randn(6, 11) * 0.5)
    levels = levels_of("pow2", bits)
    hyper = (0.05, 0.9, 0.99, 1e-6, 0.1, 0.8, group_size, 5, method)
    latent = weight.detach().clone()
    scale = ref.solve(latent, torch.ones(6, 11), None, levels, group_size, 5, method)[1]
    m, v = torch.zeros(6, 11), torch.zeros(6, 11)
    opt = blaq.BLAQ([{"params": [weight], "bits": bits}], lr=0.05, betas=(0.9, 0.99), eps=1e-6,
                    weight_decay=0.1, clip=0.8, group_size=group_size, method=method,
                    backtrack=backtrack)

    def closure():
        opt.zero_grad()
        loss = (weight - wanted).pow(4).sum()
        loss.backward()
        return loss

    for t in range(1, 6):
        opt.step(closure)
        param, latent, m, v, scale = equations_step(
            lambda w: 4 * (w - wanted).pow(3), latent, m, v, scale, t, backtrack, levels, hyper)
        state = opt.state[weight]
        names = ("latent", "exp_avg", "exp_avg_sq", "scale")
        for actual, expected in zip((weight, *(state[name] for name in names)),
                                    (param, latent, m, v, scale), strict=True):
            torch.testing.assert_close(actual.detach(), expected, rtol=2e-5, atol=1e-6)
        assert state["step"].item() == t
        latent, m, v, scale = (state[name].clone() for name in names)
    assert_param_is_quantized_latent(opt)


def test_closure_runs_twice_at_once_and_the_first_loss_returns():
    model, calls = make_model(), []
    opt = make_optimizer(model)
    assert opt.evaluations_per_step == 2
    loss = opt.step(make_closure(model, opt, calls))
    assert len(calls) == 2 and loss.item() == calls[0] and calls[0] != calls[1]


@pytest.mark.parametrize("options", [{"backtrack": 1.0}, {"one_pass": True}])
def test_closure_runs_once_where_no_trial_is_needed(options):
    model, calls = make_model(), []
    opt = make_optimizer(model, **options)
    assert opt.evaluations_per_step == 1
    assert opt.step(make_closure(model, opt, calls)).item() == calls[0] and len(calls) == 1
    other = make_model()
    manual = make_optimizer(other, **options)
    make_closure(other, manual)()
    assert manual.step() is None
    assert_same(snapshot(model, opt), snapshot(other, manual))


def test_without_closure_the_error_names_the_ways_out():
    model = make_model()
    opt = make_optimizer(model)
    make_closure(model, opt)()
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match=r"step\(closure\).*trial_step.*one_pass.*backtrack=1"):
        opt.step()
    assert_same(snapshot(model, opt), before)


def test_trial_step_by_hand_equals_the_closure():
    model, other = make_model(dropout=0.5), make_model(dropout=0.5)
    opt, manual = make_optimizer(model), make_optimizer(other)
    closure, evaluate = make_closure(model, opt), make_closure(other, manual)
    for seed in range(3):
        torch.manual_seed(seed)
        opt.step(closure)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        random_state = blaq.RandomState()
        evaluate()
        manual.trial_step()
        with blaq.trial_pass(other, random_state):
            evaluate()
        manual.step()
        assert torch.equal(torch.get_rng_state(), after)
    assert_same(snapshot(model, opt), snapshot(other, manual))


def test_param_is_quantized_from_construction_on():
    model = make_model()
    floats = [p.detach().clone() for p in model.parameters()]
    opt = make_optimizer(model)
    assert_param_is_quantized_latent(opt)
    assert_same([opt.state[p].get("latent", p).detach() for p in model.parameters()], floats)
    closure = make_closure(model, opt)
    for _ in range(3):
        opt.step(closure)
        assert_param_is_quantized_latent(opt)
    weight = model[5].weight
    assert weight.unique().numel() == 2
    assert quantization_of(weight).scale is opt.state[weight]["scale"]


def test_training_lowers_the_loss():
    model, calls = make_model(), []
    opt = make_optimizer(model)
    for _ in range(40):
        opt.step(make_closure(model, opt, calls))
    assert calls[-2] < 0.5 * calls[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"backtrack": 1.0}, {"one_pass": True}, {"bits": 4}])
def test_checkpoint_resumes_bit_for_bit(options, dtype):
    model = make_model(dropout=0.3, dtype=dtype)
    opt = make_optimizer(model, **options)
    closure = make_closure(model, opt)
    for _ in range(3):
        opt.step(closure)
    saved, seed = snapshot(model, opt), torch.get_rng_state()
    other = make_model(dropout=0.3, dtype=dtype)
    resumed = make_optimizer(other, **options)
    resumed.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    assert_same(snapshot(other, resumed), saved)
    assert quantization_of(other[0].weight).scale is resumed.state[other[0].weight]["scale"]
    for run, optimizer in ((model, opt), (other, resumed)):
        torch.set_rng_state(seed)
        for _ in range(2):
            optimizer.step(make_closure(run, optimizer))
    assert_same(snapshot(model, opt), snapshot(other, resumed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_in_lockstep(duplicate):
    model = make_model()
    opt = make_optimizer(model)
    opt.step(make_closure(model, opt))
    copied, twin = duplicate((model, opt))
    for run, optimizer in ((model, opt), (copied, twin)):
        optimizer.step(make_closure(run, optimizer))
    assert_same(snapshot(model, opt), snapshot(copied, twin))
    assert quantization_of(copied[0].weight).scale is twin.state[copied[0].weight]["scale"]


def test_loading_copies_and_keeps_float32_state_of_bfloat16_parameters():
    model = make_model(dtype=torch.bfloat16)
    opt = make_optimizer(model)
    opt.step(make_closure(model, opt))
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    for number, param in enumerate(p for group in opt.param_groups for p in group["params"]):
        state = opt.state[param]
        for name in ("latent", "exp_avg", "exp_avg_sq", "step"):
            assert state[name].dtype == torch.float32
            assert torch.equal(state[name], saved["state"][number][name])
            assert state[name].data_ptr() != saved["state"][number][name].data_ptr()


@pytest.mark.parametrize("options,message", [
    ({"bits": {"0": 3, "5": 1, "7": 8}}, r"param_groups\[1\]\['bits'\] must be 3 .*got 2"),
    ({"group_size": -1}, r"param_groups\[0\]\['group_size'\] must be -1 .*got 0"),
    ({"width": 7}, r"latent of '5.weight' must have shape"),
])
def test_a_checkpoint_that_does_not_fit_changes_nothing(options, message):
    model = make_model()
    opt = make_optimizer(model)
    other = make_model()
    if options.pop("width", None):
        other[5], other[7] = nn.Linear(64, 7), nn.Linear(7, 3)
    unlike = make_optimizer(other, **options)
    before = snapshot(other, unlike)
    with pytest.raises(ValueError, match=r"blaq\.BLAQ\.load_state_dict: " + message):
        unlike.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"\['bits'\] must be"):
        adamw = torch.optim.AdamW([{"params": group["params"]} for group in opt.param_groups])
        unlike.load_state_dict(adamw.state_dict())
    assert_same(snapshot(other, unlike), before)


def test_weights_loaded_behind_the_optimizer_are_an_error_not_lost():
    model, floats = make_model(), make_model().state_dict()
    opt = make_optimizer(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # the same values: fine
    opt.step(make_closure(model, opt))
    model.load_state_dict(floats)
    with pytest.raises(RuntimeError, match=r"'5.weight' must be written by the optimizer alone"):
        opt.step(make_closure(model, opt))


def test_a_bad_group_quantizes_nothing():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    groups = blaq.param_groups(model, bits=2)
    for bad in ({"params": groups[0]["params"][:1]}, {"params": [("x", torch.zeros(2).log())],
                                                      "bits": 1}):
        with pytest.raises(ValueError):
            blaq.BLAQ([*groups, bad])
        assert_same(copy.deepcopy(model.state_dict()), before)


GOOD = {"params": [torch.ones(2, 3)], "bits": 2}
BAD_OPTIONS = [
    ({"lr": -1}, "lr must be at least 0, got -1"),
    ({"lr": torch.ones(2)}, r"lr must have one element, got \[2\]"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ({"eps": -1e-8}, "eps must be at least 0, got -1e-08"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"clip": -1.0}, "clip must be at least 0, got -1.0"),
    ({"backtrack": 0.0}, r"backtrack must be in \(0, 1\], got 0.0"),
    ({"backtrack": 1.5}, r"backtrack must be in \(0, 1\], got 1.5"),
    ({"max_iter": 0}, "max_iter must be an integer of at least 1, got 0"),
    ({"method": "newton"}, "method must be 'alternating' or 'exact', got 'newton'"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'raise' or 'skip', got 'ignore'"),
    ({"group_size": -2}, "group_size must be 0, -1 or positive, got -2"),
]
BAD_GROUPS = [
    ({"bits": 5}, "bits must be 1, 2, 3, 4, 8 or None, got 5"),
    ({"params": [torch.ones(3, 2).t()]}, r"params\[0\] must be contiguous, got strides \[1, 2\]"),
    ({"params": [torch.ones(2, dtype=torch.float64)]}, r"params\[0\] must be float32, bfloat16"),
    ({"params": [torch.tensor([1.0, float("nan")])]}, r"params\[0\] must be finite, got NaN"),
    ({"params": [torch.ones(0, 3)]}, r"params\[0\] must have elements, got \[0, 3\]"),
]


@pytest.mark.parametrize("options,message", BAD_OPTIONS)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=r"blaq\.BLAQ: " + message):
        blaq.BLAQ([dict(GOOD)], **options)


@pytest.mark.parametrize("group,message", BAD_GROUPS)
def test_a_bad_group_is_named_and_not_added(group, message):
    opt = blaq.BLAQ([{"params": [torch.ones(4)], "bits": 1}])
    with pytest.raises(ValueError, match=r"blaq\.BLAQ: " + message):
        opt.add_param_group({**GOOD, **group})
    assert len(opt.param_groups) == 1 and len(opt.state) == 1


@pytest.mark.parametrize("options,message", [({"codebook": "nope"}, "name must be one of"),
                                             ({"codebook": [0.5, 0.7]}, "levels must"),
                                             ({"codebook": [1.0]}, "magnitudes for 2 bits")])
def test_a_bad_codebook_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        blaq.BLAQ([dict(GOOD)], **options)

"""blaq.BLAQ against the equations, and against what PyTorch expects of an optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import blaq
from blaq.quantization import quantization_of
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of


def make_model(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(dropout), nn.Linear(4 * 16, 9), nn.ReLU(),
                         nn.Linear(9, 3)).to(dtype)


def make_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 1, 6, 6, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (16,), generator=generator)


def make_closure(model, opt, calls=None):
    x, y = make_batch(next(model.parameters()).dtype)

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(x).float(), y)
        loss.backward()
        if calls is not None:
            calls.append(loss.item())
        return loss

    return closure


def make_optimizer(model, **options):
    bits = options.pop("bits", {"0": 2, "5": 1, "7": 8})
    group_size = options.pop("group_size", 0)
    return blaq.BLAQ(blaq.param_groups(model, bits=bits, group_size=group_size),
                     **{"lr": 1e-2, **options})


def assert_same(a, b):
    """Bitwise, for state_dicts and lists of tensors, nested."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def snapshot(model, opt):
    return copy.deepcopy((model.state_dict(), opt.state_dict()))


def assert_param_is_quantized_latent(opt):
    """The invariant: ``param == round(level × scale)`` of the codes of (latent, scale)."""
    for group in opt.param_groups:
        for param in group["params"]:
            if group["bits"] is not None:
                state, levels = opt.state[param], blaq.levels_for(group["codebook"], group["bits"])
                expected = ref.fake_quantize(state["latent"], state["scale"], levels,
                                             group["group_size"])
                assert torch.equal(param, expected.to(param.dtype))


def equations_step(grads, latent, exp_avg, exp_avg_sq, scale, t, a, levels, hyper):
    """One step for one tensor from the equation-level ops. ``grads(weight)`` is the loss's gradient.
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
        for actual, expected in ((state["latent"], latent), (state["exp_avg"], m),
                                 (state["exp_avg_sq"], v), (state["scale"], scale), (weight, param)):
            torch.testing.assert_close(actual.detach(), expected, rtol=2e-5, atol=1e-6)
        assert state["step"].item() == t
        latent, m, v, scale = (state[k].clone() for k in ("latent", "exp_avg", "exp_avg_sq", "scale"))
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
    with pytest.raises(RuntimeError, match=r"step\(closure\).*trial_step\(\).*one_pass.*backtrack=1"):
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

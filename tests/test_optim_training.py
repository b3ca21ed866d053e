"""blaq.BLAQ in training loops as people write them: schedulers, mixed precision, clipping."""

import logging

import numpy as np
import pytest
import torch
from small_network import (
    assert_param_is_quantized_latent,
    assert_same,
    make_batch,
    make_closure,
    make_model,
    make_optimizer,
    snapshot,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import blaq
import blaq_kernels


def test_groups_without_bits_are_adamw_bit_for_bit():
    model, other = make_model(), make_model()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    opt = blaq.BLAQ(blaq.param_groups(model, bits="fp"), **options)
    adamw = torch.optim.AdamW(other.parameters(), fused=True, **options)
    for _ in range(4):
        opt.step(make_closure(model, opt))
        adamw.step(make_closure(other, adamw))
    assert opt.evaluations_per_step == 1
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_gradients_of_the_rest_blend_as_those_of_quantized_weights():
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    expected = bias.detach().clone()
    opt = blaq.BLAQ([{"params": [weight], "bits": 1}, {"params": [bias]}], lr=0.1, backtrack=0.7)
    x, seen = torch.randn(6, 4), []

    def closure():
        opt.zero_grad()
        loss = (x @ weight.t() + bias).pow(4).mean()
        loss.backward()
        seen.append(bias.grad.clone())
        return loss

    opt.step(closure)
    adamw = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.0, fused=True)
    expected.grad = 0.7 * seen[0] + (1.0 - 0.7) * seen[1]
    adamw.step()
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(bias.detach(), expected)


@pytest.mark.parametrize("group_size", [0, -1, 7])
def test_8_bit_weights_are_adamw_latents_on_a_uniform_grid(group_size):
    model, other = make_model(), make_model()
    opt = make_optimizer(model, bits=8, group_size=group_size)
    for weight in (model[0].weight, model[5].weight):
        state = opt.state[weight]
        groups = blaq.levels_for("linear", 8)
        assert len(groups) == 128
        error = (weight - state["latent"]).abs()
        assert error.max() <= state["scale"].max() / 254 * (1 + 1e-5)
        assert weight.detach().abs().max() == state["latent"].abs().max()
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    with torch.no_grad():
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            b.copy_(a)
    make_closure(model, opt)()
    opt.step()
    make_closure(other, adamw)()
    latents = [opt.state[p].get("latent", p).detach() for p in model.parameters()]
    with torch.no_grad():
        for b, start in zip(other.parameters(), make_model().parameters(), strict=True):
            b.copy_(start)
    adamw.step()
    assert_same(latents, [p.detach() for p in other.parameters()])
    assert_param_is_quantized_latent(opt)


def independent_laq(grad, latent, m, v, t, lr=0.05, beta1=0.9, beta2=0.99, eps=1e-6):
    """One bit, one scale: LAQ as Hou & Kwok state it, in NumPy's float32."""
    f = np.float32
    m = f(beta1) * m + f(1 - beta1) * grad
    v = f(beta2) * v + f(1 - beta2) * (grad * grad)
    d = np.sqrt(v * f(1 / (1 - beta2**t))) + f(eps)
    latent = latent - f(lr / (1 - beta1**t)) * m / d
    alpha = f((d.astype(float) * abs(latent.astype(float))).sum() / d.astype(float).sum())
    return np.where(latent < 0, -alpha, alpha), latent, m, v


def test_backtrack_1_is_laq_bit_for_bit():
    torch.manual_seed(0)
    weight, wanted = nn.Parameter(torch.randn(7, 9)), torch.randn(7, 9)
    latent, m, v = weight.detach().numpy().copy(), np.float32(0.0), np.float32(0.0)
    opt = blaq.BLAQ([{"params": [weight], "bits": 1}], lr=0.05, betas=(0.9, 0.99), eps=1e-6,
                    backtrack=1.0)
    # The reference's float32 root is torch's, which does not round correctly: not the same bits.
    native = blaq_kernels.serving()["fused_step"].startswith("C++")
    exact = {"rtol": 0.0, "atol": 0.0} if native else {}
    for t in range(1, 9):
        opt.zero_grad()
        (weight - wanted).pow(4).sum().backward()
        grad = weight.grad.numpy().copy()
        opt.step()
        expected, latent, m, v = independent_laq(grad, latent, m, v, t)
        assert torch.equal(weight.detach().sign(), torch.from_numpy(expected).sign())
        # The scale is a sum: the order of adding is the kernel's own, and may move the last bit.
        torch.testing.assert_close(weight.detach(), torch.from_numpy(expected), rtol=2**-22, atol=0.0)
        torch.testing.assert_close(opt.state[weight]["latent"], torch.from_numpy(latent), **exact)


def test_one_bit_does_not_depend_on_max_iter():
    runs = []
    for max_iter in (1, 50):
        model = make_model()
        opt = make_optimizer(model, bits=1, max_iter=max_iter)
        for _ in range(4):
            opt.step(make_closure(model, opt))
        runs.append([p.detach() for p in model.parameters()])
    assert_same(*runs)


def test_one_pass_blends_recursively_and_begins_as_laq():
    torch.manual_seed(0)
    start, wanted = torch.randn(5, 6), torch.randn(5, 6)
    weight, laq_weight = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.05, "clip": 1.0}
    opt = blaq.BLAQ([{"params": [weight], "bits": 1}], one_pass=True, backtrack=0.6, **options)
    laq = blaq.BLAQ([{"params": [laq_weight], "bits": 1}], backtrack=1.0, **options)
    blended = None
    for t in range(1, 5):
        before = {k: v.clone() for k, v in opt.state[weight].items()}
        weight.grad = 4 * (weight.detach() - wanted).pow(3)
        grad = weight.grad.clone()
        opt.step()
        if t == 1:
            laq_weight.grad = grad.clone()
            laq.step()
            assert torch.equal(weight, laq_weight)
            blended = grad
        else:
            copy = weight.detach().clone()
            torch.ops.blaq.fused_step(
                [copy], [blended], [grad], [before["latent"]], [before["exp_avg"]],
                [before["exp_avg_sq"]], [before["scale"]], torch.tensor(0.05, dtype=torch.float64),
                torch.tensor(float(t)), torch.tensor(0.6, dtype=torch.float64), 0.9, 0.999, 1e-8,
                0.0, 1.0, [1.0], 0, 5, "alternating")
            assert torch.equal(weight, copy)
            blended = 0.6 * blended + (1.0 - 0.6) * grad
        assert torch.equal(opt.state[weight]["blended"], blended)


SCHEDULERS = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
    "warm-up from 0": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: t / 4),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=10),
    "one cycle, no momentum": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.01, total_steps=10, cycle_momentum=False),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_schedulers(name, lr):
    model = make_model()
    opt = make_optimizer(model, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
    scheduler = SCHEDULERS[name](opt)
    rates = set()
    for _ in range(5):
        loss = opt.step(make_closure(model, opt))
        rates.add(float(opt.param_groups[0]["lr"]))
        scheduler.step(*([1.0 + len(rates)] if name == "plateau" else []))
        assert loss.isfinite()
    assert len(rates) > 1
    assert_param_is_quantized_latent(opt)


def test_lr_may_be_a_tensor_and_each_group_has_its_own():
    runs = []
    for rates in ((0.02, 0.001), (torch.tensor(0.02, dtype=torch.float64),
                                  torch.tensor(0.001, dtype=torch.float64))):
        model = make_model()
        groups = blaq.param_groups(model, bits=1)
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
        opt = blaq.BLAQ(groups, lr=123.0)
        for _ in range(3):
            opt.step(make_closure(model, opt))
        runs.append([p.detach() for p in model.parameters()])
    assert_same(*runs)


def test_groups_added_later_are_quantized_at_once_and_train():
    model = make_model()
    head = nn.Linear(3, 3, bias=False)
    opt = make_optimizer(model)
    opt.step(make_closure(model, opt))
    opt.add_param_group({"params": [("head.weight", head.weight)], "bits": 3, "lr": 0.1})
    assert_param_is_quantized_latent(opt)
    assert head.weight.unique().numel() <= 8
    before = head.weight.detach().clone()
    full = nn.Sequential(model, head)
    opt.step(make_closure(full, opt))
    assert not torch.equal(head.weight, before)
    assert opt.state[head.weight]["step"].item() == 1
    assert opt.state[model[0].weight]["step"].item() == 2


def poison(model, name, value=float("nan")):
    dict(model.named_parameters())[name].grad.view(-1)[1] = value


@pytest.mark.parametrize("name", ["5.weight", "7.weight", "1.bias"])
@pytest.mark.parametrize("at", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_gradient_that_is_not_finite_raises_or_skips(name, at, value):
    for policy in ("raise", "skip"):
        model, calls = make_model(), []
        opt = make_optimizer(model, on_nonfinite=policy)
        closure = make_closure(model, opt, calls)
        opt.step(closure)

        def poisoned(calls=calls, closure=closure, model=model):
            loss = closure()
            if len(calls) == 2 + at:
                poison(model, name, value)
            return loss

        before = snapshot(model, opt)
        if policy == "raise":
            with pytest.raises(RuntimeError, match=f"gradient of '{name}' must be finite.*nothing"):
                opt.step(poisoned)
        else:
            opt.step(poisoned)
            assert opt.skipped == 1
        after = snapshot(model, opt)
        assert_same(after[1], before[1])
        assert_same([p.detach() for p in model.parameters()],
                    [before[0][n] for n, _ in model.named_parameters()])
        opt.step(closure)
        assert opt.skipped == (policy == "skip")
        assert opt.state[model[5].weight]["step"].item() == 2


def test_one_pass_skips_without_touching_its_blend():
    model = make_model()
    opt = make_optimizer(model, one_pass=True, on_nonfinite="skip")
    closure = make_closure(model, opt)
    for bad_step in (0, 2):
        for i in range(3):
            closure()
            before = snapshot(model, opt)[1]
            if i == bad_step:
                poison(model, "5.weight")
            opt.step()
            assert i != bad_step or opt.skipped
            if i == bad_step:
                assert_same(opt.state_dict(), before)
    assert opt.state[model[5].weight]["blended"].isfinite().all()


def scaled_step(model, opt, scaler, clip=None, gain=1.0):
    """A step of both evaluations with a GradScaler; returns both losses."""
    x, y = make_batch()
    opt.zero_grad()
    loss = gain * cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    if opt.evaluations_per_step == 2:
        opt.trial_step(grad_scale=scaler.get_scale())
        with blaq.trial_pass(model):
            scaler.scale(gain * cross_entropy(model(x), y)).backward()
    if clip is not None:
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(opt)
    scaler.update()
    return loss


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("options", [{}, {"backtrack": 1.0}, {"one_pass": True}])
def test_grad_scaler_scales_and_unscales_without_a_trace(options, unscale):
    model, plain = make_model(), make_model()
    opt, other = make_optimizer(model, **options), make_optimizer(plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        scaled_step(model, opt, scaler, clip=1e9 if unscale else None)
        other.step(make_closure(plain, other))
    assert scaler.get_scale() == 2.0**10
    # A power of two scales exactly, save where a float32 gradient would be subnormal.
    assert_same(snapshot(model, opt), snapshot(plain, other))


@pytest.mark.parametrize("options", [{}, {"backtrack": 1.0}, {"one_pass": True}])
def test_grad_scaler_backs_off_from_an_overflow_and_nothing_changes(options):
    model = make_model()
    opt = make_optimizer(model, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_step(model, opt, scaler)
    before = snapshot(model, opt)
    scaled_step(model, opt, scaler, gain=1e37)
    after = snapshot(model, opt)
    assert scaler.get_scale() == 2.0**9 and opt.skipped == 1
    assert_same(after[1], before[1])
    assert_same([p.detach() for p in model.parameters()],
                [before[0][name] for name, _ in model.named_parameters()])


def test_grad_scaler_without_the_scale_of_the_trial_is_an_error():
    model = make_model()
    opt = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu")
    x, y = make_batch()
    scaler.scale(cross_entropy(model(x), y)).backward()
    opt.trial_step()
    scaler.scale(cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match=r"grad_scale=scaler.get_scale\(\)"):
        scaler.step(opt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_train_from_float32_latents(dtype):
    model, calls = make_model(dtype=dtype), []
    opt = make_optimizer(model, lr=1e-2)
    for _ in range(25):
        opt.step(make_closure(model, opt, calls))
    assert calls[-2] < 0.7 * calls[0]
    assert_param_is_quantized_latent(opt)
    bias = model[5].bias
    assert torch.equal(bias, opt.state[bias]["latent"].to(dtype))


def test_bfloat16_autocast():
    model, calls = make_model(), []
    opt = make_optimizer(model)
    inner = make_closure(model, opt, calls)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner()

    for _ in range(30):
        opt.step(closure)
    assert calls[-2] < 0.6 * calls[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_param_is_quantized_latent(opt)


def test_clipping_in_the_closure_reaches_both_evaluations():
    model, norms = make_model(), []
    opt = make_optimizer(model)
    inner = make_closure(model, opt)

    def closure():
        loss = inner()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item())
        return loss

    opt.step(closure)
    assert len(norms) == 2 and min(norms) > 1e-3
    moments = torch.cat([opt.state[p]["exp_avg"].flatten() for p in model.parameters()])
    assert moments.norm() <= 0.1 * 1e-3 * (1 + 1e-4)  # (1 - β1) times the norm of the blend


def test_a_compiled_model_trains_as_the_eager_one():
    model, other = make_model(), make_model()
    compiled = torch.compile(other, backend="aot_eager")
    opt = make_optimizer(model)
    twin = make_optimizer(compiled)
    assert [g["param_names"] for g in twin.param_groups] == [g["param_names"] for g in
                                                             opt.param_groups]
    for _ in range(3):
        opt.step(make_closure(model, opt))
        twin.step(make_closure(compiled, twin))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_step_hooks_and_repr():
    model, seen = make_model(), []
    opt = make_optimizer(model)
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.step(make_closure(model, opt))
    assert seen == ["pre", "post"]
    assert "BLAQ" in repr(opt) and "backtrack: 0.6" in repr(opt) and "bits: 2" in repr(opt)


def test_gradients_of_any_stride_are_taken():
    start = torch.randn(4, 4)
    runs = []
    for transform in (lambda g: g, lambda g: g.t().contiguous().t(),
                      lambda g: torch.stack([g, g], -1)[..., 0]):
        weight, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        opt = blaq.BLAQ([{"params": [weight], "bits": 1}, {"params": [plain]}], backtrack=1.0)
        weight.grad = transform(start.cos())
        plain.grad = transform(start.sin())
        opt.step()
        runs.append([weight.detach(), plain.detach()])
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_a_sparse_gradient_is_an_error_and_changes_nothing():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4))
    opt = blaq.BLAQ(blaq.param_groups(model), backtrack=1.0)
    before = snapshot(model, opt)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"blaq\.BLAQ\.step: grad must be dense, got torch.sparse"):
        opt.step()
    assert_same(snapshot(model, opt), before)


def test_an_optimizer_that_quantizes_nothing_says_so(caplog):
    with caplog.at_level(logging.WARNING, "blaq"):
        blaq.BLAQ(make_model().parameters())
    assert "blaq.param_groups(model, bits=1)" in caplog.text

"""Every op of torch.ops.blaq through the dispatcher: opcheck, composition, gradients, compile."""

import pytest
import torch
from torch.library import opcheck

import blaq_kernels  # noqa: F401
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

CODEBOOKS = [("binary", 1), ("pow2", 2), ("ternary", 2), ("pow2", 3), ("pow2", 4)]
GROUPS = [0, -1, 5]
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0}


def make_state(shapes, levels, group_size, dtype=torch.float32, seed=0):
    """Tensor lists of a step op in a state that training could have reached."""
    torch.manual_seed(seed)
    latents = [torch.randn(s) * 0.3 for s in shapes]
    pairs = [ref.solve(w, torch.ones_like(w), None, levels, group_size, 5, "alternating")
             for w in latents]
    scales = [scale for _, scale in pairs]
    params = [ref.dequantize(c, s, levels, group_size).to(dtype) for c, s in pairs]
    return {"params": params, "grads": [torch.randn(s).to(dtype) for s in shapes],
            "trial_grads": [torch.randn(s).to(dtype) for s in shapes], "latents": latents,
            "exp_avgs": [0.1 * torch.randn(s) for s in shapes],
            "exp_avg_sqs": [torch.rand(s) for s in shapes], "scales": scales}


def tail(levels, group_size, method="alternating"):
    return {**HYPER, "levels": levels, "group_size": group_size, "max_iter": 5, "method": method,
            "lr": torch.tensor(0.01), "step": torch.tensor(3.0)}


def trial_arguments(state, levels, group_size, method="alternating"):
    lists = {k: v for k, v in state.items() if k != "trial_grads"}
    return {**lists, **tail(levels, group_size, method)}


def packed_weight(n, k, name, bits, group_size, seed=0):
    torch.manual_seed(seed)
    levels = levels_of(name, bits)
    w = torch.randn(n, k)
    codes, scale = ref.solve(w, torch.ones_like(w), None, levels, group_size, 5, "alternating")
    return ref.pack(codes, bits), scale, levels


OPCHECK_CASES = {
    "scaled_update": lambda: ((torch.randn(3, 5), torch.randn(3, 5), torch.rand(3, 5) + 0.1), {}),
    "blend": lambda: ((torch.randn(7), torch.randn(7), 0.6), {}),
    "solve": lambda: ((torch.randn(3, 7), torch.rand(3, 7), None, [0.5, 1.0], 5, 5, "exact"), {}),
    "fused_trial": lambda: ((), trial_arguments(make_state([(3, 7), (4,)], (0.5, 1.0), -1),
                                                [0.5, 1.0], -1)),
    "fused_step": lambda: ((), {**make_state([(3, 7), (4,)], (0.5, 1.0), 0),
                                **tail([0.5, 1.0], 0), "backtrack": torch.tensor(0.6),
                                "flips": torch.zeros(2, dtype=torch.int64)}),
    "fake_quantize": lambda: ((torch.randn(3, 7, requires_grad=True),
                               torch.rand(3, 1).requires_grad_(), [0.5, 1.0], -1), {}),
    "pack": lambda: ((torch.randint(0, 4, (3, 13), dtype=torch.uint8), 2), {}),
    "unpack": lambda: ((*packed_weight(3, 13, "pow2", 2, 5), 5, 13, torch.bfloat16), {}),
    "packed_linear": lambda: ((torch.randn(2, 13, requires_grad=True),
                               *packed_weight(3, 13, "pow2", 2, 5)[:2], torch.randn(3),
                               [0.5, 1.0], 5), {}),
    "packed_conv2d": lambda: ((torch.randn(2, 4, 6, 5, requires_grad=True),
                               *packed_weight(6, 18, "pow2", 2, -1)[:2], torch.randn(6), [0.5, 1.0],
                               -1, [3, 3], [2, 1], [1, 0], [1, 2], 2), {"relu": True}),
    "conv_repack": lambda: ((packed_weight(6, 18, "pow2", 2, 0)[0], 18, 9, 2), {}),
    "unrepack": lambda: ((torch.ops.blaq.repack(packed_weight(6, 18, "pow2", 2, 0)[0]), 2, 6, 18), {}),
    "binary_repack": lambda: ((packed_weight(6, 18, "pow2", 1, 0)[0], 18, 9, 2), {}),
    "binary_linear": lambda: ((torch.randn(2, 70, requires_grad=True),
                               *packed_weight(3, 70, "pow2", 1, 64)[:2], torch.randn(3), 64), {}),
    "binary_conv2d": lambda: ((torch.randn(2, 4, 6, 5, requires_grad=True),
                               *packed_weight(6, 18, "pow2", 1, -1)[:2], torch.randn(6), -1, [3, 3],
                               [2, 1], [1, 0], [1, 2], 2), {}),
}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op):
    args, kwargs = OPCHECK_CASES[op]()
    opcheck(getattr(torch.ops.blaq, op).default, args, kwargs)


@pytest.mark.parametrize("with_trial", [True, False], ids=["blaq", "laq"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_fused_ops_equal_their_composition(name, bits, group_size, with_trial):
    levels = levels_of(name, bits)
    state = make_state([(4, 13)], levels, group_size)
    before = {k: v[0].clone() for k, v in state.items()}
    lr, t, a = 0.01, 3.0, 0.6 if with_trial else 1.0

    def moments(g):
        return (0.9 * before["exp_avgs"] + 0.1 * g,
                0.999 * before["exp_avg_sqs"] + (1 - 0.999) * g * g)

    def curvature(v):
        return ((v / (1 - 0.999**t)).sqrt() + 1e-8) / lr

    ops = torch.ops.blaq
    m, v = moments(before["grads"])
    decayed = before["latents"] * (1 - lr * 0.01)
    target = ops.scaled_update(decayed, m / (1 - 0.9**t), curvature(v))
    codes, scale = ops.solve(target, curvature(v), before["scales"], levels, group_size, 5,
                             "alternating")
    ops.fused_trial(**trial_arguments(state, levels, group_size))
    expected = ref.dequantize(codes, scale, levels, group_size)
    torch.testing.assert_close(state["params"][0], expected, rtol=1e-5, atol=1e-7)
    for key in ("latents", "exp_avgs", "exp_avg_sqs", "scales", "grads"):
        assert torch.equal(state[key][0], before[key]), key

    g = ops.blend(before["grads"], before["trial_grads"], a)
    d = ops.blend(curvature(v), curvature(moments(before["trial_grads"])[1]), a)
    m, v = moments(g)
    target = ops.scaled_update(decayed, m / (1 - 0.9**t), d).clamp(-1, 1)
    codes, scale = ops.solve(target, d, before["scales"], levels, group_size, 5, "alternating")
    if not with_trial:
        state["trial_grads"] = []
    flips = torch.full((1,), -1)
    ops.fused_step(**state, **tail(levels, group_size), backtrack=torch.tensor(a), flips=flips)
    torch.testing.assert_close(state["latents"][0], target, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avgs"][0], m, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sqs"][0], v, rtol=1e-5, atol=1e-7)
    new_codes = ref.quantize_codes(state["latents"][0], state["scales"][0], levels, group_size)
    shipped = ref.dequantize(new_codes, state["scales"][0], levels, group_size)
    assert torch.equal(state["params"][0], shipped)
    torch.testing.assert_close(shipped, ref.dequantize(codes, scale, levels, group_size),
                               rtol=1e-5, atol=1e-7)
    old = ref.quantize_codes(before["latents"], before["scales"], levels, group_size)
    assert flips.item() == (new_codes != old).sum().item()


def test_found_inf_skips_and_takes_back_the_trial():
    levels = (0.5, 1.0)
    state = make_state([(4, 13)], levels, 0)
    before = {k: v[0].clone() for k, v in state.items()}
    torch.ops.blaq.fused_trial(**trial_arguments(state, levels, 0))
    flips = torch.ones(1, dtype=torch.int64)
    torch.ops.blaq.fused_step(**state, **tail(levels, 0), backtrack=torch.tensor(0.6), flips=flips,
                              found_inf=torch.ones(1))
    for key, value in before.items():
        assert torch.equal(state[key][0], value), key
    assert flips.item() == 0


def test_grad_scale_divides_the_gradients():
    levels = (1.0,)
    plain, scaled = make_state([(4, 8)], levels, 0), make_state([(4, 8)], levels, 0)
    scaled["grads"][0] *= 1024
    scaled["trial_grads"][0] *= 1024
    common = {**tail(levels, 0), "backtrack": torch.tensor(0.6)}
    torch.ops.blaq.fused_step(**plain, **common)
    torch.ops.blaq.fused_step(**scaled, **common, grad_scale=torch.tensor(1024.0))
    assert torch.equal(plain["latents"][0], scaled["latents"][0])
    assert torch.equal(plain["params"][0], scaled["params"][0])


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_packed_linear_gradients(name, bits, group_size):
    qweight, scale, levels = packed_weight(3, 13, name, bits, group_size)
    x = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    scale = scale.double().requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s, b: torch.ops.blaq.packed_linear(x, qweight, s, b, levels, group_size),
        (x, scale, bias))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("group_size", GROUPS)
def test_packed_conv2d_gradients(group_size, relu):
    qweight, scale, levels = packed_weight(4, 18, "pow2", 3, group_size)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    scale = scale.double().requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s, b: torch.ops.blaq.packed_conv2d(
            x, qweight, s, b, levels, group_size, [3, 3], [2, 1], [1, 1], [1, 2], 2, relu=relu),
        (x, scale, bias))


def test_fake_quantize_is_straight_through():
    latent = torch.randn(3, 7, requires_grad=True)
    scale = torch.rand(3, 1).requires_grad_()
    levels = (0.5, 1.0)
    out = torch.ops.blaq.fake_quantize(latent, scale, levels, -1)
    weight = torch.randn(3, 7)
    (out * weight).sum().backward()
    assert torch.equal(latent.grad, weight)
    values = (out / scale).detach()
    torch.testing.assert_close(scale.grad, (weight * values).sum(1, keepdim=True))


def test_fullgraph_compile_of_packed_ops():
    qweight, scale, levels = packed_weight(6, 18, "pow2", 2, -1)
    fc, fc_scale, _ = packed_weight(3, 6, "pow2", 2, -1)

    def model(x):
        y = torch.ops.blaq.packed_conv2d(x, qweight, scale, None, levels, -1, [3, 3], [1, 1],
                                         [1, 1], [1, 1], 1)
        return torch.ops.blaq.packed_linear(y.relu().mean((2, 3)), fc, fc_scale, None, levels, -1)

    x = torch.randn(2, 2, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_fullgraph_compile_of_binary_ops():
    qweight, scale, _ = packed_weight(6, 18, "pow2", 1, -1)
    fc, fc_scale, _ = packed_weight(3, 6, "pow2", 1, -1)

    def model(x):
        y = torch.ops.blaq.binary_conv2d(x, qweight, scale, None, -1, [3, 3], [1, 1], [1, 1], [1, 1], 1)
        return torch.ops.blaq.binary_linear(y.mean((2, 3)), fc, fc_scale, None, -1)

    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    gradients = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, model)]
    torch.testing.assert_close(*gradients)

"""The CUDA training kernels against the truth, in the host emulation or on a GPU."""

from functools import partial

import pytest
import torch
from cuda_emulation import ORDERS, needs_compiler
from cuda_steps import ON_GPU, all_long, cut, fields, kernels  # noqa: F401 (fixtures)
from step_state import (
    CODEBOOKS,
    DEVICE,
    DTYPES,
    FEW,
    REFERENCE,
    STATE,
    both_stages,
    make_state,
    scalar,
    tail,
)

from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of
from blaq_kernels import step_ops
from blaq_kernels.cuda import call, plan
from blaq_kernels.cuda import solve as solve_op
from blaq_kernels.cuda.fused import ENGINE

pytestmark = [needs_compiler, pytest.mark.usefixtures("kernels")]
fused_trial, fused_step = (partial(op, ENGINE) for op in (step_ops.fused_trial, step_ops.fused_step))
CUDA = (fused_trial, fused_step)
solve = partial(solve_op.solve, ref.solve)
SHAPES = [(3, 1401), (4500,), (7,), (0, 4), (2, 3, 5, 5)]


def curvature_of(state, i, a=0.6):
    """D of Eq. 10 before the step, in the reference's words."""
    beta1, beta2, eps, step = 0.9, 0.999, 1e-8, 3.0
    moments = state["exp_avgs"][i], state["exp_avg_sqs"][i]
    found = [ref._curvature(ref._moments(state[name][i].float(), *moments, beta1, beta2)[1], step,
                            beta2, eps) for name in ("grads", "trial_grads")]
    return ref.blend(*found, a)


def triples(state):
    return zip(state["params"], state["latents"], state["scales"], strict=True)


def assert_like_reference(actual, expected, before, levels, group_size):
    """Latents and moments within float32's rounding; params and flips exactly those of (latent,
    scale);
    of the scales the objective: within 0.1 % of the optimum, or of where the alternation ends."""
    for key in ("latents", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(actual[1][key], expected[1][key], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for i, (param, w, scale) in enumerate(triples(actual[1])):
        codes = ref.quantize_codes(w, scale, levels, group_size)
        assert torch.equal(param, ref.dequantize(codes, scale, levels, group_size).to(param.dtype))
        old = ref.quantize_codes(before["latents"][i], before["scales"][i], levels, group_size)
        assert actual[2][i] == (codes != old).sum()
        d = curvature_of(before, i)
        best = expected[1]["scales"][i]
        found, least = (ref.objective(w, d, ref.quantize_codes(w, x, levels, group_size), x, levels,
                                      group_size) for x in (scale, best))
        groups = ref.to_groups(w, group_size)
        slack = 1e-3 + 5 / groups.shape[1] if w.numel() else 0.0  # bins are for many weights
        assert (found <= least * (1 + slack) + 1e-13).all(), found / least
        if len(levels) == 1:
            torch.testing.assert_close(scale, best, rtol=1e-6, atol=0)
    for a, b in zip(actual[0], expected[0], strict=True):  # of a trial, its params
        far = (a.double() - b.double()).abs() > 0.02 * b.double().abs()
        assert far.sum() <= 0.02 * b.numel() or b.numel() < 1000


@pytest.mark.parametrize("turn", range(len(CODEBOOKS)), ids=[f"{n}{b}" for n, b in CODEBOOKS])
def test_both_stages_equal_the_reference(turn, cut):
    """Every codebook twice, with other settings where groups are cut than where they are whole."""
    levels = levels_of(*CODEBOOKS[turn])
    method = ("alternating", "exact")[(turn + cut) % 2]
    group_size, dtype = (-1, 0, 700)[(turn + cut) % 3], DTYPES[(turn // 2 + cut) % 3]
    args = levels, group_size, dtype, method, SHAPES
    assert_like_reference(both_stages(CUDA, *args), both_stages(REFERENCE, *args),
                          make_state(levels, group_size, dtype, SHAPES), levels, group_size)


@pytest.mark.parametrize("dtype,group_size", [*zip(DTYPES, (-1, 0, -1), strict=True)])
def test_every_dtype(dtype, group_size, cut):
    args = levels_of("pow2", 3), group_size, dtype, "exact", [(3, 1000), (3, 1003)]
    assert_like_reference(both_stages(CUDA, *args), both_stages(REFERENCE, *args),
                          make_state(*args[:3], args[4]), *args[:2])


def test_params_of_several_dtypes_in_one_list(all_long):
    levels = levels_of("pow2", 2)
    states = [make_state(levels, -1, torch.float32, SHAPES) for _ in range(2)]
    for state in states:
        for key in ("params", "grads", "trial_grads"):
            state[key] = [x.to(DTYPES[i % 3]) for i, x in enumerate(state[key])]
    for op, state in zip((fused_step, ref.fused_step), states, strict=True):
        op(**state, **tail(levels, -1, "exact"), backtrack=scalar(0.6))
    for key in ("latents", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(*(state[key] for state in states), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for param, w, scale in triples(states[0]):
        codes = ref.quantize_codes(w, scale, levels, -1)
        assert torch.equal(param, ref.dequantize(codes, scale, levels, -1).to(param.dtype))


@pytest.mark.skipif(ON_GPU, reason="it compares bits with a CPU's")
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("a", [0.6, 1.0])
def test_state_has_the_bits_of_the_cpu_kernels(a, clip, all_long):
    """IEEE's operations in the order of csrc/update.h, on either."""
    levels = levels_of("pow2", 2)
    states = [make_state(levels, 0, torch.bfloat16, [(3, 1401), (77,)]) for _ in range(2)]
    for op, state in zip((fused_step, torch.ops.blaq.fused_step), states, strict=True):
        op(**state, **tail(levels, 0) | {"clip": clip}, backtrack=scalar(a),
           grad_scale=scalar([8.0]))
    for key in ("latents", "exp_avgs", "exp_avg_sqs"):
        for x, y in zip(*(state[key] for state in states), strict=True):
            assert torch.equal(x, y), key


@pytest.mark.parametrize("name,bits,method", [("binary", 1, "exact"), ("linear", 4, "alternating"),
                                              ("linear", 4, "exact")])
def test_the_same_input_gives_the_same_bits(name, bits, method, cut, kernels):  # noqa: F811
    """Also where threads and blocks take turns in another order."""
    args = levels_of(name, bits), 0, torch.bfloat16, method, [(5000,), (3, 1403)]
    found = []
    for order in ORDERS:
        kernels(order)
        found.append(both_stages(CUDA, *args))
    for other in found[1:]:
        for key in STATE:
            for a, b in zip(found[0][1][key], other[1][key], strict=True):
                assert torch.equal(a, b)
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], other[0], strict=True))
        assert torch.equal(found[0][2], other[2])


@pytest.mark.parametrize("name,bits", [("binary", 1), ("pow2", 3)])
def test_found_inf_skips(name, bits, cut):
    levels = levels_of(name, bits)
    state = make_state(levels, 0, torch.bfloat16, [(3, 1401), (50,)])
    before = {key: [x.clone() for x in state[key]] for key in STATE}
    state["grads"][0].fill_(float("inf"))
    more = tail(levels, 0, found_inf=scalar([1.0]))
    fused_trial(**{k: v for k, v in state.items() if k != "trial_grads"}, **more)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in
               zip(state["params"], before["params"], strict=True))
    flips = torch.full((2,), -1, device=DEVICE)
    fused_step(**state, **more, backtrack=scalar(0.6), flips=flips)
    assert flips.tolist() == [0, 0]
    for key in STATE[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state[key], before[key], strict=True))
    for param, w, scale in triples(state):
        codes = ref.quantize_codes(w, scale, levels, 0)
        assert torch.equal(param, ref.dequantize(codes, scale, levels, 0).to(param.dtype))


def test_backtrack_1_is_laq_whatever_the_trial_said(cut):
    levels = levels_of("pow2", 2)
    blaq, laq = (make_state(levels, 0, torch.float32, [(3000,)]) for _ in range(2))
    blaq["trial_grads"][0].fill_(float("nan"))
    laq["trial_grads"] = []
    for state in (blaq, laq):
        fused_step(**state, **tail(levels, 0), backtrack=scalar(1.0))
    for key in STATE:
        assert torch.equal(blaq[key][0], laq[key][0]), key


@pytest.mark.parametrize("step", [1.0, 2.0, 40.0, 1e3, 1e6])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9999)])
def test_scalars_may_be_float64_and_bias_correction_does_not_cancel(step, betas, all_long):
    levels = [1.0]
    states = [make_state(levels, -1, torch.float32, [(4, 8)]) for _ in range(2)]
    more = tail(levels, -1) | {"step": scalar(step, torch.float64), "beta1": betas[0],
                               "beta2": betas[1], "lr": scalar(0.01, torch.float64)}
    for op, state in zip((fused_step, ref.fused_step), states, strict=True):
        op(**state, **more, backtrack=scalar(0.6, torch.float64))
    for a, b in zip(states[0]["latents"], states[1]["latents"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("method", ["alternating", "exact"])
def test_a_step_on_nonfinite_gradients_ends(method, bad, cut):
    levels = levels_of("pow2", 3)
    state = make_state(levels, 0, torch.float32, [(3000,), (3000,)])
    alone = {key: [x.clone() for x in value] for key, value in state.items()}
    state["grads"][0][1500] = bad
    for lists in (state, alone):
        fused_step(**lists, **tail(levels, 0, method), backtrack=scalar(0.6))
    assert not state["exp_avg_sqs"][0].isfinite().all()
    assert torch.equal(alone["params"][1], state["params"][1])


@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_tensors(offset, all_long):
    """Beginnings that 16-byte accesses do not fit give the numbers of those that they fit."""
    levels = levels_of("pow2", 3)
    state, moved = (make_state(levels, -1, torch.bfloat16, [(3, 1001)]) for _ in range(2))
    for tensors in moved.values():
        memory = torch.empty(tensors[0].numel() + offset, dtype=tensors[0].dtype, device=DEVICE)
        tensors[0] = memory[offset:].view(tensors[0].shape).copy_(tensors[0])
    for lists in (state, moved):
        fused_step(**lists, **tail(levels, -1), backtrack=scalar(0.6))
    for key in STATE:
        assert torch.equal(state[key][0], moved[key][0]), key


def test_a_scale_far_from_the_last_is_found_in_two_steps(all_long):
    """Beyond the window around the last scale bins are octaves: the first step finds the place."""
    levels = levels_of("pow2", 3)
    for wrong in (1e-12, 1e12):
        state = make_state(levels, 0, torch.float32, [(9000,)])
        state["scales"][0].fill_(wrong)
        still = tail(levels, 0, "exact") | {"lr": scalar(0.0), "clip": 0.0}
        for _ in range(2):
            fused_step(**state, **still, backtrack=scalar(1.0))
        d = ref._curvature(state["exp_avg_sqs"][0], 3.0, 0.999, 1e-8)
        w = state["latents"][0]
        best = ref.solve(w, d, None, levels, 0, 5, "exact")
        found = ref.objective(w, d, ref.quantize_codes(w, state["scales"][0], levels, 0),
                              state["scales"][0], levels, 0)
        assert found <= ref.objective(w, d, *best, levels, 0) * 1.001


# solve


def weights_to_search(n, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, generator=generator)

    return torch.stack([normal(), torch.rand(n, generator=generator) - 0.5,
                        (3 * normal()).clamp(-1, 1), 0.7 + 1e-5 * normal()]), torch.stack(
                            [torch.ones(n), (2 * normal()).exp(), torch.ones(n), torch.ones(n)])


@pytest.mark.parametrize("name,bits,n", [("pow2", 2, 9_001), ("linear", 4, 9_001),
                                         ("pow2", 4, 9_001), ("linear", 4, 70_000)])
def test_exact_scale_is_within_a_thousandth_of_the_optimum(name, bits, n):
    levels = levels_of(name, bits)
    w, d = (x.to(DEVICE) for x in weights_to_search(n, n))
    codes, scale = solve(w, d, None, levels, -1, 5, "exact")
    best = ref.solve(w, d, None, levels, -1, 5, "exact")
    energy, optimum = (ref.objective(w, d, *x, levels, -1) for x in ((codes, scale), best))
    rounding = 1e-13 * (d.double() * w.double().square()).sum(1)  # of the scale to float32
    assert (energy <= optimum * 1.001 + rounding).all(), energy / optimum


@pytest.mark.parametrize("spread", [2.0**12, 2.0**24])
def test_curvatures_of_all_sizes(spread, all_long):
    """A few large ones, late in the block, do not cost the many small ones their weight."""
    levels, n = levels_of("pow2", 2), 20_000
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, generator=generator).to(DEVICE)
    d = torch.full((n,), 1.0, device=DEVICE)
    count = max(2, int(n / spread))
    w[-count:] *= 3
    d[-count:] = spread if count > 2 else n / 2
    for size in (1e-6, 1.0, 1e30):
        codes, scale = solve(w, d * size, None, levels, 0, 5, "exact")
        best = ref.solve(w, d * size, None, levels, 0, 5, "exact")
        found, least = (ref.objective(w, d, *x, levels, 0) for x in ((codes, scale), best))
        assert found <= least * 1.001


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("group_size", [0, -1])
@pytest.mark.parametrize("name,bits", FEW)
def test_alternating_solve_ends_where_the_reference_does(name, bits, group_size, init):
    """But for the weights that share a bin with a threshold, some hundred of 12000, of which a few
    are on the wrong side in alternations far from where they end."""
    levels = levels_of(name, bits)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(2, 12_007, generator=generator).to(DEVICE)
    d = torch.rand(2, 12_007, generator=generator).to(DEVICE)
    w[0, :9] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e5, -1e5, 1.0, -1.0, 3e-39])
    d[0, :9] = 1e-9
    start = torch.full(ref.scale_shape(w.shape, group_size), 0.7, device=DEVICE) if init else None
    codes, scale = solve(w, d, start, levels, group_size, 5, "alternating")
    best = ref.solve(w, d, start, levels, group_size, 5, "alternating")
    assert torch.equal(codes, ref.quantize_codes(w, scale, levels, group_size))
    torch.testing.assert_close(scale, best[1], rtol=3e-3, atol=0)
    found, least = (ref.objective(w, d, *x, levels, group_size) for x in ((codes, scale), best))
    assert (found <= least * 1.01).all(), found / least


@pytest.mark.parametrize("name,bits", [("binary", 1), ("pow2", 3), ("ternary", 2)])
@pytest.mark.parametrize("method", ["alternating", "exact"])
def test_zeros_have_the_smallest_scale(name, bits, method):
    w = torch.zeros(9000, device=DEVICE)
    codes, scale = solve(w, torch.ones_like(w), None, levels_of(name, bits), 0, 5, method)
    assert scale.item() == ref.SCALE_TINY and not codes.any()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("group_size", [0, -1, 4])
def test_empty_weights_have_a_defined_result(shape, group_size):
    w = torch.empty(shape, device=DEVICE)
    codes, scale = solve(w, w, None, [0.5, 1.0], group_size, 5, "exact")
    assert codes.shape == shape and scale.shape == ref.scale_shape(shape, group_size)
    assert (scale == ref.SCALE_TINY).all()


def test_empty_lists_and_weights():
    for shapes in ([], [(0,)], [(0, 3), (3, 0)]):
        for group_size in (0, -1, 4):
            both_stages(CUDA, [0.5, 1.0], group_size, torch.float32, shapes=shapes)


def test_a_call_has_the_fields_that_kernels_read():
    assert fields() == [call.INTEGERS, call.NUMBERS, plan.COLUMNS]


class Reached(Exception):
    """A call came to the kernels."""


@pytest.fixture
def watched(monkeypatch):
    """Calls stop before a kernel is started."""
    def stop(integers, numbers):
        raise Reached(dict(zip(call.INTEGERS, integers, strict=True)))

    monkeypatch.setattr(call, "emulation", stop)


def positional(state, levels, group_size):
    more = tail(levels, group_size) | {"backtrack": scalar(0.6)}
    names = [a.split()[1].removesuffix(")").split("=")[0]
             for a in call.SCHEMAS["fused_step"].split(", ")]
    return [(state | more).get(name) for name in names]


def test_long_groups_are_for_these_kernels_and_the_rest_is_not(watched):
    from blaq_kernels.cuda import fused_step as module

    def call_with(shapes, group_size):
        return module.fused_step(lambda *_: None, *positional(
            make_state([0.5, 1.0], group_size, torch.float32, shapes), [0.5, 1.0], group_size))

    for shapes, group_size in (([(9000,)], 0), ([(2, 8193)], -1), ([(2, 9000)], 8193)):
        with pytest.raises(Reached):
            call_with(shapes, group_size)
    for shapes, group_size in (([(8192,)], 0), ([(90, 100)], -1), ([(2, 9000)], 128), ([], 0)):
        assert call_with(shapes, group_size) is None
    w = torch.rand(2, 9000, device=DEVICE)
    for group_size, mine in ((0, True), (-1, True), (32, False)):
        args = (lambda *_: "otherwise", w, w, None, [0.5, 1.0], group_size, 5, "exact")
        if mine:
            with pytest.raises(Reached):
                solve_op.solve(*args)
        else:
            assert solve_op.solve(*args) == "otherwise"


def test_bad_arguments_have_the_words_of_the_other_kernels(all_long):
    levels = [0.5, 1.0]
    state = make_state(levels, -1, torch.float32, [(3, 1000), (4,)])
    step = tail(levels, -1) | {"backtrack": scalar(0.6)}
    before = [x.clone() for key in STATE[1:] for x in state[key]]
    cases = [({"lr": scalar([0.1])}, "lr must be a 0-dim tensor, got [1]"),
             ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
             ({"grads": [state["grads"][0]]}, "grads must have as many tensors as params (2), got 1"),
             ({"scales": state["latents"]}, "scales[0] must have shape [3, 1], got [3, 1000]"),
             ({"exp_avgs": state["latents"]}, "must not overlap another tensor of the call")]
    for change, message in cases:
        with pytest.raises(ValueError) as error:
            fused_step(**(state | step | change))
        assert str(error.value).startswith("blaq.fused_step: ") and message in str(error.value)
    assert all(torch.equal(a, b) for a, b in
               zip(before, (x for key in STATE[1:] for x in state[key]), strict=True))

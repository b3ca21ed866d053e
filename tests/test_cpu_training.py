"""The C++ training kernels: the same bits on every instruction set and thread count, and the truth."""

import itertools

import pytest
import torch

import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

VARIANTS = blaq_kernels.cpu_capabilities()
pytestmark = pytest.mark.skipif(not VARIANTS, reason="the C++ kernels are not loaded")
CODEBOOKS = [("binary", 1), ("pow2", 2), ("ternary", 2), ("pow2", 3), ("linear", 4), ("pow2", 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One block is 16384 elements: below, above, and rows that no power of two divides.
SHAPES = [(3,), (7, 33), (130, 129), (2, 3, 5, 5), (0, 4)]
HYPER = {"lr": torch.tensor(0.01), "step": torch.tensor(3.0), "beta1": 0.9, "beta2": 0.999,
         "eps": 1e-8, "weight_decay": 0.01, "clip": 0.5, "max_iter": 5}


@pytest.fixture(autouse=True)
def restored():
    threads, variant = torch.get_num_threads(), blaq_kernels.cpu_capability()
    yield
    torch.set_num_threads(threads)
    blaq_kernels.set_cpu_capability(variant)


def make_state(levels, group_size, dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)

    def normal(shape, size=1.0):
        return size * torch.randn(shape, generator=generator)

    latents = [normal(s, 0.3) for s in shapes]
    scales = [ref.solve(w, torch.ones_like(w), None, levels, group_size, 5, "alternating")[1]
              for w in latents]
    return {"params": [torch.empty(s, dtype=dtype) for s in shapes],
            "grads": [normal(s).to(dtype) for s in shapes],
            "trial_grads": [normal(s).to(dtype) for s in shapes], "latents": latents,
            "exp_avgs": [normal(s, 0.1) for s in shapes],
            "exp_avg_sqs": [normal(s).square() for s in shapes], "scales": scales}


def both_stages(levels, group_size, dtype, method, shapes=SHAPES, ops=torch.ops.blaq):
    """Everything that a trial and a step write."""
    state = make_state(levels, group_size, dtype, shapes)
    tail = {**HYPER, "levels": levels, "group_size": group_size, "method": method}
    flips = torch.full((len(shapes),), -1)
    ops.fused_trial(**{k: v for k, v in state.items() if k != "trial_grads"}, **tail)
    trial = [p.clone() for p in state["params"]]
    ops.fused_step(**state, **tail, backtrack=torch.tensor(0.6), flips=flips)
    written = ("params", "latents", "exp_avgs", "exp_avg_sqs", "scales")
    return [*trial, *(x for key in written for x in state[key]), flips]


def assert_same_bits(actual, expected, what):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        same = a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
        assert same, f"{what}: tensor {i} differs"


@pytest.mark.parametrize("method", ["alternating", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, -1, 20])
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_variants_and_threads_give_the_same_bits(name, bits, group_size, dtype, method):
    levels = levels_of(name, bits)
    expected = None
    for variant in VARIANTS:
        blaq_kernels.set_cpu_capability(variant)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            actual = both_stages(levels, group_size, dtype, method)
            expected = expected or actual
            assert_same_bits(actual, expected, f"{variant}, {threads} threads")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["alternating", "exact"])
def test_a_large_tensor_gives_the_same_bits(variant, method):
    """Many blocks, several histogram parts, and the path that writes past the cache."""
    levels, shapes = levels_of("pow2", 3), [(1100, 1000)]
    torch.set_num_threads(1)
    expected = both_stages(levels, 0, torch.float32, method, shapes)
    blaq_kernels.set_cpu_capability(variant)
    torch.set_num_threads(2)
    assert_same_bits(both_stages(levels, 0, torch.float32, method, shapes), expected, variant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, -1, 20])
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_step_equals_the_reference(name, bits, group_size, dtype):
    """Floats to float32's rounding; codes exactly, but for those on a threshold, which are counted."""
    levels = levels_of(name, bits)
    actual = both_stages(levels, group_size, dtype, "alternating")
    expected = both_stages(levels, group_size, dtype, "alternating", ops=ref)
    n = len(SHAPES)
    for i, (a, b) in enumerate(zip(actual[n:-1], expected[n:-1], strict=True)):
        if i >= n:  # latents, moments, scales
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    params = zip(actual[:2 * n], expected[:2 * n], strict=True)
    far = sum(int(((a.double() - b.double()).abs() > 0.01 * b.double().abs()).sum()) for a, b in params)
    assert far <= 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [0, -1, 7])
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_codes_are_a_pure_function_of_latent_and_scale(name, bits, group_size, variant):
    blaq_kernels.set_cpu_capability(variant)
    levels = levels_of(name, bits)
    w = torch.randn(19, 45)
    w[0, :9] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 1.0, -1.0, 3e-39])
    for method in ("alternating", "exact"):
        codes, scale = torch.ops.blaq.solve(w, torch.rand_like(w), None, levels, group_size, 5, method)
        assert torch.equal(codes, ref.quantize_codes(w, scale, levels, group_size))


@pytest.mark.parametrize("n", [5, 900, 1100, 6000, 70_000])
@pytest.mark.parametrize("name,bits", CODEBOOKS[1:])
def test_exact_is_within_a_thousandth_of_the_optimum(name, bits, n):
    levels = levels_of(name, bits)
    generator = torch.Generator().manual_seed(n)

    def normal():
        return torch.randn(n, generator=generator)

    weights = {"gauss": normal(), "uniform": torch.rand(n, generator=generator) - 0.5,
               "cauchy": (normal() / normal()).clamp(-1e4, 1e4),
               "outliers": torch.where(torch.rand(n, generator=generator) < 0.9, 0.01, 1.0) * normal(),
               "clipped": (3 * normal()).clamp(-1, 1), "pile": 0.7 + 1e-5 * normal()}
    curvatures = {"one": torch.ones(n), "heavy": (2 * normal()).exp()}
    for weight_name, w in weights.items():
        for curvature_name, d in curvatures.items():
            codes, scale = torch.ops.blaq.solve(w, d, None, levels, 0, 5, "exact")
            best_codes, best = ref.solve(w, d, None, levels, 0, 5, "exact")
            energy = ref.objective(w, d, codes, scale, levels, 0)
            optimum = ref.objective(w, d, best_codes, best, levels, 0)
            rounding = 1e-14 * (d * w.square()).sum()  # of the scale to float32
            assert energy <= optimum * 1.001 + rounding, (weight_name, curvature_name)


@pytest.mark.parametrize("group_size", [-1, 33, 100])
@pytest.mark.parametrize("levels", [*(levels_of(*book) for book in CODEBOOKS[1:]), (0.2, 0.6, 1.0)], ids=str)
def test_exact_scale_of_a_short_group_is_the_optimum(levels, group_size):
    w = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    w[10:] /= w[:10].flip(1)  # heavy tails
    w[4], w[5, :150], w[6] = 0.3, 0.0, 2.0 ** (3 * w[6]).round()  # ties and zeros
    d = (2 * torch.randn(20, 300, generator=torch.Generator().manual_seed(2))).exp()
    energy, optimum = (ref.objective(w, d, *op(w, d, None, levels, group_size, 5, "exact"), levels, group_size)
                       for op in (torch.ops.blaq.solve, ref.solve))
    total = ref.to_groups(d * w.square(), group_size).sum(1)
    assert (energy <= optimum * (1 + 1e-6) + 1e-14 * total).all()


@pytest.mark.parametrize("group_size", [0, -1, 20])
@pytest.mark.parametrize("name,bits", CODEBOOKS[1:])
def test_alternation_never_raises_the_objective(name, bits, group_size):
    levels = levels_of(name, bits)
    w, d = torch.randn(30, 600), torch.rand(30, 600) + 0.01
    previous = None
    for max_iter in range(1, 12):
        codes, scale = torch.ops.blaq.solve(w, d, None, levels, group_size, max_iter, "alternating")
        energy = ref.objective(w, d, codes, scale, levels, group_size)
        assert previous is None or (energy <= previous * (1 + 1e-6)).all()
        previous = energy


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_converted_as_torch_does(variant, dtype):
    """Every 16-bit pattern in, and float32 patterns of every exponent out, by blend(a, b, ½)."""
    blaq_kernels.set_cpu_capability(variant)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    other = patterns.flip(0)
    actual = torch.ops.blaq.blend(patterns, other, 0.5)
    expected = (0.5 * patterns.float() + 0.5 * other.float()).to(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_elementwise_ops_round_once(variant, dtype):
    blaq_kernels.set_cpu_capability(variant)
    w, g, d = (torch.randn(4099).to(dtype) for _ in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (w.to(wide) - g.to(wide) / d.to(wide)).to(dtype)
    assert torch.equal(torch.ops.blaq.scaled_update(w, g, d), expected)
    blended = (0.6 * w.to(wide) + (1 - 0.6) * g.to(wide)).to(dtype)
    torch.testing.assert_close(torch.ops.blaq.blend(w, g, 0.6), blended)
    assert torch.equal(torch.ops.blaq.blend(w, g, 1.0), w)


@pytest.mark.parametrize("method", ["alternating", "exact"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [50, 3000, 40_000, 70_000])
def test_a_step_on_nonfinite_gradients_ends(n, bad, method):
    """The op does not look at gradients; what they poison stays in their own tensor."""
    levels = levels_of("pow2", 4)
    state = make_state(levels, 0, torch.float32, [(n,), (n,)])
    clean = {k: v[1].clone() for k, v in state.items()}
    state["grads"][0][n // 2] = bad
    tail = {**HYPER, "levels": levels, "group_size": 0, "method": method}
    torch.ops.blaq.fused_step(**state, **tail, backtrack=torch.tensor(0.6))
    assert not state["exp_avg_sqs"][0].isfinite().all()
    alone = {k: [v] for k, v in clean.items()}
    torch.ops.blaq.fused_step(**alone, **tail, backtrack=torch.tensor(0.6))
    assert torch.equal(alone["params"][0], state["params"][1])


def test_backtrack_1_ignores_the_trial_gradients():
    levels = levels_of("pow2", 2)
    tail = {**HYPER, "levels": levels, "group_size": 0, "method": "exact",
            "backtrack": torch.tensor(1.0)}
    blaq, laq = (make_state(levels, 0, torch.float32) for _ in range(2))
    laq["trial_grads"] = []
    torch.ops.blaq.fused_step(**blaq, **tail)
    torch.ops.blaq.fused_step(**laq, **tail)
    for key in ("params", "latents", "exp_avgs", "exp_avg_sqs", "scales"):
        assert_same_bits(blaq[key], laq[key], key)


def test_overlap_is_found_after_a_call_without_any():
    levels = levels_of("pow2", 2)
    state = make_state(levels, 0, torch.float32)
    tail = {**HYPER, "levels": levels, "group_size": 0, "method": "exact",
            "backtrack": torch.tensor(0.6)}
    for _ in range(3):
        torch.ops.blaq.fused_step(**state, **tail)
    state["latents"][1] = state["exp_avgs"][1]
    with pytest.raises(ValueError, match="must not overlap another tensor of the call"):
        torch.ops.blaq.fused_step(**state, **tail)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0**-100, 2.0**-130, 0.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_on_a_threshold_is_on_the_upper_level(variant, bits, scale):
    """Also where levels are too small for the arithmetic on exponents, and for what is no number."""
    levels = levels_of("pow2", bits)
    factor = torch.tensor(scale, dtype=torch.float32)
    exact = torch.tensor([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)] + [1.0]) * factor
    around = torch.cat([exact, exact.nextafter(torch.zeros(())), exact.nextafter(torch.tensor(9.0))])
    latent = torch.cat([around, -around, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    latent = latent.repeat(7)  # whole registers, and a rest
    thresholds = torch.tensor([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]) * factor
    index = (latent.abs()[:, None] >= thresholds).sum(1)
    value = (torch.tensor(levels) * factor)[index]
    expected = torch.where(latent < 0, -value, value) + 0.0 * (scale == 0)

    blaq_kernels.set_cpu_capability(variant)
    state = {key: [torch.zeros_like(latent)] for key in ("grads", "exp_avgs", "exp_avg_sqs")}
    param = torch.empty_like(latent)
    torch.ops.blaq.fused_step(
        params=[param], latents=[latent], scales=[factor.reshape(1)], trial_grads=[], **state, **HYPER,
        levels=levels, group_size=0, method="exact", backtrack=torch.tensor(1.0),
        found_inf=torch.ones(1))  # a skipped step writes the codes of (latent, scale)
    torch.testing.assert_close(param, expected, rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["trial", "step"])
@pytest.mark.parametrize("last", [0.0, 1e-6, 1e6])
@pytest.mark.parametrize("n", [40_000, 70_000])
def test_a_last_scale_far_off_does_not_mislead_the_exact_method(n, last, stage):
    levels = levels_of("pow2", 4)

    def run(scale):
        state = make_state(levels, 0, torch.float32, [(n,)])
        state["scales"][0].fill_(scale)
        trial_grads = state.pop("trial_grads")
        tail = {**HYPER, "levels": levels, "group_size": 0, "method": "exact"}
        if stage == "trial":
            torch.ops.blaq.fused_trial(**state, **tail)
        else:
            torch.ops.blaq.fused_step(**state, trial_grads=trial_grads, backtrack=torch.tensor(0.6), **tail)
        return state["params"][0]

    torch.testing.assert_close(run(last), run(0.3), rtol=1e-6, atol=0)


def state_of(w, d, scale):
    """Lists that a step without gradients and at lr 0 solves for (w, d), and the rest of its arguments."""
    state = {"params": torch.empty_like(w), "grads": torch.zeros_like(w), "latents": w.clone(),
             "exp_avgs": torch.zeros_like(w), "exp_avg_sqs": d.square(), "scales": scale.clone()}
    return {k: [v] for k, v in state.items()}, {
        "lr": torch.tensor(0.0), "step": torch.tensor(1e6), "beta1": 0.0, "beta2": 0.9999, "eps": 0.0,
        "weight_decay": 0.0, "clip": 0.0, "group_size": 0, "max_iter": 5, "method": "exact"}


def hard_weights(n):
    generator = torch.Generator().manual_seed(n)

    def normal():
        return torch.randn(n, generator=generator)

    place = torch.arange(n)
    heavy = torch.zeros(n)
    heavy[n // 3] = 1e3
    one = torch.ones(n)
    return {"gauss": (normal(), one), "heavy curvature": (normal(), (2 * normal()).exp()),
            "one huge weight": (normal() + heavy, one), "one steep weight": (normal(), one + 100 * heavy),
            "by column": (normal() * 2.0 ** (place % 16 - 8), one),
            "by row": (normal() * 2.0 ** (place // (n // 8) - 4), one),
            "equal": (torch.full((n,), 0.7), one), "zeros": (normal() * (place % 50 == 0), one),
            "all zero": (torch.zeros(n), one), "grid": ((3 * normal()).round() / 7, one)}


@pytest.mark.parametrize("case,name", [(case, ("pow2", "linear")[i % 2])
                                       for i, case in enumerate(hard_weights(8))])
def test_one_pass_keeps_the_last_scale_only_where_it_is_the_best(case, name):
    """Trial and step of a large weight, from near the best scale and from elsewhere."""
    n, levels = 66_000, levels_of(name, 4)
    w, d = hard_weights(n)[case]
    best_codes, best = ref.solve(w, d, None, levels, 0, 5, "exact")
    optimum = ref.objective(w, d, best_codes, best, levels, 0) * 1.001 + 1e-14 * (d * w.square()).sum()
    for factor in (1.0001, 2.0):
        state, tail = state_of(w, d, best * factor)
        torch.ops.blaq.fused_trial(**state, **tail, levels=levels)
        rest = w.double() - state["params"][0].double()
        assert 0.5 * (d * rest.square()).sum() <= optimum, (factor, "trial")
        flips = torch.zeros(1, dtype=torch.int64)
        torch.ops.blaq.fused_step(**state, trial_grads=[], **tail, levels=levels,
                                  backtrack=torch.tensor(1.0), flips=flips)
        scale = state["scales"][0]
        codes = ref.quantize_codes(w, scale, levels, 0)
        assert ref.objective(w, d, codes, scale, levels, 0) <= optimum, (factor, "step")
        assert torch.equal(state["params"][0], ref.dequantize(codes, scale, levels, 0))
        assert flips == (codes != ref.quantize_codes(w, best * factor, levels, 0)).sum()
        if case == "gauss":
            assert torch.equal(scale, best * factor) == (factor == 1.0001)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_gives_the_same_bits_whether_or_not_the_scale_is_kept(dtype):
    """Two steps from a bad scale: the first finds it, the second most often keeps it."""
    levels, shapes, expected = levels_of("pow2", 4), [(300, 333), (257, 511)], None
    for variant, threads in itertools.product(VARIANTS, (1, 3)):
        blaq_kernels.set_cpu_capability(variant)
        torch.set_num_threads(threads)
        state = make_state(levels, 0, dtype, shapes)
        tail = {**HYPER, "levels": levels, "group_size": 0, "method": "exact"}
        written = []
        for _ in range(2):
            torch.ops.blaq.fused_trial(**{k: v for k, v in state.items() if k != "trial_grads"}, **tail)
            written += [p.clone() for p in state["params"]]
            flips = torch.zeros(len(shapes), dtype=torch.int64)
            torch.ops.blaq.fused_step(**state, **tail, backtrack=torch.tensor(0.6), flips=flips)
            written += [flips, *(x.clone() for k in ("params", "latents", "scales") for x in state[k])]
        expected = expected or written
        assert_same_bits(written, expected, f"{variant}, {threads} threads")

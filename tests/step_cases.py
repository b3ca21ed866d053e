"""Lists of weights for the tests of Triton's training kernels, in its interpreter or on a GPU."""

import itertools

import pytest
import torch

from blaq_kernels import reference as ref
from blaq_kernels import triton as kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

from blaq_kernels.triton import fused, launch, plan  # noqa: E402
from blaq_kernels.triton.fused_step import fused_step  # noqa: E402
from blaq_kernels.triton.fused_trial import fused_trial  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not launch.interpreted():
    pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

FEW = [("binary", 1), ("ternary", 2), ("linear", 4), ("pow2", 4)]
CODEBOOKS = [("binary", 1), ("pow2", 2), ("ternary", 2), ("pow2", 3), ("uniform", 3), ("linear", 4),
             ("pow2", 4), ("pow2_zero", 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3,), (5, 33), (0, 4), (2, 3, 5, 5), (4, 64), (6, 0)]
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 0.5, "max_iter": 5}
STATE = ("params", "latents", "exp_avgs", "exp_avg_sqs", "scales")


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Every group longer than 64 elements counts as long, in chunks of 64: many on little data."""
    forget()
    for name, value in (("TILE_LEAST", 64), ("TILE_MOST", 64), ("CHUNK", 64), ("PER_WARP", 64)):
        monkeypatch.setattr(plan, name, value)
    yield
    forget()


def forget():
    """Lists that are known keep the sizes of the tiles that they were planned with."""
    plan.parts.cache_clear()
    fused._known.clear()


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def make_state(levels, group_size, dtype, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(DEVICE)

    latents = [normal(s, 0.3) for s in shapes]
    scales = [ref.solve(w, torch.ones_like(w), None, levels, group_size, 5, "alternating")[1]
              for w in latents]
    return {"params": [torch.empty(s, dtype=dtype, device=DEVICE) for s in shapes],
            "grads": [normal(s).to(dtype) for s in shapes],
            "trial_grads": [normal(s).to(dtype) for s in shapes], "latents": latents,
            "exp_avgs": [normal(s, 0.1) for s in shapes],
            "exp_avg_sqs": [normal(s).square() for s in shapes], "scales": scales}


def tail(levels, group_size, method="alternating", **more):
    return {**HYPER, "lr": scalar(0.01), "step": scalar(3.0), "levels": levels,
            "group_size": group_size, "method": method, **more}


def both_stages(ops, levels, group_size, dtype, method="alternating", shapes=SHAPES, **more):
    """Everything that a trial and a step write: params of the trial, of the step, state, flips."""
    trial_op, step_op = ops
    state = make_state(levels, group_size, dtype, shapes)
    flips = torch.full((len(shapes),), -1, device=DEVICE)
    arguments = tail(levels, group_size, method, **more)
    trial_op(**{k: v for k, v in state.items() if k != "trial_grads"}, **arguments)
    trial = [p.clone() for p in state["params"]]
    step_op(**state, **arguments, backtrack=scalar(0.6), flips=flips)
    return trial, state, flips


TRITON, REFERENCE = (fused_trial, fused_step), (ref.fused_trial, ref.fused_step)


def assert_like_reference(actual, expected, levels, group_size, far_allowed=1):
    """Floats within float32's rounding of a few operations; params exactly those of (latent, scale);
    codes those of the reference, but for ``far_allowed`` weights that lie on a threshold."""
    for key in STATE[1:]:
        for a, b in zip(actual[1][key], expected[1][key], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for param, w, scale in zip(*(actual[1][key] for key in ("params", "latents", "scales")), strict=True):
        codes = ref.quantize_codes(w, scale, levels, group_size)
        assert torch.equal(param, ref.dequantize(codes, scale, levels, group_size).to(param.dtype))
    far = 0
    for a, b in itertools.chain(zip(actual[0], expected[0], strict=True),
                                zip(actual[1]["params"], expected[1]["params"], strict=True)):
        far += int(((a.double() - b.double()).abs() > 0.01 * b.double().abs()).sum())
    assert far <= far_allowed
    assert int((actual[2] - expected[2]).abs().sum()) <= far_allowed

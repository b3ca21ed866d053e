"""Lists of weights for the tests of Triton's training kernels, in its interpreter or on a GPU."""

import itertools

import pytest
import torch
from step_state import (  # noqa: F401 (for its importers)
    CODEBOOKS, DEVICE, DTYPES, FEW, HYPER, REFERENCE, SHAPES, STATE, both_stages, make_state, scalar,
    tail,
)

from blaq_kernels import reference as ref
from blaq_kernels import triton as kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

from blaq_kernels import step_lists  # noqa: E402
from blaq_kernels.triton import launch, plan  # noqa: E402
from blaq_kernels.triton.fused_step import fused_step  # noqa: E402
from blaq_kernels.triton.fused_trial import fused_trial  # noqa: E402

if DEVICE == "cpu" and not launch.interpreted():
    pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

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
    step_lists._known.clear()


TRITON = (fused_trial, fused_step)


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

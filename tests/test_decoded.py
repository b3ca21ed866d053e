"""Layers that multiply by their decoded weight where torch is faster: same results, same rules."""

import pytest
import torch
from quantized import quantize_
from torch import nn
from torch.nn import functional as F

import blaq
import blaq_kernels
from blaq import decoded

pytestmark = pytest.mark.skipif(not blaq_kernels.cpu_capabilities(), reason="needs C++ kernels")


def packed(n, k, dtype=torch.float32, bits=2):
    torch.manual_seed(n)
    return blaq.pack(nn.Sequential(quantize_(nn.Linear(k, n), "pow2", bits)))[0].to(dtype)


def check(layer, x, most):
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert float((layer(x).double() - exact).norm() / exact.norm()) < most


@pytest.mark.parametrize("m", [0, 1, 7, 1200])
@pytest.mark.parametrize("n", [1, 10, 33])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@torch.no_grad()
def test_few_outputs(m, n, dtype, most):
    layer, x = packed(n, 40, dtype), torch.randn(m, 40).to(dtype)
    for _ in range(2):  # as it was made, and as it is kept
        if m:
            check(layer, x, most if decoded.takes_linear(x, n, 40) else 4e-3)
        assert layer(x).shape == (m, n) and layer(x).dtype == dtype
    if dtype == torch.float32:
        assert layer.bytes_repacked == 4 * n * 40
    check(layer.float(), torch.randn(3, 40), 1e-6)


@pytest.mark.parametrize("m, n, bits, dtype, takes", [
    (1024, 127, 1, torch.bfloat16, True), (300, 127, 1, torch.bfloat16, False),
    (256, 200, 2, torch.bfloat16, True), (256, 400, 2, torch.bfloat16, False),
    (32, 80, 2, torch.float32, True), (32, 80, 1, torch.float32, False)])
@torch.no_grad()
def test_tables_of_16_bits_for_few_outputs(m, n, bits, dtype, takes):
    layer, x = packed(n, 200, dtype, bits), torch.randn(m, 200).to(dtype)
    assert decoded.takes_linear(x, n, 200, bits, "high") == takes
    assert not decoded.takes_linear(x, n, 200, bits, "fast")
    check(layer, x, 4e-3 if dtype == torch.bfloat16 else 4e-4)
    assert (layer._kept_decoded is not None) == takes
    layer.accuracy = "fast"
    check(layer, x, 1e-2)
    assert (layer._repacked is not None) == blaq_kernels.has_int8()


def test_other_inputs_meet_the_rules():
    layer, x = packed(10, 40), torch.randn(3, 40)
    result = layer(x)
    with pytest.raises(ValueError, match="PackedLinear: input must have in_features = 40"):
        layer(torch.randn(3, 41))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), result)


def test_gradients_with_the_decoded_weight():
    layer = packed(10, 40)
    reference = layer.to_float()
    for train_scale in (False, True):
        layer.scale.requires_grad_(train_scale)
        x = torch.randn(3, 40, requires_grad=True)
        for _ in range(2):
            layer.zero_grad()
            x.grad = None
            layer(x).square().sum().backward()
        expected = torch.autograd.grad(F.linear(x, reference.weight, layer.bias).square().sum(),
                                       (x, layer.bias))
        torch.testing.assert_close((x.grad, layer.bias.grad), expected, rtol=1e-3, atol=1e-3)
        assert (layer.scale.grad is not None) == train_scale


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        layer = packed(10, 40)
        check(layer, torch.randn(3, 40), 1e-6)
    with torch.no_grad():
        check(layer, torch.randn(3, 40), 1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_every_mode_computes_the_same(mode):
    layer, x = packed(100, 300).requires_grad_(False), torch.randn(9, 300)
    expected = torch.ops.blaq.packed_linear(x, layer.qweight, layer.scale, layer.bias, layer.levels,
                                            layer.group_size, layer.repacked(), layer.accuracy)
    with mode():
        assert torch.equal(layer(x), expected) and not layer(x).requires_grad

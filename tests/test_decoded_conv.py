"""Convolutions by their decoded weight where torch is faster: which, and that all else is as it was."""

import pytest
import torch
from quantized import quantize_
from torch import nn
from torch.nn import functional as F

import blaq
import blaq_kernels
from blaq import decoded_conv
from blaq.commands.inspect import describe

pytestmark = pytest.mark.skipif(blaq_kernels.int8_kernels() != "AVX-512 VNNI",
                                reason="needs the kernels that the others are compared with")
LAST = torch.channels_last


def packed(*args, bits=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return blaq.pack(nn.Sequential(quantize_(nn.Conv2d(*args, **options), "pow2", bits)))[0].to(dtype)


def takes(layer, accuracy="high", dtype=torch.float32):
    return decoded_conv.takes_conv(dtype, layer.weight_shape, layer.groups, layer.bits,
                                   layer.group_size, accuracy)


def test_which_layers_decode():
    meta = {"device": "meta", "levels": (0.5, 1.0)}
    few, depthwise = blaq.PackedConv2d(3, 64, 7, **meta), blaq.PackedConv2d(64, 64, 3, groups=64, **meta)
    deep, large = blaq.PackedConv2d(256, 256, 3, **meta), blaq.PackedConv2d(512, 512, 3, **meta)
    middle = blaq.PackedConv2d(48, 32, 1, **meta)
    for accuracy in ("exact", "high", "fast"):
        assert takes(few, accuracy) and takes(depthwise, accuracy)
        assert not takes(deep, accuracy) and not takes(large, accuracy)
        assert takes(middle, accuracy)
        assert not takes(few, accuracy, torch.float16)  # whose convolutions are slow
    halves = blaq.PackedConv2d(48, 48, 3, **meta)
    in_groups = blaq.PackedConv2d(128, 128, 3, group_size=32, **meta)
    assert takes(in_groups) and not takes(in_groups, "fast")
    assert not takes(halves) and takes(halves, "exact") and takes(halves, dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("args, options", [
    ((1, 6, 5), {"padding": 2}), ((8, 8, 3), {"groups": 8, "bias": False}),
    ((6, 16, 3), {"stride": 2, "dilation": 2, "padding": "valid"}), ((16, 24, 1), {}),
    ((4, 4, 2), {"padding": "same"}), ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"})])
@torch.no_grad()
def test_equals_the_float_layer(args, options, layout):
    for dtype in (torch.float32, torch.bfloat16):
        layer = packed(*args, **options, dtype=dtype)
        plain = layer.to_float()
        x = torch.randn(2, args[0], 9, 8).to(dtype).to(memory_format=layout)
        for _ in range(2):  # as the weight is made, and as it is kept
            y = layer(x)
            torch.testing.assert_close(y, plain(x), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
            assert y.is_contiguous(memory_format=layout) and y.dtype == dtype
        assert layer.bytes_repacked == plain.weight.nbytes
        torch.testing.assert_close(layer(x[0]), plain(x[0]), rtol=1e-2, atol=1e-5)
        assert layer(x[:0]).shape == plain(x[:0]).shape


@torch.no_grad()
def test_layouts_take_turns():
    layer = packed(6, 8, 3)
    x = torch.randn(2, 6, 9, 8)
    for layout in (LAST, torch.contiguous_format, LAST):
        assert layer(x.to(memory_format=layout)).is_contiguous(memory_format=layout)


@torch.no_grad()
def test_what_changes_a_layer_changes_its_result():
    layer, x = packed(6, 16, 3, bits=1), torch.randn(2, 6, 9, 8)
    first = layer(x) - layer.bias[:, None, None]
    layer.qweight[-1] ^= 255  # every sign
    torch.testing.assert_close(layer(x) - layer.bias[:, None, None], -first)
    layer.scale *= 2
    torch.testing.assert_close(layer(x) - layer.bias[:, None, None], -2 * first)
    wide, x = packed(16, 64, 3), torch.randn(2, 16, 9, 8)
    assert takes(wide) and not takes(wide, "fast")
    wide(x)
    wide.accuracy = "fast"
    exact = wide.to_float()(x)
    assert float((wide(x) - exact).norm() / exact.norm()) > 1e-3


def test_bad_input_and_gradients():
    layer = packed(6, 16, 3)
    x = torch.randn(2, 6, 9, 8)
    layer(x)
    with pytest.raises(ValueError, match="PackedConv2d: input must have in_channels = 6"):
        layer(torch.randn(2, 7, 9, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    reference = layer.to_float()
    for train_scale in (False, True):
        layer.scale.requires_grad_(train_scale)
        x = x.detach().requires_grad_()
        for _ in range(2):
            layer.zero_grad()
            x.grad = None
            layer(x).square().sum().backward()
        expected = torch.autograd.grad(F.conv2d(x, reference.weight, layer.bias).square().sum(),
                                       (x, layer.bias))
        torch.testing.assert_close((x.grad, layer.bias.grad), expected, rtol=1e-3, atol=1e-3)
        assert (layer.scale.grad is not None) == train_scale


def test_a_folded_relu():
    torch.manual_seed(0)
    net = nn.Sequential(quantize_(nn.Conv2d(3, 16, 3)), nn.BatchNorm2d(16), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 8)
    expected = net(x)
    folded = blaq.pack(net, fold_norm=True)
    for _ in range(2):
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be in eval mode"):
        folded.train()(x)


@torch.no_grad()
def test_inspect_says_what_a_run_keeps(tmp_path):
    torch.manual_seed(0)
    net = blaq.pack(nn.Sequential(quantize_(nn.Conv2d(3, 32, 3)), quantize_(nn.Conv2d(32, 64, 3))).eval())
    blaq.save(net, tmp_path / "file")
    net(torch.randn(2, 3, 9, 8))
    layers = describe(blaq.inspect(tmp_path / "file"))["layers"]
    assert [layer["bytes_repacked"] for layer in layers] == [layer.bytes_repacked for layer in net]

"""PackedLinear and PackedConv2d: they compute, cast, copy and look as the float layers do."""

import copy
import pickle

import pytest
import torch
from quantized import CODEBOOKS, DTYPES, GROUPS, quantize_, same_bits
from torch import nn

from blaq import PackedConv2d, PackedLinear
from blaq.quantization import quantization_of

CONVS = {
    "plain": {},
    "stride": {"stride": 2, "padding": (1, 0), "dilation": (1, 2)},
    "groups": {"groups": 2, "bias": False},
    "same": {"padding": "same", "dilation": 2},
    "same-even": {"kernel_size": (4, 2), "padding": "same"},
    "same-circular": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    "valid": {"padding": "valid", "padding_mode": "reflect"},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "groups": 4},
}


def linear(dtype=torch.float32, bias=True, codebook="pow2", bits=2, group_size=5):
    torch.manual_seed(0)
    layer = quantize_(nn.Linear(13, 6, bias=bias, dtype=dtype), codebook, bits, group_size)
    return layer, PackedLinear.from_float(layer, quantization_of(layer.weight))


def conv(**changes):
    torch.manual_seed(0)
    arguments = {"kernel_size": 3, **changes}
    layer = quantize_(nn.Conv2d(4, 8, **arguments), "pow2", 3, -1)
    return layer, PackedConv2d.from_float(layer, quantization_of(layer.weight))


def error_budget(layer, x):
    """Twice the error that the float layer itself makes against float64."""
    exact = copy.deepcopy(layer).double()(x.double())
    return exact, 2 * (layer(x).double() - exact).abs().max().item() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("codebook,bits", CODEBOOKS)
def test_linear_computes_with_the_same_weight(codebook, bits, group_size, dtype):
    layer, packed = linear(dtype, True, codebook, bits, group_size)
    assert same_bits(packed.weight, layer.weight) and packed.bias is layer.bias
    x = torch.randn(3, 2, 13).to(dtype)
    exact, budget = error_budget(layer, x)
    for accuracy, more in (("exact", 0), ("high", 4e-4 * exact.abs().max())):
        packed.accuracy = accuracy
        out = packed(x)
        assert out.dtype == dtype and out.shape == (3, 2, 6)
        assert (out.double() - exact).abs().max() <= budget + more


@pytest.mark.parametrize("name", CONVS)
def test_conv_computes_with_every_padding(name):
    layer, packed = conv(**CONVS[name])
    assert same_bits(packed.weight, layer.weight)
    for x in (torch.randn(2, 4, 9, 8), torch.randn(4, 9, 8)):
        exact, budget = error_budget(layer, x)
        for accuracy, more in (("exact", 0), ("high", 4e-4 * exact.abs().max())):
            packed.accuracy = accuracy
            assert packed(x).shape == exact.shape
            assert (packed(x).double() - exact).abs().max() <= budget + more
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                      "groups", "padding_mode", "transposed", "output_padding"):
        assert getattr(packed, attribute) == getattr(layer, attribute), attribute


def test_channels_last_stays():
    layer, packed = conv(padding=1)
    x = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)
    out = packed.to(memory_format=torch.channels_last)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    packed.accuracy = "exact"
    torch.testing.assert_close(packed(x), layer(x))
    torch.testing.assert_close(out, packed(x), rtol=0, atol=4e-4 * float(out.detach().abs().max()))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casting_rounds_the_weight_and_keeps_the_scale(cast):
    layer, packed = linear()
    scale, qweight = packed.scale.clone(), packed.qweight.clone()
    if cast == "to":
        layer.to("cpu", torch.float16), packed.to("cpu", torch.float16)
    else:
        getattr(layer, cast)(), getattr(packed, cast)()
    assert packed.dtype == packed.weight.dtype == packed.bias.dtype == layer.weight.dtype
    assert packed.scale.dtype == (torch.float64 if cast == "double" else torch.float32)
    assert packed.scale.double().equal(scale.double()) and packed.qweight.equal(qweight)
    assert packed.weight.equal(layer.weight)
    x = torch.randn(4, 13).to(layer.weight.dtype)
    torch.testing.assert_close(packed(x), layer(x))
    packed.float()  # nothing was lost on the way, but for the bias
    assert packed.scale.dtype == torch.float32 and packed.scale.equal(scale)


def test_casting_there_and_back_keeps_the_weight():
    layer, packed = linear()
    packed.half().double().bfloat16().to("meta")
    assert packed.scale.is_meta and packed.scale.dtype == torch.float32
    layer, packed = linear(bias=False)
    packed.half().double().bfloat16().float()
    assert same_bits(packed.weight, layer.weight)


def test_autocast_computes_as_the_float_layer():
    layer, packed = linear()
    block, packed_conv = conv()
    x, image = torch.randn(4, 13), torch.randn(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(packed(x), layer(x))
        torch.testing.assert_close(packed_conv(image), block(image))
        assert packed(x).dtype == packed_conv(image).dtype == torch.bfloat16


def test_state_dict_round_trip_and_codebook_check():
    _, packed = linear()
    fresh = PackedLinear(13, 6, levels=(0.5, 1.0), group_size=5)
    assert not fresh.weight.equal(packed.weight)
    fresh.load_state_dict(packed.state_dict())
    assert same_bits(fresh.weight, packed.weight) and fresh.bias.equal(packed.bias)
    assert all(isinstance(value, torch.Tensor) for value in packed.state_dict().values())
    ternary = PackedLinear(13, 6, levels=(0.0, 1.0), group_size=5)
    with pytest.raises(ValueError, match=r"blaq\.PackedLinear: state_dict must have levels \[0\.0"):
        ternary.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(duplicate):
    for (layer, packed), x in ((linear(), torch.randn(4, 13)), (conv(), torch.randn(2, 4, 9, 8))):
        twin = duplicate(packed)
        assert twin(x).equal(packed(x))
        twin.scale.zero_()
        assert same_bits(packed.weight, layer.weight)


def test_input_scale_and_bias_train():
    layer, packed = linear(group_size=-1)
    packed.accuracy = "exact"
    packed.scale.requires_grad_()
    x = torch.randn(4, 13, requires_grad=True)
    packed(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    layer(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(packed.bias.grad, layer.bias.grad)
    units = layer.weight / packed.scale.detach()
    torch.testing.assert_close(packed.scale.grad, (layer.weight.grad * units).sum(1, keepdim=True))
    assert packed.half().scale.requires_grad and packed.scale.is_leaf


def test_to_float_is_the_inverse():
    for layer, packed in (linear(bias=False), conv(padding="same", groups=2)):
        back = packed.eval().to_float()
        assert type(back) is type(layer) and not back.training
        assert same_bits(back.weight, layer.weight) and back.bias is packed.bias
        assert repr(back) == repr(layer)


def test_repr_shows_the_codebook():
    assert repr(linear()[1]) == ("PackedLinear(in_features=13, out_features=6, bias=True, bits=2, "
                                 "levels=[0.5, 1], group_size=5)")
    assert "kernel_size=(3, 3)" in repr(conv()[1])


def test_construction_on_the_meta_device_leaves_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    conv_like = PackedConv2d(4, 8, 3, levels=(1.0,), device="meta")
    assert torch.rand(1).equal(expected) and conv_like.qweight.is_meta


def test_packed_layers_inside_torch_modules():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    quantize_(block.linear1), quantize_(block.linear2)
    x = torch.randn(2, 3, 8)
    expected = block(x)
    block.linear1 = PackedLinear.from_float(block.linear1, quantization_of(block.linear1.weight))
    block.linear2 = PackedLinear.from_float(block.linear2, quantization_of(block.linear2.weight))
    # its fast path reads linear1.weight
    torch.testing.assert_close(block(x), expected, rtol=0, atol=4e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("make,message", [
    (lambda: PackedLinear(3, 2, levels=(0.5,)), r"PackedLinear: levels must have 1 to 8"),
    (lambda: PackedLinear(3, 2, levels=(1.0,), group_size=-2), r"group_size must be 0, -1 or pos"),
    (lambda: PackedConv2d(3, 2, 3, padding_mode="wrap", levels=(1.0,)), "padding_mode must be"),
    (lambda: PackedConv2d(3, 2, 3, groups=2, levels=(1.0,)), "divisible by groups"),
    (lambda: linear()[1](torch.randn(2, 12)), r"PackedLinear: input must have in_features = 13"),
    (lambda: conv()[1](torch.randn(2, 3, 9, 9)), r"input must have in_channels = 4"),
    (lambda: linear()[1](torch.ones(2, 13, dtype=torch.int64)), r"packed_linear: input must be"),
    (lambda: linear()[1](torch.ones(2, 13).half()), r"packed_linear: bias must be float16"),
])
def test_bad_arguments_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

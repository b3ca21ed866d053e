"""BinaryActivation and the layers behind it: trained, packed, unpacked, saved, compiled."""

import copy
import pickle

import pytest
import torch
from quantized import quantize_, same_bits
from torch import nn
from torch.nn import functional as F

import blaq
from blaq import BinaryActivation, PackedBinaryConv2d, PackedBinaryLinear, PackedConv2d, PackedLinear


def binary_net(group_size=0, known=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), BinaryActivation(),
        quantize_(nn.Conv2d(8, 6, 3, stride=2, padding=1), "pow2", 1, group_size, known),
        nn.Flatten(), BinaryActivation(),
        quantize_(nn.Linear(54, 70), "pow2", 1, group_size, known), nn.ReLU(),
        quantize_(nn.Linear(70, 9), "pow2", 1, group_size, known), BinaryActivation(),
        quantize_(nn.Linear(9, 3), "pow2", 2, group_size, known)).eval()


def kinds(model):
    return [type(layer) for layer in model if isinstance(layer, (PackedLinear, PackedConv2d))]


BINARY_KINDS = [PackedBinaryConv2d, PackedBinaryLinear, PackedLinear, PackedLinear]


def test_activation_is_the_sign_with_a_straight_through_gradient():
    x = torch.tensor([-2.0, -1.0, -0.3, -0.0, 0.0, 0.3, 1.0, 2.0, float("nan")], requires_grad=True)
    y = BinaryActivation()(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, 1]
    towards = torch.arange(1.0, 10.0)
    y.backward(towards)
    assert torch.equal(x.grad, towards * torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0, 0]))
    assert BinaryActivation()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("group_size", [0, -1])
def test_pack_puts_binary_layers_behind_the_activation_and_unpack_takes_them_back(group_size):
    net = binary_net(group_size)
    x, before = torch.randn(5, 2, 5, 5), copy.deepcopy(net)
    expected = net(x)
    packed = blaq.pack(net)
    assert kinds(packed) == BINARY_KINDS
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)
    for old, new in zip(before.parameters(), blaq.unpack(packed).parameters(), strict=True):
        assert same_bits(old, new)
    assert [type(layer) for layer in packed] == [type(layer) for layer in before]


def test_a_layer_that_also_stands_elsewhere_is_not_binary():
    shared = quantize_(nn.Linear(8, 8), "pow2", 1)
    packed = blaq.pack(nn.Sequential(BinaryActivation(), shared, nn.ReLU(), shared))
    assert type(packed[1]) is PackedLinear and packed[1] is packed[3]
    both = quantize_(nn.Linear(8, 8), "pow2", 1)
    packed = blaq.pack(nn.Sequential(BinaryActivation(), both, BinaryActivation(), both))
    assert type(packed[1]) is PackedBinaryLinear and packed[1] is packed[3]


@pytest.mark.parametrize("group_size,kind", [(64, PackedBinaryLinear), (5, PackedLinear)])
def test_groups_that_the_product_does_not_know_stay_packed(group_size, kind):
    layer = quantize_(nn.Linear(130, 4), "pow2", 1, group_size)
    net = nn.Sequential(BinaryActivation(), layer)
    x = torch.randn(3, 130)
    expected = net(x)
    packed = blaq.pack(net)
    assert type(packed[1]) is kind
    torch.testing.assert_close(packed(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", [
    {"padding": "same"}, {"padding": "same", "kernel_size": (4, 2)}, {"padding": (2, 1), "stride": 2},
    {"padding": "same", "kernel_size": 2, "padding_mode": "circular"}, {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect", "groups": 2, "bias": False}, {"dilation": 2}], ids=str)
def test_convolution_pads_as_torch_does(arguments):
    torch.manual_seed(0)
    layer = quantize_(nn.Conv2d(4, 8, **{"kernel_size": 3, **arguments}), "pow2", 1, -1)
    net, x = nn.Sequential(BinaryActivation(), layer), torch.randn(2, 4, 9, 8)
    expected, single = net(x), net(x[0])
    packed = blaq.pack(net)
    assert type(packed[1]) is PackedBinaryConv2d
    torch.testing.assert_close(packed(x), expected)
    torch.testing.assert_close(packed(x[0]), single)


def test_saved_loaded_copied_and_compiled(tmp_path):
    net, x = blaq.pack(binary_net()), torch.randn(4, 2, 5, 5)
    expected = net(x)
    blaq.save(net, tmp_path / "net.safetensors")
    for target in (binary_net(), blaq.pack(binary_net())):
        loaded = blaq.load(tmp_path / "net.safetensors", target)
        assert kinds(loaded) == BINARY_KINDS and torch.equal(loaded(x), expected)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-2, atol=1e-3)  # other layers: exact
    assert torch.equal(net.bfloat16().float()(x).isfinite(), torch.ones(4, 3, dtype=torch.bool))


def test_changed_codes_are_repacked():
    layer = blaq.pack(nn.Sequential(BinaryActivation(), quantize_(nn.Linear(64, 8), "pow2", 1)))[1]
    x = torch.randn(2, 64)
    before = layer(x)
    layer.qweight.bitwise_not_()
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - before)


def test_a_binary_network_learns():
    torch.manual_seed(0)
    x, teacher = torch.randn(512, 16), torch.randn(16, 4)
    y = (x @ teacher).argmax(1)
    net = nn.Sequential(nn.Linear(16, 256), nn.BatchNorm1d(256), BinaryActivation(),
                        nn.Linear(256, 256), nn.BatchNorm1d(256), BinaryActivation(), nn.Linear(256, 4))
    opt = blaq.BLAQ(blaq.param_groups(net, bits={"3": 1, "6": 1}), lr=1e-2)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    expected = net.eval()(x)
    packed = blaq.pack(net)
    assert kinds(packed) == [PackedBinaryLinear, PackedBinaryLinear]
    torch.testing.assert_close(packed(x), expected, rtol=1e-3, atol=1e-3)

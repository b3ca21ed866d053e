"""pack and unpack: exact inverses, all or nothing, and clear about what stays float."""

import copy
import logging

import pytest
import torch
from quantized import CODEBOOKS, DTYPES, GROUPS, quantize_, same_bits, small_net
from torch import nn

import blaq
from blaq import PackedConv2d, PackedLinear
from blaq.encoding import recover_scale
from blaq.quantization import Quantization, record
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of


def kinds(model):
    return [type(m).__name__ for m in model]


def test_pack_takes_what_the_optimizer_quantized_and_unpack_takes_it_back():
    model, x = small_net(), torch.randn(5, 2, 5, 5)
    before = copy.deepcopy(model)
    expected = model(x)
    assert blaq.pack(model) is model
    assert kinds(model) == ["Conv2d", "BatchNorm2d", "ReLU", "PackedConv2d", "ReLU", "Flatten",
                            "PackedLinear", "ReLU", "PackedLinear", "Linear"]
    assert (model[3].bits, model[6].bits, model[8].bits) == (1, 3, 2)
    torch.testing.assert_close(model(x), expected)
    assert blaq.pack(model) is model  # nothing left to do
    blaq.unpack(model)
    assert kinds(model) == kinds(before)
    for (key, value), old in zip(model.state_dict().items(), before.state_dict().values(),
                                 strict=True):
        assert same_bits(value, old), key
    assert kinds(blaq.pack(model)).count("PackedLinear") == 2  # known again, so no bits needed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("codebook,bits", [*CODEBOOKS, ("uniform", 4)])
def test_scale_is_recovered_from_values_alone(codebook, bits, group_size, dtype):
    """At every magnitude of weights, with groups too short to hold every level."""
    for seed in range(6):
        torch.manual_seed(seed)
        layer = nn.Linear(13, 6)
        with torch.no_grad():
            layer.weight *= 10.0 ** (torch.rand(()) * 4 - 3)
        quantize_(layer, codebook, bits, group_size, known=False).to(dtype)
        before = layer.weight.detach().clone()
        packed = blaq.pack(layer, bits=bits, codebook=codebook, group_size=group_size)
        assert isinstance(packed, PackedLinear) and packed.bits == bits
        assert same_bits(blaq.unpack(packed).weight, before)


def test_recovery_finds_scales_that_neighbours_of_the_largest_value_miss():
    """bfloat16 keeps 8 bits of a scale; the 1/3 levels need bits that the largest value lost."""
    levels, scale = levels_of("linear", 4), torch.tensor([0.3137])
    weight = (torch.tensor(levels) * scale).to(torch.bfloat16).reshape(1, -1)
    naive = (torch.tensor(levels) * weight.float().max()).to(torch.bfloat16).reshape(1, -1)
    assert not naive.equal(weight)
    found = recover_scale(weight, levels, 0)
    assert (torch.tensor(levels) * found).to(torch.bfloat16).equal(weight[0])


def test_all_zero_groups():
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    packed = blaq.pack(copy.deepcopy(layer), bits=2, codebook="ternary")
    assert packed.weight.count_nonzero() == 0 and packed.scale > 0
    with pytest.raises(ValueError, match=r"weight must hold ±0.5\|1 × scale in every bit, got 0.0"):
        blaq.pack(layer, bits=2)  # pow2 has no zero
    tiny = quantize_(layer, "pow2", 2)  # what training makes of it: the least level of a tiny scale
    assert same_bits(blaq.pack(tiny).weight, tiny.weight)


def test_signed_zeros_are_kept_or_refused():
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float16)
    values = torch.tensor([[1e-9, -1e-9, 2e-8, -2e-8]])  # all underflow to ±0 in float16
    with torch.no_grad():
        layer.weight.copy_(values)
    record(layer.weight, Quantization((0.5, 1.0), 0, torch.tensor([2e-8])))
    before = layer.weight.detach().clone()
    assert same_bits(blaq.pack(layer).weight, before) and before.signbit().sum() == 2
    ternary = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        ternary.weight.copy_(torch.tensor([[0.5, -0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"weight must hold .*got -0.0 in row 0, column 1 "):
        blaq.pack(ternary, bits=2, codebook="ternary")


@pytest.mark.parametrize("spoil,message", [
    (lambda m: m[8].weight[3, 1].add_(1e-6), r"blaq\.pack: 8\.weight must hold .*row 3, column 1"),
    (lambda m: m[6].weight[0, 0].fill_(float("nan")), r"6\.weight must hold .*got nan"),
    (lambda m: m[8].weight[0, 0].fill_(float("inf")), r"8\.weight must hold .*got inf"),
    (lambda m: m[8].double(), r"8\.weight must be float32, bfloat16 or float16, got float64"),
])
def test_a_weight_off_its_levels_changes_nothing(spoil, message):
    model = small_net()
    with torch.no_grad():
        spoil(model)
    before = list(model)
    with pytest.raises((ValueError, TypeError), match=message):
        blaq.pack(model)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_explicit_bits_need_every_layer_or_a_skip():
    torch.manual_seed(0)
    body = quantize_(nn.Linear(8, 8), "pow2", 2, -1, known=False)
    model = nn.ModuleDict({"body": nn.Sequential(body, nn.ReLU()), "head": nn.Linear(8, 3)})
    with pytest.raises(ValueError, match=r"blaq\.pack: head\.weight must hold ±0.5\|1 × scale"):
        blaq.pack(model, bits=2, group_size=-1)
    blaq.pack(model, bits=2, group_size=-1, skip=["head"])
    assert type(model["body"][0]) is PackedLinear and type(model["head"]) is nn.Linear


def test_skip_names_modules_with_all_inside():
    model = nn.Sequential(small_net(), small_net())
    blaq.pack(model, skip=["0", "1.6"])
    assert not any(isinstance(m, PackedLinear | PackedConv2d) for m in model[0])
    assert kinds(model[1]).count("PackedLinear") == 1
    model = blaq.pack(small_net(), skip="[36]")
    assert not isinstance(model[6], PackedLinear) and isinstance(model[8], PackedLinear)


@pytest.mark.parametrize("arguments,message", [
    ({"skip": ["nope"]}, "skip must name modules of the model, got 'nope'"),
    ({"skip": "head.*"}, r"skip must name modules of the model, got 'head\.\*'"),
    ({"bits": 5}, "bits must be 1, 2, 3 or 4"),
    ({"bits": 8}, "bits must be 1, 2, 3 or 4"),
    ({"bits": 2, "codebook": (0.1, 0.2, 1.0)}, "codebook must have magnitudes for 2 bits"),
    ({"bits": 2, "codebook": "nope"}, "name must be one of"),
    ({"bits": 2, "group_size": -2}, "group_size must be 0, -1 or positive, got -2"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        blaq.pack(small_net(), **arguments)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(ValueError, match="model must have a layer that an optimizer quantized"):
        blaq.pack(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="model must have a Linear or Conv2d, got none"):
        blaq.pack(nn.Embedding(3, 2), bits=1)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_stays_float_is_reported(caplog):
    torch.manual_seed(0)
    wide = nn.Linear(4, 4)
    record(wide.weight, Quantization(tuple((i + 1) / 128 for i in range(128)), 0, torch.ones(1)))
    tied = quantize_(nn.Linear(4, 6))
    embedding = nn.Embedding(6, 4)
    embedding.weight = tied.weight
    parametrized = quantize_(nn.Linear(4, 4))
    model = nn.ModuleDict({
        "wide": wide, "sub": quantize_(Scaled(4, 4)), "conv1d": quantize_(nn.Conv1d(2, 2, 3)),
        "transposed": quantize_(nn.ConvTranspose2d(2, 2, 3)), "tied": tied, "emb": embedding,
        "good": quantize_(nn.Linear(4, 4))})
    with caplog.at_level(logging.INFO, "blaq"):
        blaq.pack(model)
    assert [n for n, m in model.items() if isinstance(m, PackedLinear)] == ["good"]
    assert tied.weight is embedding.weight
    for line in ("wide stays float: 8-bit codes are too wide to", "sub stays float: only Linear",
                 "conv1d stays float", "transposed stays float", "tied stays float: its weight is"):
        assert line in caplog.text
    nn.utils.parametrizations.orthogonal(parametrized)
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    empty = nn.Sequential(parametrized, weight_norm)
    with caplog.at_level(logging.INFO, "blaq"):
        blaq.pack(empty, bits=2)
    assert "0 stays float: only Linear and Conv2d are packed, not ParametrizedLinear" in caplog.text
    assert "1 stays float" in caplog.text and kinds(empty) == ["ParametrizedLinear"] * 2


def test_shared_weights_and_modules_stay_shared():
    torch.manual_seed(0)
    first = quantize_(nn.Linear(4, 4))
    second = nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, first)
    x = torch.randn(2, 4)
    expected = model(x)
    blaq.pack(model)
    assert model[0] is model[2] and model[0] is not model[1]
    assert model[0].qweight is model[1].qweight and model[0].scale is model[1].scale
    torch.testing.assert_close(model(x), expected)
    blaq.unpack(model)
    assert model[0] is model[2] and model[0].weight is model[1].weight


def test_mode_hooks_and_bias_move_to_the_packed_layer():
    layer = quantize_(nn.Linear(4, 3)).eval()
    layer.bias.requires_grad_(False)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    packed = blaq.pack(layer)
    packed(torch.randn(1, 4))
    handle.remove()
    packed(torch.randn(1, 4))
    assert seen == [PackedLinear] and not packed.training
    assert packed.bias is layer.bias and not packed.bias.requires_grad


def test_packing_a_step_later_uses_the_scale_of_that_step():
    """The record holds the optimizer's own scale tensor; a pack copies it."""
    torch.manual_seed(0)
    layer, scale = nn.Linear(8, 4), torch.ones(1)
    record(layer.weight, Quantization((1.0,), 0, scale))
    scale.fill_(0.25)
    with torch.no_grad():
        layer.weight.copy_(ref.dequantize(torch.ones(4, 8, dtype=torch.uint8), scale, (1.0,), 0))
    packed = blaq.pack(layer)
    scale.fill_(9.0)
    assert packed.weight.equal(torch.full((4, 8), -0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_model_packs_at_any_step_but_not_in_a_trial(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
                          nn.Linear(8, 3)).to(dtype)
    opt = blaq.BLAQ(blaq.param_groups(model, bits=1, last=8), lr=1e-2)
    x, y = torch.randn(5, 1, 6, 6).to(dtype), torch.tensor([0, 1, 2, 0, 1])

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        weights = [model[0].weight.clone(), model[2].weight.clone()]
        packed = [blaq.pack(model[i]) for i in (0, 2)]
        assert all(same_bits(a, b.weight) for a, b in zip(weights, packed, strict=True))
    closure()
    opt.trial_step()
    with pytest.raises(ValueError, match="weight must hold ±1 × scale in every bit"):
        blaq.pack(model)
    opt.cancel_trial()
    assert kinds(blaq.pack(model)) == ["PackedConv2d", "Flatten", "PackedLinear", "ReLU", "Linear"]

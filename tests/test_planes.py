"""drop_planes: codes in the order of kernels alone, and planes made again from there, bit for bit."""

import copy
import io

import pytest
import torch
from quantized import quantize_, same_bits
from torch import nn

import blaq
import blaq_kernels

pytestmark = pytest.mark.skipif(blaq_kernels.int8_kernels() != "AVX-512 VNNI",
                                reason="needs kernels that read a copy of convolutions too")
CODEBOOKS = [("binary", 1), ("pow2", 2), ("linear", 3), ("pow2", 4)]


def net(name="pow2", bits=2):
    torch.manual_seed(0)
    return blaq.pack(nn.Sequential(
        quantize_(nn.Conv2d(32, 48, 3, padding=1), name, bits), nn.ReLU(), nn.Flatten(),
        quantize_(nn.Linear(48 * 16, 100), name, bits, 32)).eval())


def pair(*args):
    return net(*args), blaq.drop_planes(net(*args))


def images(batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 32, 4, 4)


def lacking(model):
    return [module.lacks_planes for module in (model[0], model[3])]


@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("name, bits", CODEBOOKS)
@torch.no_grad()
def test_computes_the_same_in_less_memory(name, bits, accuracy):
    whole, model = pair(name, bits)
    x = images()
    for layer in (*whole, *model):
        layer.accuracy = accuracy
    assert torch.equal(model(x), whole(x))
    assert lacking(model) == [True, True] and model[0].qweight.shape == (bits, 48, 0)
    before, after = blaq.summary(whole), blaq.summary(model)
    codes = whole[0].qweight.nbytes + whole[3].qweight.nbytes
    assert after.bytes_now == before.bytes_now - codes
    assert after.bytes_repacked == before.bytes_repacked > 0
    assert after.bytes_float32 == before.bytes_float32


@torch.no_grad()
def test_rows_without_a_unit_and_inputs_for_other_kernels():
    whole, model = pair()
    for value in (float("nan"), float("inf"), 1e-35):
        x = images()
        x[1] = value
        torch.testing.assert_close(model(x), whole(x), rtol=0, atol=0, equal_nan=True)
        flat = torch.randn(3, 768)
        flat[1, 0] = value if value != 1e-35 else 0
        torch.testing.assert_close(model[3](flat), whole[3](flat), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(model[3](flat[:0]), flat[:0, :100])
    for op, layer, x in ((torch.ops.blaq.packed_linear, 3, torch.randn(3, 768)),):
        rest = model[layer].levels, model[layer].group_size, model[layer].repacked(), "exact"
        assert torch.equal(op(x, model[layer].qweight, model[layer].scale, None, *rest),
                           op(x, whole[layer].qweight, whole[layer].scale, None, *rest))
        x, scale = x.double(), whole[layer].scale.double()
        assert torch.equal(op(x, model[layer].qweight, scale, None, *rest),
                           op(x, whole[layer].qweight, scale, None, *rest))
    assert lacking(model) == [True, True]


def test_gradients():
    grads = []
    for model in pair():
        model[0].scale.requires_grad_()
        x = images().requires_grad_()
        model(x).square().sum().backward()
        grads.append((x.grad, model[0].scale.grad, model[0].bias.grad, model[3].bias.grad))
    assert all(map(torch.equal, *grads)) and lacking(model) == [True, True]


def test_weights_states_files_and_copies_are_whole(tmp_path):
    whole, model = pair()
    states = [m.state_dict() for m in (whole, model)]
    assert states[0].keys() == states[1].keys()
    assert all(same_bits(states[0][key], states[1][key]) for key in states[0])
    states[1]["0.qweight"].zero_()  # a copy, unlike others'
    assert torch.equal(model[0].weight, whole[0].weight)
    assert same_bits(model.state_dict()["0.qweight"], whole[0].qweight)
    for number, m in enumerate((whole, model)):
        blaq.save(m, tmp_path / str(number))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert lacking(copied) == [False, False] and torch.equal(copied[3].qweight, whole[3].qweight)
        assert torch.equal(copied(images()), model(images()))
    assert lacking(model) == [True, True]
    floats = blaq.unpack(model)
    assert torch.equal(floats[0].weight, whole[0].weight) and torch.equal(floats[3].weight, whole[3].weight)


def test_planes_come_back_when_a_model_changes():
    whole, other = net(), blaq.unpack(net())
    with torch.no_grad():
        other[3].weight.neg_()
    other = blaq.pack(other)
    x = images()
    for change in (lambda m: m.double().float(), lambda m: m.load_state_dict(whole.state_dict()),
                   blaq.restore_planes):
        model = blaq.drop_planes(net())
        change(model)
        assert lacking(model) == [False, False]
        assert all(torch.equal(model[i].qweight, whole[i].qweight) for i in (0, 3))
        assert torch.equal(model(x), whole(x))
    model = blaq.drop_planes(net())
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x)) and not torch.equal(model(x), whole(x))
    assert blaq.drop_planes(model) is model and lacking(model) == [True, True]
    model[3].qweight = whole[3].qweight.clone()  # and when one is given others
    assert torch.equal(model(x), whole(x))


@torch.no_grad()
def test_computing_without_these_kernels_brings_planes_back():
    whole, model = pair()
    x, capability = images(), blaq_kernels.cpu_capability()
    model[3].accuracy = whole[3].accuracy = "exact"
    assert torch.equal(model(x), whole(x)) and lacking(model) == [True, False]
    model[0].accuracy = whole[0].accuracy = "fast"
    try:
        blaq_kernels.set_cpu_capability("scalar")
        assert torch.equal(model(x), whole(x)) and lacking(model) == [True, False]
        model[0].scale.requires_grad_(), whole[0].scale.requires_grad_()  # so that it is not decoded
        with torch.enable_grad():
            assert torch.equal(model(x), whole(x)) and lacking(model) == [False, False]
    finally:
        blaq_kernels.set_cpu_capability(capability)


def test_layers_whose_kernels_read_planes_keep_them():
    torch.manual_seed(0)
    few, odd = nn.Conv2d(3, 32, 3), nn.Linear(64, 64)
    model = blaq.pack(nn.Sequential(quantize_(few), quantize_(odd, "pow2", 2, 5),
                                    quantize_(nn.Linear(64, 64), "linear", 3, -1).half(),
                                    blaq.BinaryActivation(), quantize_(nn.Linear(64, 64), "binary", 1)),
                      skip=["2"])
    blaq.drop_planes(model)
    assert not any(getattr(layer, "lacks_planes", False) for layer in model)
    layer = blaq.PackedLinear(64, 64, levels=(1 / 3, 1.0), group_size=-1, dtype=torch.float16)
    assert not blaq.drop_planes(layer).lacks_planes
    exact = net()
    exact[0].accuracy = "exact"
    assert lacking(blaq.drop_planes(exact)) == [False, True]


def test_shared_codes_stay_shared(tmp_path):
    torch.manual_seed(0)
    first, second = quantize_(nn.Linear(96, 96)), nn.Linear(96, 96)
    second.weight = first.weight
    whole = blaq.pack(nn.Sequential(first, second))
    model = blaq.drop_planes(copy.deepcopy(whole))
    assert model[0].qweight is model[1].qweight and model[0].lacks_planes
    for number, m in enumerate((whole, model)):
        blaq.save(m, tmp_path / str(number))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    blaq.restore_planes(model)
    assert model[0].qweight is model[1].qweight
    model = blaq.drop_planes(model)
    model[1].accuracy = "exact"
    model(torch.randn(100, 96))
    assert [layer.lacks_planes for layer in model] == [True, False]
    floats = blaq.unpack(blaq.drop_planes(whole))
    assert floats[0].weight is floats[1].weight


def test_compile_and_export():
    whole, model = pair()
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), whole(x))
        blaq.restore_planes(model)
        assert torch.equal(compiled(x), whole(x))
    with pytest.raises(ValueError, match="must have its planes to be exported.*restore_planes"):
        torch.export.export(blaq.drop_planes(model), (x,))
    exported = torch.export.export(blaq.restore_planes(model), (x,)).module()
    torch.testing.assert_close(exported(x), whole(x), rtol=1e-3, atol=1e-3)

"""summary: bits, bytes, scale and flips of float, training and packed models."""

import json

import torch
from quantized import quantize_, small_net
from torch import nn

import blaq


def rows(model):
    return {row.name: row for row in blaq.summary(model).layers}


def test_a_quantized_and_a_packed_model_agree():
    model = small_net()
    before = blaq.summary(model)
    floats = sum(x.numel() for x in model.state_dict().values() if x.is_floating_point())
    assert before.bytes_float32 == before.bytes_now == 4 * floats + 8  # and a batch counter
    blaq.pack(model)
    after = blaq.summary(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert after.bytes_now == sum(x.numel() * x.element_size() for x in tensors)
    assert before.bytes_packed == after.bytes_packed == after.bytes_now < before.bytes_now
    assert after.bytes_float32 == before.bytes_float32
    for old, new in zip(before.layers, after.layers, strict=True):
        assert (old.name, old.shape, old.bits, old.codebook, old.levels, old.group_size,
                old.mean_scale, old.bytes_packed) == (
            new.name, new.shape, new.bits, new.codebook, new.levels, new.group_size,
            new.mean_scale, new.bytes_packed)


def test_rows_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(quantize_(nn.Linear(20, 4), "pow2", 2, -1), nn.Linear(4, 2))
    row = rows(model)["0"]
    assert (row.kind, row.shape, row.bits, row.codebook, row.group_size) == (
        "Linear", (4, 20), 2, "pow2", -1)
    assert (row.bytes_float32, row.bytes_now) == (336, 336)
    assert row.bytes_packed == 2 * 4 * 3 + 4 * 4 + 16  # planes, scales, bias
    assert row.mean_scale == blaq.quantization_of(model[0].weight).scale.mean().item()
    other = rows(model)["1"]
    assert (other.bits, other.codebook, other.mean_scale) == (None, None, None)
    assert other.bytes_packed == other.bytes_now == 40
    assert rows(model.half())["0"].bytes_now == 168


def test_in_training_with_flips_and_an_8_bit_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = blaq.BLAQ(blaq.param_groups(model, bits=1, last=8), lr=0.5, backtrack=1.0)
    before = model[0].weight.detach().clone()
    model(torch.randn(5, 16)).square().sum().backward()
    opt.step()
    first, last = rows(model)["0"], rows(model)["2"]
    flipped = (before.sign() != model[0].weight.sign()).sum().item()
    assert flipped > 0 and first.flip_ratio == flipped / 128
    assert blaq.summary(model).flip_ratio == first.flip_ratio
    assert (last.bits, last.codebook, last.bytes_packed) == (8, "uniform", last.bytes_now)
    assert last.note == "8-bit codes are too wide to pack" and last.flip_ratio is None
    assert "2 will stay float: 8-bit codes are too wide to pack" in str(blaq.summary(model))


def test_a_float_model_and_shared_weights():
    model = small_net(known=False)
    total = blaq.summary(model)
    assert total.bytes_now == total.bytes_packed and total.flip_ratio is None
    assert all(row.bits is None for row in total.layers)
    tied = nn.ModuleDict({"emb": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    tied["head"].weight = tied["emb"].weight
    assert blaq.summary(tied).bytes_now == 96 and rows(tied)["head"].bytes_now == 0
    assert blaq.summary(nn.ReLU()).layers == ()


def test_table_and_plain_data():
    model = small_net()
    text, data = str(blaq.summary(model)), blaq.summary(model).to_dict()
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "bits", "codebook", "group", "fp32",
                                "now", "packed", "scale", "flips"]
    assert lines[5].startswith("6      Linear       10 × 24        3     linear    row     1000 B")
    assert lines[-1].split()[0] == "total" and len(lines) == 10
    assert json.loads(json.dumps(data))["layers"][2]["bits"] == 1
    assert data["bytes_packed"] == sum(row["bytes_packed"] for row in data["layers"])

"""Which layers param_groups quantizes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import blaq


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.stem = nn.Conv2d(1, 6, 3)
        self.layer1 = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 10)


def widths(groups):
    return {name: group["bits"] for group in groups for name, _ in group["params"]}


WEIGHTS = ["stem.weight", "layer1.0.weight", "layer1.2.weight", "head.weight"]


def expected(model, **quantized):
    return dict.fromkeys((name for name, _ in model.named_parameters()), None) | quantized


@pytest.mark.parametrize("arguments,quantized", [
    ({}, dict.fromkeys(WEIGHTS, 1)),
    ({"bits": 3}, dict.fromkeys(WEIGHTS, 3)),
    ({"skip": ("head",)}, dict.fromkeys(WEIGHTS[:3], 1)),
    ({"skip": "layer1.*"}, {"stem.weight": 1, "head.weight": 1}),
    ({"first": 8, "last": "fp", "bits": 2},
     {"stem.weight": 8, "layer1.0.weight": 2, "layer1.2.weight": 2}),
    ({"bits": {"layer1.2": 4, "layer1.*": 2, "head": 8}},
     {"layer1.2.weight": 4, "layer1.0.weight": 2, "head.weight": 8}),
    ({"bits": {"head": "fp", "*": 1}}, dict.fromkeys(WEIGHTS[:3], 1)),
    ({"bits": {"*": 1}, "skip": ["stem"]}, dict.fromkeys(WEIGHTS[1:], 1)),
    ({"bits": {}}, {}),
    ({"bits": "fp"}, {}),
])
def test_widths(arguments, quantized):
    model = Net()
    groups = blaq.param_groups(model, **arguments)
    assert widths(groups) == expected(model, **quantized)
    assert len({group["bits"] for group in groups}) == len(groups)


def test_options_reach_the_optimizer_with_names():
    model = Net()
    opt = blaq.BLAQ(blaq.param_groups(model, bits=2, codebook="ternary", group_size=-1))
    quantized, rest = opt.param_groups
    assert quantized["param_names"] == WEIGHTS
    assert (quantized["codebook"], quantized["group_size"]) == ("ternary", -1)
    assert blaq.quantization_of(model.head.weight).levels == (0.0, 1.0)
    assert opt.state[model.head.weight]["scale"].shape == (10, 1)
    assert "model" not in quantized and rest["bits"] is None
    assert len(torch.nn.utils.parameters_to_vector(model.parameters())) == sum(
        p.numel() for group in opt.param_groups for p in group["params"])
    copy.deepcopy(opt.state_dict())  # plain values only


def test_codebook_and_group_size_may_come_from_the_optimizer():
    model = Net()
    groups = blaq.param_groups(model, bits=2)
    groups[0]["group_size"] = 3
    opt = blaq.BLAQ(groups, codebook="uniform", group_size=-1)
    assert blaq.quantization_of(model.head.weight).levels == blaq.levels_of("uniform", 2)
    assert [group["group_size"] for group in opt.param_groups] == [3, -1]


def test_groups_may_be_used_twice():
    groups = blaq.param_groups(Net())
    assert [set(group) for group in groups] == [{"params", "bits", "model"}] * 2
    first = blaq.BLAQ(groups)
    second = blaq.BLAQ(groups, backtrack=1.0)
    assert first.param_groups[0]["param_names"] == second.param_groups[0]["param_names"]


def test_a_weight_tied_to_an_embedding_is_not_quantized():
    model = Net()
    model.head.weight = model.embedding.weight
    assert widths(blaq.param_groups(model))["embedding.weight"] is None
    assert "head.weight" not in widths(blaq.param_groups(model))


def test_a_shared_weight_counts_once_and_has_one_width():
    model = Net()
    model.layer1[2].weight = model.layer1[0].weight
    assert widths(blaq.param_groups(model))["layer1.0.weight"] == 1
    total = sum(len(group["params"]) for group in blaq.param_groups(model))
    assert total == len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"bits must be one width .* got 1 and 2 at 'layer1.2'"):
        blaq.param_groups(model, bits={"layer1.0": 1, "layer1.2": 2})


def test_frozen_parameters_are_left_out():
    model = Net()
    model.stem.requires_grad_(False)
    assert not {"stem.weight", "stem.bias"} & widths(blaq.param_groups(model)).keys()


def test_a_computed_weight_is_no_leaf_to_quantize():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert {n for n, bits in widths(blaq.param_groups(model)).items() if bits} == {"1.weight"}


def test_wrapped_models_have_plain_names():
    model = Net()
    assert widths(blaq.param_groups(torch.compile(model), skip=("head",))) == widths(
        blaq.param_groups(model, skip=("head",)))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert widths(blaq.param_groups(wrapped, skip=("head",))) == widths(
            blaq.param_groups(model, skip=("head",)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("arguments,message", [
    ({"skip": ("fc",)}, r"skip must name layers .*\(stem, layer1.0, layer1.2, head\), got 'fc'"),
    ({"skip": ("norm",)}, r"skip must name layers .* got 'norm'"),
    ({"bits": {"heda": 2}}, r"bits must name layers .* got 'heda'"),
    ({"bits": 5}, "bits must be 1, 2, 3, 4, 8 or 'fp', got 5"),
    ({"bits": {"head": "2"}}, "bits must be 1, 2, 3, 4, 8 or 'fp', got '2'"),
    ({"first": 7}, "first must be 1, 2, 3, 4, 8 or 'fp', got 7"),
    ({"last": True}, "last must be 1, 2, 3, 4, 8 or 'fp', got True"),
    ({"codebook": "nope"}, "name must be one of"),
    ({"bits": 1, "codebook": "ternary"}, "bits must be one of"),
])
def test_a_bad_argument_is_named_and_changes_nothing(arguments, message):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        blaq.param_groups(model, **arguments)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match=r"\(it has none\), got 'fc'"):
        blaq.param_groups(nn.Sequential(nn.LayerNorm(3)), skip=("fc",))

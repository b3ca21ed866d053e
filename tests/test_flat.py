"""States of a list in one tensor: for the step ops the same as a tensor for each weight."""

import copy
import io
import pickle

import pytest
import torch
from small_network import assert_same, make_closure, make_model, snapshot
from step_state import REFERENCE, SHAPES, both_stages, make_state, scalar, tail

import blaq
from blaq import _buckets
from blaq._buckets import QuantizedBucket
from blaq_kernels import flat

NATIVE = (torch.ops.blaq.fused_trial.default, torch.ops.blaq.fused_step.default)


def flattened(op, seen=None):
    """``op`` on lists of which the states are joined, and separated again."""
    def call(**arguments):
        joined = {name: [flat.joined(flat.join(arguments[name]))] for name in flat.STATES}
        op(**(arguments | joined))
        lists = flat.separate(arguments["params"], arguments["group_size"], *joined.values())
        for name, tensors in zip(flat.STATES, lists, strict=True):
            for x, new in zip(arguments[name], tensors, strict=True):
                x.copy_(new)

    return call


@pytest.mark.parametrize("ops", [NATIVE, REFERENCE], ids=["C++", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, -1, 20])
def test_flat_states_give_the_bits_of_lists(ops, group_size, dtype):
    levels = (0.5, 1.0)
    expected = both_stages(ops, levels, group_size, dtype)
    actual = both_stages(tuple(map(flattened, ops)), levels, group_size, dtype)
    assert_same(actual, expected)


def test_some_states_may_be_flat_and_padding_stays():
    levels = (0.5, 1.0)
    state, other = (make_state(levels, -1, torch.float32) for _ in range(2))
    arguments = {**tail(levels, -1), "backtrack": scalar(0.6)}
    total = flat.length(p.shape for p in state["params"])
    moment = torch.full((total,), 7.0)
    for view, x in zip(flat.split(moment, SHAPES), state["exp_avgs"], strict=True):
        view.copy_(x)
    NATIVE[1](**(state | {"exp_avgs": [moment]}), **arguments)
    NATIVE[1](**other, **arguments)
    assert_same(state["params"], other["params"])
    assert_same(flat.split(moment, SHAPES), other["exp_avgs"])
    assert int((moment == 7.0).sum()) == total - sum(p.numel() for p in state["params"])


def test_joined_knows_its_views_and_no_others():
    views = flat.join([torch.rand(3, 5), torch.rand(0), torch.rand(16)])
    whole = flat.joined(views)
    assert whole.shape == (32,) and whole.data_ptr() == views[0].data_ptr()
    apart = [x.clone() for x in views]
    for others in (views[:1], views[:2], views[::-1], apart, [*views[:2], apart[2]],
                   [views[0].view(5, 3).t(), *views[1:]], [views[2], *views]):
        assert flat.joined(others) is None


def states_of(opt):
    return [x for state in opt.state.values() for name, x in state.items() if name != "step"]


def tensors_of_each_state(opt):
    return [[len(states) for states in bucket.kernel_states] for bucket in opt._buckets
            if isinstance(bucket, QuantizedBucket)]


def trained(before_step, missing=2):
    """A model after five steps; the first of its weights has no gradient in one of them."""
    model = make_model()
    first, *rest = (p for p in model.parameters() if p.dim() > 1)
    opt = blaq.BLAQ([{"params": [first, rest[0]], "bits": 2}])
    for step in range(5):
        if step == 1:
            opt.add_param_group({"params": rest[1:], "bits": 1, "group_size": -1})
        first.requires_grad_(step != missing)
        before_step(step, opt)
        opt.step(make_closure(model, opt))
    return model, opt


def test_the_optimizer_gathers_states_and_lets_go_where_a_gradient_is_missing(monkeypatch):
    seen = []
    model, opt = trained(lambda step, opt: seen.append(tensors_of_each_state(opt)))
    together, alone = [1] * 4, [1] * 4
    assert seen[:3] == [[together], [together, alone], [together, alone]]
    monkeypatch.setattr(_buckets, "MOST_GATHERED", 0)
    expected = trained(lambda step, opt: seen.append(tensors_of_each_state(opt)))
    assert seen[5] == [[2] * 4]
    assert_same(snapshot(model, opt), snapshot(*expected))


def test_loading_gathers_again():
    _, opt = trained(lambda step, opt: None, missing=None)
    views = states_of(opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(states_of(opt), views)
    assert states_of(opt)[0] is not views[0]
    first = opt.param_groups[0]["params"]
    assert flat.joined([opt.state[p]["latent"] for p in first]) is not None


def test_files_and_pickles_are_as_large_as_their_tensors():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(32, 8)) for _ in range(50)]
    opt = blaq.BLAQ([{"params": weights, "bits": 2, "group_size": -1}])
    assert tensors_of_each_state(opt) == [[1] * 4]
    size = sum(x.nbytes for x in states_of(opt))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    assert size < len(file.getvalue()) < 1.5 * size + 200 * len(states_of(opt))
    assert size < len(pickle.dumps(opt)) < 2 * size + 1000 * len(states_of(opt))

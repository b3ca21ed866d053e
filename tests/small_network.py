"""A small network, its training step and bitwise comparison, for tests of training."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import blaq
from blaq_kernels import reference as ref


def make_model(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(dropout), nn.Linear(4 * 16, 9), nn.ReLU(),
                         nn.Linear(9, 3)).to(dtype)


def make_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 1, 6, 6, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (16,), generator=generator)


def make_closure(model, opt, calls=None):
    x, y = make_batch(next(model.parameters()).dtype)

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(x).float(), y)
        loss.backward()
        if calls is not None:
            calls.append(loss.item())
        return loss

    return closure


def make_optimizer(model, **options):
    bits = options.pop("bits", {"0": 2, "5": 1, "7": 8})
    group_size = options.pop("group_size", 0)
    return blaq.BLAQ(blaq.param_groups(model, bits=bits, group_size=group_size),
                     **{"lr": 1e-2, **options})


def assert_same(a, b):
    """Bitwise, for state_dicts and lists of tensors, nested."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def snapshot(model, opt):
    return copy.deepcopy((model.state_dict(), opt.state_dict()))


def assert_param_is_quantized_latent(opt):
    """The invariant: ``param == round(level × scale)`` of the codes of (latent, scale)."""
    for group in opt.param_groups:
        for param in group["params"]:
            if group["bits"] is not None:
                state, levels = opt.state[param], blaq.levels_for(group["codebook"], group["bits"])
                expected = ref.fake_quantize(state["latent"], state["scale"], levels,
                                             group["group_size"])
                assert torch.equal(param, expected.to(param.dtype))

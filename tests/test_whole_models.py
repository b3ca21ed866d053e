"""Whole networks, packed: in inference mode, through torch.compile and torch.export."""

import functools

import pytest
import torch

import blaq
from blaq.train.models import build

SHAPES = {"mlp4": (1, 28, 28), "lenet5": (1, 28, 28), "vgg-small": (3, 16, 16),
          "resnet18": (3, 32, 32)}


@functools.cache
def packed(name, bits):
    """A narrow network, its batches, and what float weights of the same values make of them."""
    torch.manual_seed(0)
    model = build(name, 10, SHAPES[name], width=0.1).eval()
    blaq.BLAQ(blaq.param_groups(model, bits=bits))
    batches = [torch.randn(count, *SHAPES[name]) for count in (3, 5)]
    with torch.inference_mode():
        expected = [model(x) for x in batches]
    return blaq.pack(model), batches, expected


def close(actual, expected):
    """Accuracy high: 4e-4 a layer, that some twenty layers add up."""
    return float((actual.detach() - expected).norm() / expected.norm()) < 4e-3


@pytest.fixture(params=[(name, bits) for name in SHAPES for bits in (1, 2, 4)],
                ids=lambda p: f"{p[0]}-{p[1]}")
def network(request):
    return packed(*request.param)


def test_inference_mode(network):
    model, batches, expected = network
    with torch.inference_mode():
        assert all(close(model(x), y) for x, y in zip(batches, expected, strict=True))
        again = model(batches[0].to(memory_format=torch.channels_last))
    assert close(again, expected[0])


def test_compiled_whole(network):
    model, batches, expected = network
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.inference_mode():
        assert all(close(compiled(x), y) for x, y in zip(batches, expected, strict=True))


def test_exported_with_any_batch(network):
    model, batches, expected = network
    program = torch.export.export(model, (batches[0],),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    assert all(close(exported(x), y) for x, y in zip(batches, expected, strict=True))

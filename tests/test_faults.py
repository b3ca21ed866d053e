"""Packed layers where things go wrong: bad rows, odd memory, threads, forks, small processors."""

import multiprocessing
import sys
import threading

import pytest
import torch
from quantized import quantize_
from torch import nn
from torch.nn import functional as F

import blaq
import blaq_kernels

pytestmark = pytest.mark.skipif(not blaq_kernels.cpu_capabilities(), reason="needs C++ kernels")
BUDGET = {"exact": 1e-6, "high": 4e-4, "fast": 1.2e-2}


def layers(bits):
    """A linear and a convolutional layer, an input of each, and the float weights' results."""
    torch.manual_seed(bits)
    for layer, x in ((nn.Linear(200, 100), torch.randn(9, 200)),  # too many outputs to be decoded
                     (nn.Conv2d(24, 70, 3, padding=1), torch.randn(5, 24, 6, 7))):
        quantize_(layer, "pow2", bits)
        function = F.linear if x.dim() == 2 else lambda *a: F.conv2d(*a, padding=1)
        yield blaq.pack(nn.Sequential(layer))[0], x, function


def relative_error(actual, expected):
    return float((actual.detach().double() - expected).norm() / expected.norm())


def exact(layer, x, function):
    return function(x.double(), layer.weight.double(), layer.bias.detach().double())


@pytest.fixture(params=["exact", "high", "fast"])
def accuracy(request):
    before = blaq.get_accuracy()
    blaq.set_accuracy(request.param)
    yield request.param
    blaq.set_accuracy(before)


@pytest.mark.parametrize("bits", [1, 2, 4])
@torch.inference_mode()
def test_rows_that_are_no_number_zero_or_tiny_stay_by_themselves(bits, accuracy):
    for layer, x, function in layers(bits):
        clean = layer(x)
        bad = x.clone()
        bad[0].flatten()[17], bad[1].flatten()[3], bad[2] = torch.nan, -torch.inf, 0
        bad[3] *= 1e-41  # subnormal
        actual, expected = layer(bad), function(bad, layer.weight, layer.bias)
        assert torch.equal(actual.isnan(), expected.isnan()) and actual[0].isnan().any()
        assert torch.equal(actual.isinf(), expected.isinf())
        assert torch.equal(actual[4:], clean[4:])
        torch.testing.assert_close(actual[2:4], expected[2:4])


@pytest.mark.parametrize("bits", [1, 2, 4])
@torch.inference_mode()
def test_an_input_that_is_subnormal_as_a_whole(bits, accuracy):
    for layer, x, function in layers(bits):
        layer.bias = None
        tiny, weight = x * 1e-41, layer.weight
        expected = function(tiny.double(), weight.double())
        assert (layer(tiny).double() - expected).abs().max() < 1e-42


@pytest.mark.parametrize("bits", [1, 2, 4])
@torch.inference_mode()
def test_misaligned_and_strided_inputs_and_weights(bits, accuracy):
    for layer, x, _ in layers(bits):
        expected = layer(x)
        odd = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        strided = torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        for other in (odd, strided, turned):
            assert torch.equal(layer(other), expected)
        for name in ("qweight", "scale"):
            old = getattr(layer, name)
            moved = torch.empty(old.nbytes + 4, dtype=torch.uint8)
            moved = moved[1 if name == "qweight" else 4:][:old.nbytes].view(old.dtype)
            setattr(layer, name, moved.view(old.shape).copy_(old))
        assert torch.equal(layer(x), expected)


def test_an_empty_batch(accuracy):
    for layer, x, _ in layers(2):
        assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("bits", [1, 2, 4])
@torch.inference_mode()
def test_every_processor_that_this_one_can_play(bits, accuracy):
    before = blaq_kernels.cpu_capability()
    try:
        for layer, x, function in layers(bits):
            for name in (*blaq_kernels.cpu_capabilities(), before):  # a call, then another's layout
                blaq_kernels.set_cpu_capability(name)
                assert relative_error(layer(x), exact(layer, x, function)) < BUDGET[accuracy], name
    finally:
        blaq_kernels.set_cpu_capability(before)


def test_first_calls_from_many_threads():
    for layer, x, function in layers(2):
        barrier, results = threading.Barrier(8), [None] * 8

        def run(i, layer=layer, x=x, barrier=barrier, results=results):
            barrier.wait()
            with torch.inference_mode():
                results[i] = layer(x)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, results[0]) for result in results)
        assert relative_error(results[0], exact(layer, x, function)) < BUDGET["high"]


def _in_child(layer, x, queue):
    torch.set_num_threads(1)  # as torch's own loaders do: OpenMP's threads stay behind in a fork
    queue.put(layer(x).numpy())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@torch.inference_mode()
def test_a_fork_after_the_first_call():
    context = multiprocessing.get_context("fork")
    for layer, x, _ in layers(1):
        expected, queue = layer(x), context.SimpleQueue()
        child = context.Process(target=_in_child, args=(layer, x, queue))
        child.start()
        child.join(60)
        assert child.exitcode == 0 and torch.equal(torch.from_numpy(queue.get()), expected)


@torch.no_grad()
def test_a_layer_of_few_outputs_follows_its_tensors():
    torch.manual_seed(0)
    layer = blaq.pack(nn.Sequential(quantize_(nn.Linear(200, 10), "pow2", 2)))[0]
    x = torch.randn(3, 200)
    assert relative_error(layer(x), exact(layer, x, F.linear)) < BUDGET["exact"]
    kept = layer.bytes_repacked
    assert kept >= 4 * 2000 and layer(x) is not None and layer.bytes_repacked == kept
    layer.scale *= 2
    layer.qweight[-1] ^= 255
    assert relative_error(layer(x), exact(layer, x, F.linear)) < BUDGET["exact"]
    layer.scale = layer.scale / 3
    assert relative_error(layer(x), exact(layer, x, F.linear)) < BUDGET["exact"]

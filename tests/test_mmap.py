"""load(mmap=True): codes stay in the file; what becomes of them when the file changes."""

import copy
import os
import signal
import sys

import pytest
import torch
from quantized import quantize_, same_bits, small_net
from torch import nn

import blaq
import blaq_kernels

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def wide_net(known=True):
    torch.manual_seed(0)
    binary = quantize_(nn.Linear(512, 1024), "binary", 1, -1, known)
    return nn.Sequential(quantize_(nn.Linear(2048, 512), "pow2", 2, 0, known), nn.ReLU(),
                         blaq.BinaryActivation(), binary).eval()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    blaq.save(blaq.pack(wide_net()), path)
    return path


def mapping(tensor):
    """The lines of /proc/self/smaps about the memory that holds the tensor, by name."""
    at, inside, fields = tensor.data_ptr(), False, {}
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            name, *rest = line.split()
            if not name.endswith(":"):
                first, last = (int(x, 16) for x in name.split("-"))
                inside = first <= at < last
                if inside:
                    fields["file"] = rest[-1]
            elif inside:
                fields[name[:-1]] = rest[0]
    return fields


@needs_linux
def test_codes_stay_in_the_file_and_everything_else_is_as_without(saved):
    model, plain = blaq.load(saved, wide_net(False), mmap=True), blaq.load(saved, wide_net(False))
    assert type(model[3]) is blaq.PackedBinaryLinear
    for layer in (model[0], model[3]):
        assert mapping(layer.qweight)["file"] == str(saved)
        assert mapping(layer.scale)["file"] != str(saved)
    assert mapping(plain[0].qweight)["file"] != str(saved)
    x = torch.randn(3, 2048)
    assert torch.equal(model(x), plain(x))
    states = model.state_dict(), plain.state_dict()
    assert all(same_bits(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    blaq.save(model, saved.with_name("again"))
    assert saved.with_name("again").read_bytes() == saved.read_bytes()


@needs_linux
@pytest.mark.skipif(not blaq_kernels.has_int8(), reason="these kernels read the planes themselves")
def test_pages_go_back_once_repacked_and_come_again_when_read(saved):
    layer = blaq.load(saved, wide_net(False), mmap=True)[0]
    codes = layer.qweight.clone()
    before = int(mapping(layer.qweight)["Rss"])
    assert before >= layer.qweight.nbytes >> 10
    assert blaq.summary(layer).bytes_repacked == layer.bytes_repacked == 0
    x = torch.randn(3, 2048)
    expected = layer(x)
    if int(mapping(layer.qweight)["Rss"]) == before:
        pytest.skip("this file system keeps a file's pages in memory")
    assert int(mapping(layer.qweight)["Rss"]) <= before - (layer.qweight.nbytes >> 10) + 8
    assert blaq.summary(layer).bytes_repacked == layer.bytes_repacked >= layer.qweight.nbytes
    assert torch.equal(layer(x), expected) and torch.equal(layer.qweight, codes)


def test_a_file_replaced_or_deleted_is_still_the_old_one_to_who_loaded_it(saved):
    model, x = blaq.load(saved, wide_net(False), mmap=True), torch.randn(3, 2048)
    expected = blaq.load(saved, wide_net(False))(x)
    torch.manual_seed(1)
    blaq.save(blaq.pack(small_net(seed=1)), saved)
    saved.unlink()
    assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


def test_writing_to_the_codes_leaves_the_file_and_repacks(saved):
    layer, content = blaq.load(saved, wide_net(False), mmap=True)[0], saved.read_bytes()
    x = torch.randn(3, 2048)
    first = layer(x)
    with torch.no_grad():
        layer.qweight[-1] ^= 255  # every sign
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - first)
    assert torch.equal(layer.qweight[-1], blaq.load(saved, wide_net(False))[0].qweight[-1] ^ 255)
    assert saved.read_bytes() == content


def test_copies_are_in_memory(saved):
    layer, x = blaq.load(saved, wide_net(False), mmap=True)[0], torch.randn(3, 2048)
    copied = copy.deepcopy(layer)
    assert layer.mapped is layer.qweight and copied.mapped is None
    assert torch.equal(copied(x), layer(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_cut_short_kills_the_process_and_no_wrong_number_comes_out(saved):
    qweight = blaq.load(saved, wide_net(False), mmap=True)[0].qweight
    last = memoryview(qweight.numpy()).cast("B")[-4096:]
    os.truncate(saved, 4096)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # pytest's would print a trace
        bytes(last)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS

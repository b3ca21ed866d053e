"""Which CUDA C++ kernels serve what, on a machine that need not have a GPU."""

import importlib.util
import logging
import os
import subprocess
import sys

import blaq
import pytest
import torch
from torch._subclasses import FakeTensorMode

import blaq_kernels
from blaq_kernels import cuda, fragments, packed_rules
from blaq_kernels.codebook import levels_of
from blaq_kernels.cuda.binary_linear import binary_linear
from blaq_kernels.cuda.packed_linear import packed_linear
from blaq_kernels.cuda.repack import repack

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment},
                          capture_output=True, text=True)


@NO_GPU
def test_asking_for_cuda_kernels_where_none_can_run_is_an_error():
    done = run("import blaq_kernels", BLAQ_BACKEND="cuda")
    assert "BLAQ_BACKEND=cuda must find CUDA C++ kernels, got: " + cuda.unavailable() in done.stderr


def test_auto_does_not_choose_them():
    """No GPU has run them."""
    code = ("import blaq_kernels as b; print(*b.serving('cuda').values(), sep='|'); "
            "import torch; print(hasattr(torch.ops.blaq_cuda, 'packed_linear'))")
    done = run(code, BLAQ_BACKEND="auto")
    assert "CUDA C++" not in done.stdout and done.stdout.endswith("False\n"), done.stderr


@pytest.mark.skipif(importlib.util.find_spec("blaq_kernels._cuda") is None,
                    reason="blaq_kernels._cuda was not built")
def test_the_library_needs_neither_a_gpu_nor_a_cuda_runtime():
    path = importlib.util.find_spec("blaq_kernels._cuda").origin
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    assert "libtorch.so" in needed and "libcudart" not in needed and "libcuda.so" not in needed


@pytest.mark.parametrize("capability,has_code", [((8, 0), True), ((8, 9), True), ((9, 0), True),
                                                 ((10, 0), True), ((12, 0), True), ((7, 5), False),
                                                 ((10, 3), False), ((12, 1), False)])
def test_a_device_of_another_architecture_is_told_once(capability, has_code, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda.covers.cache_clear()
    with caplog.at_level(logging.INFO, "blaq"):
        assert [cuda.covers(torch.device("cuda:0")) for _ in range(3)] == [has_code] * 3
    cuda.covers.cache_clear()
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (0 if has_code else 1)
    assert has_code or "no code for cuda:0, compute capability" in said[0]


def meta_call(m, dtype, repacked=True, bits=2, **changes):
    """Arguments of packed_linear on the meta device, where rules are checked as on a GPU."""
    levels, n, k = levels_of("pow2", bits), 40, 100
    qweight = torch.empty(bits, n, 13, dtype=torch.uint8, device="meta")
    size = packed_rules.repacked_bytes(*qweight.shape, qweight.device.type)
    args = {"input": torch.empty(m, k, dtype=dtype, device="meta"), "qweight": qweight,
            "scale": torch.empty(n, 1, device="meta"), "bias": None, "levels": levels,
            "group_size": -1,
            "repacked": torch.empty(size, dtype=torch.uint8, device="meta") if repacked else None}
    return {**args, **changes}


@pytest.fixture
def kernels(monkeypatch):
    """Stands for the library: says what would have been called."""
    calls = []

    class Op:
        def __init__(self, name):
            self.default = lambda *args: calls.append(name) or name

    class Ops:
        packed_linear, repack = Op("packed_linear"), Op("repack")
        packed_int8, binary_linear = Op("packed_int8"), Op("binary_linear")

    monkeypatch.setattr(torch.ops, "blaq_cuda", Ops, raising=False)
    monkeypatch.setattr(cuda, "covers", lambda device: True)
    monkeypatch.setattr(cuda, "major", lambda device: 9)
    return calls


def call(**args):
    return packed_linear(lambda *_: "otherwise", *args.values())


def test_what_the_kernel_covers_reaches_it_and_the_rest_does_not(kernels):
    for dtype in (torch.float16, torch.bfloat16):
        assert [call(**meta_call(m, dtype)) for m in (1, 64)] == ["packed_linear"] * 2
        assert call(**meta_call(65, dtype)) == "otherwise"
        assert call(**meta_call(1, dtype, repacked=False)) == "otherwise"
    assert call(**meta_call(1, torch.float32)) == "otherwise"
    assert repack(lambda _: "otherwise", torch.zeros(1, 2, 3, dtype=torch.uint8)) == "repack"


def test_many_rows_are_rounded_to_8_bits_where_that_is_asked_for(kernels):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for repacked in (False, True):
            fast = {"repacked": repacked, "accuracy": "fast"}
            assert call(**meta_call(65, dtype, **fast)) == "packed_int8"
            assert call(**meta_call(65, dtype, repacked=repacked, accuracy="high")) == "otherwise"
            few = "packed_linear" if repacked and dtype != torch.float32 else "otherwise"
            assert call(**meta_call(64, dtype, **fast)) == few
    for group_size, kernel in ((32, "otherwise"), (128, "packed_int8"), (192, "otherwise")):
        scale = torch.empty(40, -(-100 // group_size), device="meta")
        grouped = {"group_size": group_size, "scale": scale, "accuracy": "fast"}
        assert call(**meta_call(65, torch.float16, **grouped)) == kernel


def test_what_integers_cannot_do_goes_elsewhere(kernels, monkeypatch):
    """Books with codes that have no level, and devices whose int8 rate other instructions have."""
    fast = {"accuracy": "fast"}
    three = {"bits": 3, "levels": (0.25, 0.5, 1.0)}
    assert call(**meta_call(100, torch.float16, **three, **fast)) == "otherwise"
    for major, kernel in ((8, "packed_int8"), (12, "packed_int8"), (10, "otherwise")):
        monkeypatch.setattr(cuda, "major", lambda device, major=major: major)
        assert call(**meta_call(101 + major, torch.float16, **fast)) == kernel


def test_signs_reach_their_kernel_with_a_weight_in_its_order(kernels):
    args = [torch.empty(3, 100, device="meta"), torch.empty(1, 40, 13, dtype=torch.uint8, device="meta"),
            torch.empty(1, device="meta"), None, 0]
    assert binary_linear(lambda *_: "otherwise", *args) == "binary_linear"
    with pytest.raises(ValueError, match="blaq.binary_linear: group_size must"):
        binary_linear(lambda *_: "otherwise", *args[:4], 33)


def test_rules_are_those_of_every_backend(kernels):
    good = meta_call(1, torch.float16)
    for name, bad, rule in (("scale", torch.empty(7, 1, device="meta"), r"have shape \[40, 1\]"),
                            ("bias", torch.empty(3, device="meta").half(), r"have shape \[40\]"),
                            ("repacked", torch.empty(5, dtype=torch.uint8, device="meta"), "have shape"),
                            ("levels", [0.3, 0.1], "ascending")):
        with pytest.raises(ValueError, match=f"blaq.packed_linear: {name} must .*{rule}"):
            call(**{**good, name: bad})
    assert kernels == []


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_what_repack_makes_on_a_gpu_passes_the_rules(bits):
    with FakeTensorMode():
        qweight = torch.empty(bits, 37, 13, dtype=torch.uint8, device="cuda")
        x, scale = (torch.empty(*s, device="cuda") for s in ((3, 100), (37, 1)))
        args = x, qweight, scale, None, levels_of("pow2", bits), -1
        repacked = torch.ops.blaq.repack(qweight)
        packed_rules.check_packed_linear(*args, repacked)
        short = torch.empty(repacked.numel() - 1, dtype=torch.uint8, device="cuda")
        with pytest.raises(ValueError, match="repacked must have shape"):
            packed_rules.check_packed_linear(*args, short)


@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_a_repacked_weight_that_no_wide_load_fits_is_not_read(kernels, offset):
    args = meta_call(1, torch.float16)
    memory = torch.empty(args["repacked"].numel() + offset + 16, dtype=torch.uint8)
    at = -memory.data_ptr() % 16 + offset
    args["repacked"] = memory[at:at + args["repacked"].numel()]
    assert call(**args) == ("otherwise" if offset % 16 else "packed_linear")


def test_out_of_memory_while_repacking_changes_nothing(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(40, 24))
    with torch.no_grad():
        model[0].weight.copy_(torch.where(torch.rand(24, 40) < 0.5, -0.25, 0.25))
    layer = blaq.pack(model, bits=1)[0]
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    x = torch.randn(2, 40)
    with monkeypatch.context() as short_of_memory:
        def repack():
            raise torch.OutOfMemoryError("CUDA out of memory")

        short_of_memory.setattr(layer, "_wants_repacked", lambda qweight: True)
        short_of_memory.setattr(layer, "_repack", repack)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                layer.repacked()
        assert layer._repacked is None
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    dense = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - dense).norm() <= 1e-2 * dense.norm()


def test_a_repacked_weight_has_the_size_that_the_fake_says():
    for bits in (1, 2, 3, 4):
        qweight = torch.randint(0, 256, (bits, 21, 37), dtype=torch.uint8)
        size = packed_rules.repacked_bytes(bits, 21, 37, "cuda")
        assert fragments.repack(qweight).shape == (size,)


def test_serving_names_what_a_kernel_covers():
    assert "64 rows" in cuda.serving("packed_linear") and cuda.serving("repack") == "CUDA C++"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    if blaq_kernels.dispatch.requested_backend() != "cuda":
        pytest.skip("BLAQ_BACKEND is not cuda")
    assert blaq_kernels.serving("cuda")["packed_linear"].startswith("CUDA C++")

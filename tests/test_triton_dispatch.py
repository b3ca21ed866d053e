"""Which backend serves: chosen in one place, visible, and never silently another one."""

import contextlib
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import blaq_kernels
from blaq_kernels import device, dispatch, triton

ABSENT = triton.unavailable()


def run(code, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BLAQ_", "TRITON_"))}
    return subprocess.run([sys.executable, "-c", code], env={**env, **variables}, text=True,
                          capture_output=True)


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_triton_serves_cuda_tensors_and_is_not_imported(backend):
    done = run("import blaq_kernels, sys; assert 'triton' not in sys.modules; "
               "print(set(blaq_kernels.serving('cuda').values()))", BLAQ_BACKEND=backend)
    assert "Triton" in done.stdout, done.stderr


def test_reference_serves_where_it_was_asked_for():
    done = run("import blaq_kernels; print(blaq_kernels.serving('cuda'), blaq_kernels.serving())",
               BLAQ_BACKEND="reference")
    assert "reference (BLAQ_BACKEND=reference)" in done.stdout and "Triton" not in done.stdout


WITHOUT = "import sys, importlib.util as u; find = u.find_spec\n" \
          "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
OLD = "import importlib.metadata as m; version = m.version\n" \
      "m.version = lambda name: '3.5.1' if name == 'triton' else version(name)\n"


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
@pytest.mark.parametrize("change,why", [(WITHOUT, "Triton is not installed"),
                                        (OLD, "Triton 3.5.1 is older than 3.6")])
def test_without_triton_the_reference_serves_and_says_why(change, why):
    done = run(change + "import blaq_kernels; print(blaq_kernels.serving('cuda')['blend'])")
    assert done.stdout.strip() == f"reference ({why})", done.stderr
    done = run(change + "import blaq_kernels", BLAQ_BACKEND="triton")
    assert f"BLAQ_BACKEND=triton must find Triton 3.6 or newer, got: {why}" in done.stderr


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        blaq_kernels.serving("tpu")


@pytest.mark.parametrize("value", ["cudnn", "Triton", ""])
def test_an_unknown_backend_is_an_error(monkeypatch, value):
    monkeypatch.setenv("BLAQ_BACKEND", value)
    with pytest.raises(ValueError, match="BLAQ_BACKEND must be one of auto, triton, cuda, reference, "
                                         f"got '{value}'$"):
        dispatch.requested_backend()


def calls():
    """Every op on tensors that are small and, where a step is long, long enough for its kernels."""
    x, w = torch.rand(3, 16), torch.rand(3, 16)
    codes, scale = torch.zeros(3, 16, dtype=torch.uint8), torch.ones(3, 1)
    qweight = torch.zeros(1, 3, 2, dtype=torch.uint8)
    lr, step, half = torch.tensor(0.1), torch.tensor(1.0), torch.tensor(0.5)
    hyper = 0.9, 0.999, 1e-8, 0.0, 0.0, (0.5, 1.0), 0, 5, "alternating"
    lists = [[torch.rand(n) for n in (16, 9000)] for _ in range(6)]
    ones = [torch.ones(1), torch.ones(1)]
    return {"scaled_update": (x, x, w), "blend": (x, w, 0.5), "fake_quantize": (x, scale, (1.0,), -1),
            "solve": (x, w, None, (0.5, 1.0), -1, 3, "alternating"), "pack": (codes, 1),
            "unpack": (qweight, scale, (1.0,), -1, 16, torch.float32),
            "packed_linear": (x, qweight, scale, None, (1.0,), -1),
            "packed_conv2d": (torch.rand(1, 4, 3, 3), torch.zeros(1, 32, 2, dtype=torch.uint8),
                              torch.ones(1), None, (1.0,), 0, (2, 2), (1, 1), (0, 0), (1, 1), 1),
            "fused_trial": (*lists[:2], *lists[3:], ones, lr, step, *hyper),
            "fused_step": (*lists, ones, lr, step, half, *hyper)}


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
@pytest.mark.parametrize("name", triton.OPS)
def test_every_op_launches_on_the_device_of_its_tensors(name, monkeypatch):
    """Which need not be the current one: every kernel is started while it is."""
    launch = importlib.import_module("blaq_kernels.triton.launch")
    if not launch.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    from triton.runtime.interpreter import GridExecutor

    args = calls()[name]
    on, seen = [], []
    given = {x.data_ptr() for arg in args for x in (arg if isinstance(arg, list) else [arg])
             if isinstance(x, torch.Tensor)}

    @contextlib.contextmanager
    def guard(x):
        assert x.data_ptr() in given
        on.append(x)
        yield
        on.pop()

    monkeypatch.setattr(launch, "on_device_of", guard)
    monkeypatch.setattr(device, "on_device_of", guard)
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **options: seen.append(len(on)))
    getattr(importlib.import_module(f"blaq_kernels.triton.{name}"), name)(*args)
    assert seen and set(seen) == {1}


@pytest.mark.parametrize("current,entered", [(0, [torch.device("cuda", 1)]), (1, [])])
def test_a_device_that_is_not_current_becomes_so(monkeypatch, current, entered):
    seen = []

    @contextlib.contextmanager
    def guard(device):
        seen.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", guard)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), get_device=lambda: 1)
    with device.on_device_of(x):
        assert seen == entered


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
def test_every_device_has_machine_code_of_its_own():
    """What is kept of a call for one device is not launched on another."""
    linear = importlib.import_module("blaq_kernels.triton.packed_linear")
    plans = importlib.import_module("blaq_kernels.triton.linear_plans")
    kept = [linear._launches(1, torch.Size((1, 8, 8)), 64, 64, torch.float16, torch.device("cuda", i),
                             torch.float32, True, (1.0,), -1, plans.DECODE) for i in (0, 1, 0)]
    assert kept[0] is kept[2] and kept[0].multiply is not kept[1].multiply


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
@pytest.mark.parametrize("name,argument", [
    ("scaled_update", 1), ("scaled_update", 2), ("blend", 1), ("fake_quantize", 1), ("solve", 1),
    ("unpack", 1), ("packed_linear", 0), ("packed_linear", 2), ("packed_conv2d", 0), ("packed_conv2d", 2)])
def test_tensors_on_different_devices_are_an_error(name, argument):
    op = getattr(importlib.import_module(f"blaq_kernels.triton.{name}"), name)
    args = list(calls()[name])
    args[argument] = args[argument].to("meta")
    with pytest.raises(ValueError, match=rf"^blaq\.{name}: \w+ must be on .*, got (meta|cpu)$"):
        op(*args)


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
@pytest.mark.parametrize("name,argument", [
    ("scaled_update", 1), ("blend", 0), ("fake_quantize", 0), ("solve", 0), ("solve", 1), ("pack", 0),
    ("unpack", 0), ("packed_linear", 1), ("packed_conv2d", 1)])
def test_what_must_be_contiguous_is_said(name, argument):
    op = getattr(importlib.import_module(f"blaq_kernels.triton.{name}"), name)
    args = list(calls()[name])
    args[argument] = args[argument].mT.contiguous().mT
    with pytest.raises(ValueError, match=rf"^blaq\.{name}: \w+ must be contiguous, got strides \["):
        op(*args)


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
def test_every_listed_op_has_its_function():
    for name in triton.OPS:
        assert callable(getattr(importlib.import_module(f"blaq_kernels.triton.{name}"), name))

"""Which backend serves: chosen in one place, visible, and never silently another one."""

import os
import subprocess
import sys

import pytest

import blaq_kernels
from blaq_kernels import triton

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


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
def test_every_listed_op_has_its_function():
    import importlib
    for name in triton.OPS:
        assert callable(getattr(importlib.import_module(f"blaq_kernels.triton.{name}"), name))

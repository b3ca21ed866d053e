"""The NEON kernels of packed layers, compiled for aarch64 and run by an emulator."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.skipif(not COMPILER, reason="needs aarch64-linux-gnu-g++ (package g++-aarch64-linux-gnu)")
@pytest.mark.skipif(not EMULATOR, reason="needs qemu-aarch64 (package qemu-user-static)")
@pytest.mark.parametrize("target", ["armv8-a", "armv8.2-a+dotprod"])
def test_packed_rows_on_an_emulated_processor(target, tmp_path):
    program = tmp_path / "packed_int8"
    sources = [ROOT / name for name in ("tests/native/packed_int8.cpp", "tests/native/repack.cpp",
                                        "csrc/cpu/packed_int8.cpp", "csrc/cpu/capability.cpp")]
    headers = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    # Nothing that runs calls torch, of which there is no library for this processor.
    subprocess.run([COMPILER, f"-march={target}", "-std=c++20", "-O1", "-ffp-contract=off",
                    "-static", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", *headers,
                    *map(str, sources), "-Wl,--unresolved-symbols=ignore-all", "-o", str(program)],
                   check=True, timeout=300)
    run = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "108 checks of neon, NEON: 0 failures\n"

"""The contract in machine code of CUDA kernels, for GPUs that are not here."""

import importlib.util
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from blaq_kernels import sass
from blaq_kernels.cuda import contract

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")


def missing():
    if NVCC is None:
        return "nvcc is not installed"
    try:
        sass.tool("nvdisasm"), sass.tool("cuobjdump")
    except FileNotFoundError as error:
        return str(error)
    return ""


needs_tools = pytest.mark.skipif(bool(missing()), reason=missing())
FAULTS = """
__global__ void spilling(float* x, int n) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i];
  for (int i = 0; i < n; ++i) kept[i * n % 64] += kept[i % 63];
  for (int i = 0; i < 64; ++i) x[i] = kept[i];
}
__global__ void looping(float* x) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  x[threadIdx.x] = sum;
}
"""


def compiled(folder, name, source):
    (folder / f"{name}.cu").write_text(source)
    out = folder / f"{name}.cubin"
    subprocess.run([NVCC, "-O3", "-std=c++20", "-fmad=false", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", "-cubin",
                    folder / f"{name}.cu", "-o", out], check=True, capture_output=True)
    return out.read_bytes()


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    kernels = "\n".join(
        f"template __global__ void blaq::packed_linear_kernel<{bits}, blaq::{dtype}, 1>"
        "(const __grid_constant__ blaq::PackedLinear);" for bits, dtype in ((1, "Bf16"), (4, "Fp16")))
    return compiled(tmp_path_factory.mktemp("linear"), "linear",
                    f'#include "cuda/packed_linear_kernel.h"\n{kernels}\n')


@needs_tools
def test_products_keep_their_contract(linear):
    rows = list(contract.measure(linear))
    assert [(row.name, row.architecture, row.faults) for row in rows] == [
        ("packed_linear W1 Bf16, 1 × 8 rows", 90, ()), ("packed_linear W4 Fp16, 1 × 8 rows", 90, ())]
    assert all(row.wide_loads and row.tensor_cores for row in rows)
    assert rows[0].per_weight[0] < rows[1].per_weight[0]


@needs_tools
def test_training_kernels_keep_their_contract(tmp_path):
    kernels = "\n".join(f"template __global__ void blaq::{kernel}(const blaq::Call);" for kernel in (
        "update_parts<blaq::F32, true, false>", "update_parts<blaq::B16, false, true>",
        "write_parts<blaq::F16, true>"))
    rows = list(contract.measure(compiled(tmp_path, "step",
                                          f'#include "cuda/step_kernel.h"\n{kernels}\n')))
    ours = {row.name: row for row in rows if row.per_weight}
    assert not [(row.name, row.faults) for row in rows if row.faults]
    assert list(ours) == ["fused_step, second pass, F16", "fused_trial, first pass, 1 bit, B16",
                          "fused_step, first pass, levels, F32"]
    assert all(row.wide_loads for row in ours.values())


@needs_tools
def test_products_of_bytes_keep_their_contract(tmp_path):
    """By warpgroups, with sums in registers beside the integers: 4 bits take most."""
    source = ('#include "cuda/int8_warpgroup_kernel.h"\ntemplate __global__ void '
              "blaq::int8_warpgroup_kernel<4>(const __grid_constant__ blaq::Int8Clusters);\n")
    rows = {row.name: row for row in contract.measure(compiled(tmp_path, "int8", source))}
    row = rows["packed_linear in 8 bits by warpgroups W4"]
    assert not row.faults and row.tensor_cores == 8 and row.registers <= 168


@needs_tools
def test_a_broken_contract_is_reported(linear, monkeypatch):
    strict = replace(contract.RULES[0], logic={"1Bf16": 0.01}, tensor_core="BMMA")
    monkeypatch.setattr(contract, "RULES", [strict])
    assert "no BMMA" in next(contract.measure(linear)).faults
    monkeypatch.setattr(contract, "RULES", [replace(strict, tensor_core="HMMA")])
    assert any("a weight, budget 0.01" in fault for fault in next(contract.measure(linear)).faults)


@needs_tools
def test_spills_and_atomics_made_of_loops_are_reported(tmp_path):
    faults = {row.name: " ".join(row.faults) for row in contract.measure(compiled(tmp_path, "bad", FAULTS))}
    assert "spills to local memory" in faults["_Z8spillingPfi"]
    assert "atomics made of loops" in faults["_Z7loopingPf"]


@needs_tools
@pytest.mark.skipif(importlib.util.find_spec("blaq_kernels._cuda") is None,
                    reason="blaq_kernels._cuda was not built")
def test_everything_that_ships_keeps_its_contract():
    rows = [row for cubin in contract.cubins([]) for row in contract.measure(cubin)]
    assert rows and not [(row.name, row.architecture, row.faults) for row in rows if row.faults]

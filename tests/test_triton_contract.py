"""The contract in machine code: compiled here for GPUs that are not, in a process of its own, because
this one may have Triton's interpreter."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blaq_kernels import triton

pytestmark = pytest.mark.skipif(bool(triton.unavailable()), reason=triton.unavailable())


def contract(*options):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "blaq_kernels.triton.contract", *options], env=env,
                          capture_output=True, text=True)


def test_every_kernel_keeps_its_contract_on_one_architecture():
    done = contract("--cc", "90")
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert rows, done.stderr
    if importlib.metadata.version("triton").startswith("3.6."):  # for which the contract is made
        assert done.returncode == 0 and all(row[-2].strip() == "yes" for row in rows), done.stdout


def test_a_sample_keeps_its_contract_on_other_architectures():
    done = contract("--cc", "80", "100", "120", "--sample", "4")
    found = {line.split("|")[2].strip() for line in done.stdout.splitlines()[2:]}
    assert found == {"80", "100", "120"}, done.stderr
    if importlib.metadata.version("triton").startswith("3.6."):
        assert done.returncode == 0, done.stdout


def test_the_kept_table_is_of_these_kernels():
    from blaq_kernels.triton.contract import cases

    text = (Path(__file__).parents[1] / "docs" / "gpu-status.md").read_text()
    table = text[text.index("python -m blaq_kernels.triton.contract\n"):].split("\n\n")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {row[-1] for row in rows} == {"yes"}
    kept = [(row[0], row[1], row[2].split("(")[1]) for row in rows]
    assert kept == [(case.name, str(cc), f"{case.budget:g})") for case in cases()
                    for cc in case.architectures]


def test_what_a_first_call_on_a_gpu_would_compile_compiles():
    """From the arguments that ops really pass, by Triton's own rules of specialisation."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("triton_offline.py")], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "step_short_groups" in done.stdout, done.stderr


def test_a_broken_contract_is_reported():
    code = ("from dataclasses import replace; from blaq_kernels.triton import contract, blend\n"
            "case = replace(blend.contract()[0], budget=1.0, tensor_cores=True)\n"
            "print(contract.measure(case, 80).faults())")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert "no tensor-core instruction" in out and "instructions an element, budget 1" in out


def test_instructions_in_loops_count_as_often_as_they_run():
    pytest.importorskip("triton.backends.nvidia")
    from blaq_kernels import sass

    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   BRA `(.L_x_2);
        /*0050*/                   NOP;
"""
    code = sass.parse(listing)
    assert [one.opcode for one in code] == ["MOV", "FADD", "BRA", "EXIT"]
    assert sass.executed(code, (1,)) == 4 and sass.executed(code, (10,)) == 22

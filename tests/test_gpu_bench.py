"""What bench/gpu.sh times and writes, as far as a machine without a GPU can tell."""

import importlib
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_products_that_are_timed(bench):
    linear = bench("gpu_linear")
    cases = list(linear.cases())
    assert {m for _, m, *_ in cases} == {1, 16, 64, 256, 1024, 4096}
    assert {dtype for *_, dtype in cases} == {torch.bfloat16, torch.float16}
    assert {bits for *_, bits, _ in cases} == {1, 2, 4}
    shapes = {(n, k) for _, _, n, k, *_ in cases}
    assert {(8192, 8192), (4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)} <= shapes
    assert len({name for name, *_ in cases}) == len(cases)
    assert set(linear.PEERS) == {"gemlite", "bitsandbytes", "torchao"}


def test_steps_that_are_timed(bench):
    sizes = bench("gpu_step").SIZES
    counts = {name: sum(map(math.prod, shapes)) for name, shapes in sizes.items()}
    assert len(sizes["ResNet-50"]) == 161 and counts["ResNet-50"] == 25_557_032
    for name, count in (("10M", 1e7), ("100M", 1e8), ("1B", 1e9)):
        assert counts[name] == pytest.approx(count, rel=1e-3)


def test_results_are_a_table_json_and_a_roofline(bench, tmp_path):
    pytest.importorskip("matplotlib")

    def row(section, case, variant, microseconds, **extra):
        return {"section": section, "case": case, "variant": variant, "microseconds": microseconds,
                "graph": variant != "gemlite", "bytes": 8e6, "operations": 2e9, **extra}

    report = {
        "environment": {"gpu": "A card", "date": "today", "torch": "2.11", "triton": "3.6.0",
                        "cuda": "13.0", "commit": "abc", "dirty": False},
        "card": {"copy_bytes_per_second": 4e12, "bfloat16_operations_per_second": 8e14,
                 "float16_operations_per_second": 8e14},
        "host_microseconds": {"packed_linear 64x64": 9.04},
        "failures": {"a case": "RuntimeError: no"},
        "rows": [row("packed_linear", "8192x8192", "blaq", 4.0, kernel="Triton", error=1e-3),
                 row("packed_linear", "8192x8192", "torch", 40.0),
                 row("packed_linear", "8192x8192", "gemlite", 6.0),
                 {**row("step", "10M", "fused_step", 100.0), "operations": 0}]}
    bench("gpu_report").write(tmp_path, report)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| packed_linear 64x64 | 9.0 |" in lines and "**a case failed**: RuntimeError: no" in lines
    assert "| 8192x8192 | blaq: Triton | 4.0 |  | 50% | 500.0 | 1.0e-03 |" in lines
    assert "| 8192x8192 | torch | 40.0 | 10.00× | 5% | 50.0 |  |" in lines
    assert "| 8192x8192 | gemlite (eager) | 6.0 | 1.50× | 33% | 333.3 |  |" in lines
    assert "| 10M | fused_step | 100.0 |  | 2% |  |  |" in lines
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_the_script_says_so_and_writes_nothing(tmp_path):
    done = subprocess.run(["bash", BENCH / "gpu.sh"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHON": "false", "OUT": str(tmp_path / "out")})
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == "bench/gpu.sh: a CUDA device must be there for false, got none\n"

"""Times the ops on the GPU that is here; bench/gpu.sh runs it. Ends by its deadline and writes what it
has: results.json, results.md and roofline.png.

  python bench/gpu.py --out bench/results/gpu --seconds 240
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_linear
import gpu_step
import torch
import triton
from gpu_report import write
from gpu_timing import Variant, copy_bandwidth, gemm_rate, host_microseconds, measure

import blaq_kernels
from blaq.bench.machine import describe
from blaq_kernels.codebook import levels_of

LINEAR_SHARE = 0.5  # of the time, for products; the steps get the rest
Task = tuple[str, Callable[[], list[dict[str, Any]]]]  # a case and its rows


def rows_of(section: str, case: str, variants: dict[str, Variant], deadline: float,
            **extra: Any) -> list[dict[str, Any]]:
    """Times the variants of one case."""
    times = measure(variants, deadline=deadline)
    rows = []
    for name, variant in variants.items():
        seconds = sorted(times[name])
        rows.append({"section": section, "case": case, "variant": name,
                     "microseconds": statistics.median(seconds) * 1e6,
                     "fastest": seconds[0] * 1e6, "slowest": seconds[-1] * 1e6,
                     "rounds": len(seconds), "graph": variant.captured, "bytes": variant.bytes,
                     "operations": variant.operations, **extra})
    return rows


def linear(deadline: float) -> Iterator[Task]:
    for case in gpu_linear.cases():
        if time.monotonic() > deadline:
            break

        def task(case: gpu_linear.Case = case) -> list[dict[str, Any]]:
            variants, extra = gpu_linear.build(case)
            return rows_of("packed_linear", case[0], variants, deadline, **extra)

        yield case[0], task


def steps(deadline: float) -> Iterator[Task]:
    for name, shapes in gpu_step.SIZES.items():
        for bits, group_size in ((1, 0), (2, -1), (4, 0)):
            count = sum(torch.Size(s).numel() for s in shapes)
            torch.cuda.empty_cache()
            if time.monotonic() > deadline or 48 * count > torch.cuda.mem_get_info()[0]:
                continue
            case = f"{name} W{bits} group {group_size}"

            def task(case: str = case, shapes: gpu_step.Shapes = shapes, bits: int = bits,
                     group_size: int = group_size, count: int = count) -> list[dict[str, Any]]:
                variants = gpu_step.build(shapes, bits, group_size)
                if bits == 1:
                    variants |= gpu_step.adamw(shapes)
                return rows_of("step", case, variants, deadline, parameters=count)

            yield case, task
    if time.monotonic() + 60 < deadline:  # compiling takes most of it
        yield "10M W2 group -1, compiled", lambda: rows_of(
            "step", "10M W2 group -1", gpu_step.compiled(gpu_step.SIZES["10M"], 2, -1), deadline,
            parameters=10 * gpu_step.MILLION)


def collect(tasks: Iterator[Task], report: dict[str, Any]) -> None:
    """Runs the cases; one that fails is named, and takes no other with it."""
    for name, task in tasks:
        try:
            report["rows"] += task()
        except Exception as error:
            report.setdefault("failures", {})[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


def overheads() -> dict[str, float]:
    """Microseconds of the processor for one eager call."""
    qweight, scale = gpu_linear.random_weight(64, 64, 1)
    x = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    op, levels = torch.ops.blaq.packed_linear.default, levels_of("pow2", 1)
    long_weight, long_scale = gpu_linear.random_weight(4096, 4096, 1)
    long = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    step = gpu_step.build(gpu_step.resnet50(), 1, 0)
    one = gpu_step.build([(64,)], 1, 0)
    return {"packed_linear 64x64": host_microseconds(lambda: op(x, qweight, scale, None, levels, -1)),
            "packed_linear 4096x4096, k in parts": host_microseconds(
                lambda: op(long, long_weight, long_scale, None, levels, -1)),
            "fused_step of one tensor": host_microseconds(one["fused_step"].calls[0]),
            "torch.nn.functional.linear 64x64": host_microseconds(
                lambda: torch.nn.functional.linear(x, weight)),
            "fused_step of ResNet-50": host_microseconds(step["fused_step"].calls[0], 50),
            "AdamW(fused=True) of ResNet-50": host_microseconds(
                gpu_step.adamw(gpu_step.resnet50())["AdamW(fused=True)"].calls[0], 50)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--seconds", type=float, default=240.0, help="all in all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device must be there, got none")
    start = time.monotonic()
    end = start + args.seconds
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "environment": {**describe(), "gpu": properties.name, "cuda": torch.version.cuda,
                        "triton": triton.__version__,
                        "capability": f"{properties.major}.{properties.minor}",
                        "multiprocessors": properties.multi_processor_count,
                        "serving": blaq_kernels.serving("cuda")},
        "card": {"copy_bytes_per_second": copy_bandwidth(),
                 "bfloat16_operations_per_second": gemm_rate(torch.bfloat16),
                 "float16_operations_per_second": gemm_rate(torch.float16)},
        "rows": []}

    def overhead() -> list[dict[str, Any]]:
        report["host_microseconds"] = overheads()
        return []

    sections = {"overheads": lambda: iter([("overheads", overhead)]),
                "packed_linear": lambda: linear(start + LINEAR_SHARE * args.seconds),
                "steps": lambda: steps(end - 5)}
    for name, tasks in sections.items():
        with torch.no_grad():
            collect(tasks(), report)
        write(args.out, report)  # after every section, so that a kill loses one
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    print(json.dumps(report["card"]))
    raise SystemExit(1 if "failures" in report else 0)


if __name__ == "__main__":
    main()

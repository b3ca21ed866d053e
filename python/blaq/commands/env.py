"""Show versions, processor, data folder, and which backend serves each op and why.

  blaq env
  blaq env --json

Paste it into a bug report.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

import blaq_kernels
from blaq_kernels import cuda, dispatch

from ..accuracy import get_accuracy
from ..train.data import DATA, default_folder

EXTRAS = {"train": ("scikit-learn", "scipy", "matplotlib", "tqdm"), "vision": ("torchvision",),
          "tensorboard": ("tensorboard",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = collect()
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))
    return 0


def collect() -> dict[str, Any]:
    """The report as plain data."""
    return {
        "versions": {"blaq": blaq_kernels.__version__, "torch": torch.__version__,
                     "python": platform.python_version(), "platform": platform.platform()},
        "build": dict(dispatch.native.build_info()) if dispatch.native else None,
        "cpu": {"capability": blaq_kernels.cpu_capability(),
                "capabilities": blaq_kernels.cpu_capabilities(), "cores": os.cpu_count(),
                "threads": torch.get_num_threads(), "int8": blaq_kernels.int8_kernels(),
                "accuracy": get_accuracy()},
        "cuda": _cuda(),
        "cuda_kernels": cuda.unavailable() or "ready; BLAQ_BACKEND=cuda chooses them",
        "ops": blaq_kernels.serving(),
        "cuda_ops": blaq_kernels.serving("cuda"),
        "data": {"BLAQ_DATA": os.environ.get("BLAQ_DATA"), "found": [
            name for name in DATA if (folder := default_folder(name)) and folder.is_dir()]},
        "extras": {extra: {package: _version(package) for package in packages}
                   for extra, packages in EXTRAS.items()},
        "variables": {name: value for name, value in sorted(os.environ.items())
                      if name.startswith("BLAQ_")},
    }


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    return {"version": torch.version.cuda, "devices": [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(report: dict[str, Any]) -> list[str]:
    versions, cpu, data = report["versions"], report["cpu"], report["data"]
    lines = [f"blaq {versions['blaq']}, torch {versions['torch']}, Python {versions['python']} "
             f"({sys.executable})", f"platform: {versions['platform']}"]
    if report["build"] is None:
        lines.append("C++ kernels: not loaded")
    else:
        lines.append("C++ kernels: " + ", ".join(f"{k} {v}" for k, v in report["build"].items()))
        others = ", ".join(cpu["capabilities"])
        lines.append(f"instruction set: {cpu['capability']} (this processor can run {others})")
    lines.append(f"packed layers: accuracy {cpu['accuracy']}; " + (
        f"high and fast in 8-bit arithmetic ({cpu['int8']}"
        f"{'' if cpu['int8'] == 'AVX-512 VNNI' else '; convolutions in float32'}), exact in float32"
        if cpu["int8"] else
        "all in float32: no 8-bit kernels for this instruction set"))
    lines.append(f"CPU: {cpu['cores']} cores, torch uses {cpu['threads']} threads")
    device = report["cuda"]
    lines.append("CUDA: none" if device is None else
                 f"CUDA {device['version']}: {', '.join(device['devices'])}")
    lines.append(f"CUDA C++ kernels: {report['cuda_kernels']}")
    for device, ops in (("CPU", "ops"), ("CUDA", "cuda_ops")):
        lines += ["", f"op, and what serves it on {device} tensors:"]
        lines += [f"  {op:18}{backend}" for op, backend in report[ops].items()]
    lines += ["", f"data: BLAQ_DATA is {data['BLAQ_DATA'] or 'not set'}"
              + (f", with {', '.join(data['found'])}" if data["found"] else "")]
    for extra, packages in report["extras"].items():
        found = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        lines.append(f"extra [{extra}]: {found}")
    return lines

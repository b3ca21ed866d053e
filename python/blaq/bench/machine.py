"""Where and with what a measurement was made: columns that go with every row in a file."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import blaq_kernels

__all__ = ["Environment", "describe"]

Environment = dict[str, str | int | float | bool | None]


def describe() -> Environment:
    """Date, machine and what else it does, versions, threads, commit of the sources.

    ``load`` is the number of processes that ran or waited for a processor in the last minute, None
    where the system does not count.

    ``commit`` and ``dirty`` (tracked files differ from the commit) are None outside of a git
    checkout.
    """
    commit, dirty = _commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": processor(), "cores": os.cpu_count(), "load": _load(),
        "threads": torch.get_num_threads(),
        "capability": blaq_kernels.cpu_capability(), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__,
        "blaq": blaq_kernels.__version__, "commit": commit, "dirty": dirty}


def processor() -> str:
    """Name of the processor; where Linux gives only a family's, its numbers too."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
        pairs = (line.partition(":") for line in lines)
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        if "model name" in fields:
            return (f"{fields['model name']} (family {fields.get('cpu family')}, "
                    f"model {fields.get('model')})")
    return platform.processor() or platform.machine()


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _commit() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, check=True,
                              capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some checkout around a venv
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None

"""Reads machine code: which instructions a compiled kernel has, and how often each runs."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicate: str = ""


def tool(name: str) -> Path:
    """``nvdisasm`` or ``cuobjdump``: Triton ships them, and so does the CUDA toolkit.

    Raises:
        FileNotFoundError: neither is there.
    """
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if shipped.exists():
            return shipped
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError(f"blaq: {name} must come with Triton or the CUDA toolkit, got neither")
    return Path(found)


def disassemble(cubin: bytes) -> list[Instruction]:
    """Instructions of the one kernel in ``cubin``."""
    return parse(_run(cubin, "nvdisasm", "-c", "-hex"))


def kernels(cubin: bytes) -> dict[str, list[Instruction]]:
    """Instructions of every kernel in ``cubin``, by mangled name."""
    parts = re.split(r"^//-+ \.text\.(\S+)\s+-+$", _run(cubin, "nvdisasm", "-c", "-hex"), flags=re.M)
    return {name: parse(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def registers(cubin: bytes) -> int:
    """Registers of one thread of the one kernel in ``cubin``."""
    return next(iter(usage(cubin).values()))["REG"]


def usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """Of every kernel in ``cubin``: registers of a thread (REG), bytes of shared memory (SHARED),
    …"""
    text = _run(cubin, "cuobjdump", "-res-usage")
    found = re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            for name, line in found}


def architecture(cubin: bytes) -> int:
    """Compute capability that ``cubin`` is for: 90, also where it is sm_90a."""
    found = re.search(r"\bsm_(\d+)", _run(cubin, "nvdisasm", "-c", "-hex"))
    return int(found[1]) if found else 0


@lru_cache(maxsize=2)  # a cubin is asked for its kernels and its architecture in turn
def _run(cubin: bytes, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool(name), *options, file.name], check=True, capture_output=True,
                              text=True).stdout


def extract(library: Path) -> list[bytes]:
    """The cubins that a library or object file carries, one for each source and architecture."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool("cuobjdump"), "-xelf", "all", library.resolve()], check=True, cwd=folder,
                       capture_output=True)
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def parse(text: str) -> list[Instruction]:
    """Instructions of a listing of ``nvdisasm -c -hex``; a label becomes the address that it
    marks."""
    listing, labels, waiting = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?\w+):", line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.search(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            listing.append((address, found[3], found[4], (found[2] or "").strip()))
    def with_addresses(operands: str) -> str:
        return re.sub(r"`\((\.L\w+)\)", lambda m: hex(labels.get(m[1], 0)), operands)
    # Scheduling hints follow the operands on newer architectures.
    code = [Instruction(a, op, re.sub(r"\s+[&?]\S+", "", with_addresses(rest)).strip(),
                        predicate) for a, op, rest, predicate in listing]
    # Beyond the last EXIT are padding, a trap, and blocks that only repeat a wait.
    ends = [i for i, one in enumerate(code) if one.opcode == "EXIT"]
    return code[:ends[-1] + 1] if ends else code


def executed(code: list[Instruction], trips: Sequence[int]) -> int:
    """Instructions that one thread runs, if the loops, by where they begin, run ``trips`` times,
    what
    is beyond the list as the last, and every branch is taken: a bound from above for conditions."""
    ends: dict[int, int] = {}
    for one in code:
        if one.opcode.startswith("BRA") and (target := re.search(r"0x[0-9a-f]+", one.operands)):
            start = int(target[0], 16)
            if start < one.address:
                ends[start] = max(one.address, ends.get(start, 0))
    loops = [(start, ends[start], trips[min(i, len(trips) - 1)])
             for i, start in enumerate(sorted(ends))]
    return sum(math.prod(n for start, end, n in loops if start <= one.address <= end)
               for one in code if one.opcode != "NOP")


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the loops: from where a backward branch goes up to it, the longest for each
    start."""
    ends: dict[int, int] = {}
    for one in code:
        if one.opcode.startswith("BRA") and (target := re.search(r"0x[0-9a-f]+", one.operands)):
            start = int(target[0], 16)
            if start < one.address:
                ends[start] = max(one.address, ends.get(start, 0))
    return [[one for one in code if start <= one.address <= end] for start, end in sorted(ends.items())]


def longest_way(body: list[Instruction], avoid: Callable[[Instruction], bool]) -> list[Instruction]:
    """Of the ways through a loop's body that meet nothing to avoid, the one with most instructions:
    a bound from above for what a turn takes that goes none of the avoided ways. Loops within count
    once. Empty where there is no such way."""
    starts = {body[0].address}
    for one, following in zip(body, body[1:], strict=False):
        if one.opcode.startswith(("BRA", "EXIT", "RET", "CALL")):
            starts.add(following.address)
            if found := re.search(r"0x[0-9a-f]+", one.operands):
                starts.add(int(found[0], 16))
    blocks: dict[int, list[Instruction]] = {}
    for one in body:
        if one.address in starts:
            blocks[one.address] = block = []
        block.append(one)
    order = sorted(blocks)
    best: dict[int, list[Instruction] | None] = {}
    for start, follower in zip(reversed(order), [0, *reversed(order)], strict=False):
        block, last = blocks[start], blocks[start][-1]
        after: list[list[Instruction]] = []
        if any(map(avoid, block)):
            best[start] = None
            continue
        if last is body[-1]:
            after.append([])
        target = re.search(r"0x[0-9a-f]+", last.operands) if last.opcode.startswith("BRA") else None
        if target and int(target[0], 16) > last.address:
            after.append(best.get(int(target[0], 16)))
        conditional = last.predicate or re.match(r"[^0]*\bU?P\d", last.operands)
        if last is not body[-1] and (target is None or conditional):
            after.append(best.get(follower))
        ways = [way for way in after if way is not None]
        best[start] = block + max(ways, key=len) if ways else None
    return best[order[0]] or []

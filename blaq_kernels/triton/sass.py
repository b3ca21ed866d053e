"""Reads machine code: which instructions a compiled kernel has, and how often each runs."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia as nvidia

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str


def disassemble(cubin: bytes) -> list[Instruction]:
    """Instructions of the one kernel in ``cubin``, by the disassembler that Triton ships."""
    return parse(_tool(cubin, "nvdisasm", "-c", "-hex"))


def registers(cubin: bytes) -> int:
    """Registers of one thread."""
    return int(re.search(r"\bREG:(\d+)", _tool(cubin, "cuobjdump", "-res-usage"))[1])


def _tool(cubin: bytes, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / name
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True,
                              text=True).stdout


def parse(text: str) -> list[Instruction]:
    """Instructions of a listing of ``nvdisasm -c -hex``; a label becomes the address that it marks."""
    listing, labels, waiting = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?\w+):", line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.search(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            listing.append((address, found[2], found[3]))
    def with_addresses(operands: str) -> str:
        return re.sub(r"`\((\.L\w+)\)", lambda m: hex(labels.get(m[1], 0)), operands)
    # Scheduling hints follow the operands on newer architectures.
    code = [Instruction(a, op, re.sub(r"\s+[&?]\S+", "", with_addresses(rest)).strip())
            for a, op, rest in listing]
    # Beyond the last EXIT are padding, a trap, and blocks that only repeat a wait.
    ends = [i for i, one in enumerate(code) if one.opcode == "EXIT"]
    return code[:ends[-1] + 1] if ends else code


def executed(code: list[Instruction], trips: Sequence[int]) -> int:
    """Instructions that one thread runs, if the loops, by where they begin, run ``trips`` times, what
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

"""Every kernel, compiled for architectures that need not be here, and counted in the machine code.

  python -m blaq_kernels.triton.contract              # the table, of every architecture
  python -m blaq_kernels.triton.contract --cc 90

Fails where a kernel spills to local memory (LDL, STL), makes an atomic operation of a loop, loads less than 128 bits at a time where
alignment allows more, misses the tensor cores that it means to use, or runs more instructions an
element than its budget. No GPU takes part: nothing here is a time. The contract is for the code that
Triton 3.6 makes; later versions may spill a register here and there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .. import sass
from .contract_case import Case

MADE_FOR = "3.6"  # version of Triton
ARCHITECTURES = (80, 90, 100, 120)
MODULES = ("scaled_update", "blend", "contract_training", "fake_quantize", "pack", "unpack",
           "packed_linear", "packed_conv2d")


@dataclass(frozen=True)
class Row:
    """What one kernel became on one architecture."""

    case: Case
    cc: int
    registers: int
    shared: int
    spills: int
    swaps: int
    wide_loads: int
    loads: int
    tensor_cores: int
    per_element: float

    def faults(self) -> list[str]:
        case, found = self.case, []
        if self.spills:
            found.append(f"{self.spills} spills to local memory")
        if self.swaps:
            found.append("an atomic operation made of a loop")
        if case.wide_loads and not self.wide_loads:
            found.append("no 128-bit load")
        if case.tensor_cores and not self.tensor_cores:
            found.append("no tensor-core instruction")
        if self.per_element > case.budget:
            found.append(f"{self.per_element:.1f} instructions an element, budget {case.budget:g}")
        return found


def cases(modules: tuple[str, ...] = MODULES) -> list[Case]:
    """Every specialisation under contract."""
    return [case for name in modules
            for case in importlib.import_module(f".{name}", __package__).contract()]


def compile_case(case: Case, cc: int):
    """The kernel of ``case`` for compute capability ``cc``, as Triton would launch it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = dict(case.constants) | {k: None for k, t in case.types.items()
                                        if t is None and k in names}
    types = {name: "constexpr" if name in constants else case.types[name] for name in names}
    divisible = case.divisible
    if divisible is None:
        divisible = tuple(n for n, t in types.items() if t.startswith(("*", "i")))
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(case.kernel, types, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32),
                          options={"num_warps": case.warps, "num_stages": case.stages})


def measure(case: Case, cc: int) -> Row:
    """Compiles and counts."""
    kernel = compile_case(case, cc)
    code = sass.disassemble(kernel.asm["cubin"])
    opcodes = [one.opcode for one in code]

    def count(*starts: str) -> int:
        return sum(op.startswith(starts) for op in opcodes)

    per_thread = case.elements / (32 * case.warps)
    return Row(case, cc, sass.registers(kernel.asm["cubin"]),
               kernel.metadata.shared, count("LDL", "STL"),
               sum(".CAS" in op for op in opcodes),
               sum(op.startswith(("LDG", "LDGSTS")) and ".128" in op for op in opcodes),
               count("LDG"), count("HMMA", "HGMMA", "UTCHMMA", "WGMMA"),
               sass.executed(_usual(code) if case.ticket else code, case.trips) / per_thread)


def _usual(code: list[sass.Instruction]) -> list[sass.Instruction]:
    """What a program runs whose ticket is not the last."""
    ticket = next(i for i, one in enumerate(code) if one.opcode.startswith("ATOMG"))
    return code[:next(i for i, one in enumerate(code) if i > ticket and one.opcode == "EXIT") + 1]


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown."""
    yield "| kernel | sm | instructions an element (budget) | registers | shared bytes | LDG.128 of LDG | spills | kept |"
    yield "|---|--:|--:|--:|--:|--:|--:|---|"
    for row in rows:
        yield (f"| {row.case.name} | {row.cc} | {row.per_element:.1f} ({row.case.budget:g}) | "
               f"{row.registers} | {row.shared} | {row.wide_loads} of {row.loads} | {row.spills} | "
               f"{'; '.join(row.faults()) or 'yes'} |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blaq_kernels.triton.contract",
                                     description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cc", type=int, nargs="+", default=ARCHITECTURES, metavar="CC",
                        help="compute capabilities: 80 90 100 120")
    parser.add_argument("--only", default="", help="part of the names of the kernels wanted")
    parser.add_argument("--sample", type=int, default=0, metavar="N",
                        help="every N-th kernel, each for one of the architectures, in turn")
    args = parser.parse_args()
    wanted = [(case, [cc for cc in args.cc if cc in case.architectures]) for case in cases()
              if args.only in case.name]
    if args.sample:
        wanted = [(case, targets[turn % len(targets):][:1])
                  for turn, (case, targets) in enumerate(wanted[::args.sample]) if targets]
    rows = [measure(case, cc) for case, targets in wanted for cc in targets]
    print("\n".join(table(rows)))  # when all are compiled: an error leaves no half of a table
    return 1 if any(row.faults() for row in rows) else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("blaq_kernels.triton.contract: TRITON_INTERPRET must be unset, got 1")
    sys.exit(main())

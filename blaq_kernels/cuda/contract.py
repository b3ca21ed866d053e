"""Every CUDA kernel of blaq_kernels._cuda, counted in the machine code that it ships.

  python -m blaq_kernels.cuda.contract              # the table, of every architecture that was built
  python -m blaq_kernels.cuda.contract x.cubin ...  # of these instead

Fails where a kernel spills to local memory (LDL, STL), calls a function, makes an atomic of a loop
(ATOMS.CAST, ATOMG.CAS), misses the tensor-core instruction that it means to use or its 128-bit loads, or
takes more instructions a weight than its budget. Of a training kernel that is the longest way through its
loop but for what is rare: slow paths of divisions and roots, elements by themselves, carries. No GPU takes
part: nothing here is a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import sass
from ..sass import Instruction

__all__ = ["RULES", "Row", "Rule", "main", "measure", "table"]

LOGIC = ("LOP3", "PLOP3", "PRMT")
SHIFTS = ("SHF", "USHF", "IMAD.SHL", "IMAD.U32")


@dataclass(frozen=True)
class Rule:
    """What kernels whose mangled name matches must hold to."""

    kernel: str  # a regular expression; its groups are named in `label`
    label: str
    tensor_core: str = ""  # start of the opcode, in the main loop
    weights: int = 0  # of a lane for each tensor-core instruction of the main loop
    columns: int = 0  # group of the expression that divides them: products with the same weights
    logic: dict[str, float] | None = None  # most LOP3 and PRMT a weight, by the first group
    wide_loads: bool = False
    elements: int = 0  # of a thread's turn of the longest loop, whose ordinary way is counted
    loop_has: str = ""  # start of an opcode that this loop has, where another one may be longer
    budget: float = math.inf  # instructions of that way for each of them
    atomics: int = 0  # additions to shared memory on that way
    rare: tuple[str, ...] = ()  # opcodes beside the ordinary way through the main loop
    has: tuple[str, ...] = ()  # opcodes that must be somewhere
    slow_paths: bool = False  # a division or root may call what it needs for extreme numbers
    architectures: tuple[int, ...] = (80, 90, 100, 120)
    """That have the tensor-core instruction; ptxas makes a function of others on the rest."""


INT8_LOGIC = {"1": 0.6, "2": 0.7, "3": 0.85, "4": 1.75}
GROUPED = ("I2F.RP",)  # a division: where sums take their group's scale
TYPES = r"(?:NS_4|NS_6NarrowINS_4)([FB][pf]\d+)\w*?"
RULES = [
    Rule(r"20packed_linear_kernelILi(1)ENS_4([FB][pf]16)ELi(\d)E", "packed_linear W1 {1}, {2} × 8 rows",
         "HMMA.SP", weights=8, columns=3, wide_loads=True, logic={"1Fp16": 0.1, "1Bf16": 0.1}),
    Rule(r"20packed_linear_kernelILi(\d)ENS_4([FB][pf]16)ELi(\d)E", "packed_linear W{0} {1}, {2} × 8 rows",
         "HMMA", weights=8, columns=3, wide_loads=True,
         logic={"2Bf16": 0.55, "2Fp16": 1.05, "3Fp16": 1.05, "3Bf16": 1.05, "4Fp16": 1.1,
                "4Bf16": 1.0}),
    Rule(r"13repack_kernelILi(\d)E", "repack W{0}", slow_paths=True),
    *(Rule(rf"12update_partsINS_3(F32|B16|F16)ELb{commits}ELb{binary}E",
           f"fused_{('trial', 'step')[commits]}, first pass, {('levels', '1 bit')[binary]}, {{0}}",
           wide_loads=True, elements=8, budget=budget, atomics=0 if binary else 16, slow_paths=True)
      for commits, binary, budget in ((0, 0, 165), (0, 1, 70), (1, 0, 235), (1, 1, 110))),
    *(Rule(rf"11write_partsINS_3(F32|B16|F16)ELb{commits}E",
           f"fused_{('trial', 'step')[commits]}, second pass, {{0}}", wide_loads=bool(commits), elements=8,
           loop_has="LDS", budget=budget, slow_paths=not commits) for commits, budget in ((0, 25), (1, 35))),
    *(Rule(rf"11take_groupsINS_3(F32|B16|F16)ELb{commits}ELb{binary}E",
           f"fused_{('trial', 'step')[commits]}, whole groups, {('levels', '1 bit')[binary]}, {{0}}",
           wide_loads=True, slow_paths=True) for commits in (0, 1) for binary in (0, 1)),
    Rule(r"10fold_parts", "histograms of parts, folded"),
    Rule(r"13settle_groupsILb(\d)ELb(\d)E", "scales of groups, 1 bit {0}, step {1}", slow_paths=True),
    Rule(r"9sum_partsILb0E", "solve, histogram", wide_loads=True, elements=8, budget=120, atomics=16,
         slow_paths=True),
    Rule(r"9sum_partsILb1E", "solve, weighted mean", wide_loads=True, elements=8, budget=25),
    Rule(r"11write_codes", "solve, codes", wide_loads=True, elements=8, budget=40),
    Rule(r"21binary_product_kernelI" + TYPES + r"BinaryTileILi(\d)ELi(\d)E", "binary_linear {0}, {1} × 16 outputs, "
         "{2} × 8 rows", "BMMA", weights=128, columns=3, wide_loads=True, architectures=(80, 90)),
    Rule(r"23binary_warpgroup_kernelI" + TYPES, "binary_linear by warpgroups {0}", "BGMMA", wide_loads=True,
         architectures=(90,)),
    Rule(r"17pack_signs_kernelI" + TYPES + r"Lb(\d)E", "pack_signs {0}, halves apart {1}", wide_loads=True),
    Rule(r"21int8_warpgroup_kernelILi(\d)E", "packed_linear in 8 bits by warpgroups W{0}", "IGMMA",
         weights=16, logic=INT8_LOGIC, rare=GROUPED, budget=4.5,
         has=("UBLKCP.S.G.MULTICAST", "SYNCS.PHASECHK.TRANS64.TRYWAIT"), architectures=(90,)),
    Rule(r"18int8_linear_kernelILi(\d)E", "packed_linear in 8 bits by warps W{0}", "IMMA",
         weights=2, logic=INT8_LOGIC, rare=GROUPED, budget=7, has=("LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
    Rule(r"17round_rows_kernelI" + TYPES, "round_rows {0}", wide_loads=True, slow_paths=True),
    Rule(r"17pad_planes_kernel", "pad_planes"),
]


@dataclass(frozen=True)
class Row:
    """What one kernel became on one architecture."""

    name: str
    architecture: int
    registers: int
    shared: int
    wide_loads: int
    tensor_cores: int
    per_weight: tuple[float, float, float] | None  # logic, shifts, all instructions
    faults: tuple[str, ...]


def measure(cubin: bytes) -> Iterator[Row]:
    """Counts the kernels of one cubin."""
    usage = sass.usage(cubin)
    architecture = sass.architecture(cubin)
    for name, code in sorted(sass.kernels(cubin).items()):
        rule, found = _rule_of(name)
        yield _row(rule, found, architecture, code, usage[name])


def _rule_of(name: str) -> tuple[Rule, re.Match[str] | None]:
    for rule in RULES:
        if found := re.search(rule.kernel, name):
            return rule, found
    return Rule("", name), None


def _row(rule: Rule, found: re.Match[str] | None, architecture: int, code: list[Instruction],
         usage: dict[str, int]) -> Row:
    groups = found.groups() if found else ()
    wide = _count(code, "LDG", ".128")
    native = architecture in rule.architectures
    body = _main_loop(code, rule.tensor_core) if rule.tensor_core else []
    if body and rule.rare:
        body = sass.longest_way(body, lambda one: one.opcode.startswith(rule.rare))
    products = _count(body, rule.tensor_core) if body else 0
    faults = [f"{n} {what}" for what, n in (
        ("spills to local memory", _count(code, ("LDL", "STL"))),
        ("calls", 0 if rule.slow_paths or not native else sum(map(_is_call, code))),
        ("atomics made of loops", _count(code, ("ATOMS.CAS", "ATOMG.E.CAS", "ATOM.E.CAS")))) if n]
    per_weight = None
    if rule.tensor_core and native and not products:
        faults.append(f"no {rule.tensor_core}")
    if rule.wide_loads and not wide:
        faults.append("no 128-bit load")
    faults += [f"no {opcode}" for opcode in rule.has if native and not _count(code, opcode)]
    if products and rule.weights:
        weights = products * rule.weights / (int(groups[rule.columns - 1]) if rule.columns else 1)
        per_weight = (_count(body, LOGIC) / weights, _count(body, SHIFTS) / weights,
                      sum(one.opcode != "NOP" for one in body) / weights)
        if per_weight[2] > rule.budget:
            faults.append(f"{per_weight[2]:.2f} instructions a weight, budget {rule.budget:g}")
        budget = (rule.logic or {}).get("".join(groups[:2]))
        if budget is not None and per_weight[0] > budget:
            faults.append(f"{per_weight[0]:.2f} logic instructions a weight, budget {budget:g}")
    if rule.elements:
        bodies = [body for body in sass.loops(code) if _count(body, rule.loop_has)]
        way = sass.longest_way(max(bodies, key=len), _is_rare)
        per_weight = (_count(way, LOGIC) / rule.elements, _count(way, SHIFTS) / rule.elements,
                      sum(one.opcode != "NOP" for one in way) / rule.elements)
        if not 0 < per_weight[2] <= rule.budget:
            faults.append(f"{per_weight[2]:.1f} instructions an element, budget {rule.budget:g}")
        if (additions := _count(way, "ATOMS.ADD")) != rule.atomics:
            faults.append(f"{additions} additions to shared memory, not {rule.atomics}")
    return Row(rule.label.format(*groups), architecture, usage["REG"], usage.get("SHARED", 0), wide,
               products, per_weight, tuple(faults))


def _count(code: Iterable[Instruction], starts: str | tuple[str, ...], part: str = "") -> int:
    return sum(one.opcode.startswith(starts) and part in one.opcode for one in code)


def _is_rare(one: Instruction) -> bool:
    """What a turn of a training kernel's loop seldom meets: the slow path of a division or a root, an
    element by itself, a sum's carry, a larger unit."""
    return _is_call(one) or one.opcode.startswith(("LD.E", "ST.E", "ATOMS.POPC", "REDUX"))


def _is_call(one: Instruction) -> bool:
    """For sm_80 the end of a loop may be a call under a condition, which nothing returns from."""
    return one.opcode.startswith("CALL") and not one.predicate


def _main_loop(code: list[Instruction], tensor_core: str) -> list[Instruction]:
    """The loop with the fewest instructions for each tensor-core instruction: where weights are
    decoded by bits, and no scales come in."""
    bodies = [body for body in sass.loops(code) if _count(body, tensor_core)]
    return min(bodies, key=lambda body: len(body) / _count(body, tensor_core), default=[])


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Markdown. Counts a weight are of the main loop; a lane's instruction serves one lane."""
    yield ("| kernel | sm | LOP3, PRMT a weight | shifts a weight | all a weight | tensor-core instructions | "
           "LDG.128 | registers | static shared | kept |")
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    for row in rows:
        counts = ["-"] * 3 if row.per_weight is None else [f"{x:.2f}" for x in row.per_weight]
        yield (f"| {row.name} | {row.architecture} | {' | '.join(counts)} | {row.tensor_cores} | "
               f"{row.wide_loads} | {row.registers} | {row.shared} | {'; '.join(row.faults) or 'yes'} |")


def cubins(paths: list[str]) -> list[bytes]:
    """Of these files, or of the library that was built.

    Raises:
        FileNotFoundError: there is none.
    """
    if paths:
        return [Path(path).read_bytes() for path in paths]
    spec = importlib.util.find_spec("blaq_kernels._cuda")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("blaq_kernels.cuda.contract: blaq_kernels._cuda must be built, got none; "
                                "try BLAQ_CUDA=1 python setup.py build_ext --inplace")
    return sass.extract(Path(spec.origin))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blaq_kernels.cuda.contract", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cubin", nargs="*", help="files to read instead of the library")
    args = parser.parse_args()
    try:
        rows = [row for cubin in cubins(args.cubin) for row in measure(cubin)]
    except FileNotFoundError as error:
        sys.exit(str(error))
    rows.sort(key=lambda row: (row.name, row.architecture))
    print("\n".join(table(rows)))
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Specialisations of the training kernels under contract: what lists of weights usually launch."""

from __future__ import annotations

import triton.language as tl

from .alternate import ALONE, AROUND, NEAR
from .contract_case import Case
from .long_groups import (
    code_long_groups,
    step_long_groups,
    sum_long_groups,
    write_long_groups,
)
from .plan import CHUNK, PER_WARP, TILE_LEAST
from .short_groups import solve_short_groups, step_short_groups

ALTERNATION = (5,)  # trips of the loop
SEARCH = (200, 9, 1)  # scales that a search tries on weights without outliers; then nearer ones
TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
BOOKS = {"1 bit": (1.0,), "2 bits": (0.5, 1.0), "pow2 4 bits": tuple(2.0 ** (i - 7) for i in range(8)),
         "linear 4 bits": tuple(i / 7 for i in range(8))}
TABLE = {"table": "*i64", "programs": "*i32"}
SCALARS = {"lr": "*fp32", "step": "*fp32", "grad_scale": None, "found_inf": None}
SCALER = {"grad_scale": "*fp32", "found_inf": "*fp32"}
HYPER = dict.fromkeys(("beta1", "one_minus_beta1", "log_beta1", "beta2", "one_minus_beta2",
                       "log_beta2", "eps", "weight_decay"), "fp32") | {"clip": None}
STATE = {"records": "*fp32", "runs": "*fp64", "bins": None, "states": "*fp32", "active": "*i32",
         "tickets": "*i32"}


def contract() -> list[Case]:
    return [*_short(), *_solves(), *_long()]


def _stage(commits: bool) -> dict[str, str | None]:
    return SCALARS | HYPER | {"backtrack": "*fp32" if commits else None,
                              "flips": "*i64" if commits else None}


def _short() -> list[Case]:
    def case(what: str, book: str, width: int, budget: float, dtype: str = "fp32",
             exact: bool = False, others: tuple[int, ...] = (), scaler: bool = False) -> Case:
        commits, tile = what == "fused_step", max(TILE_LEAST, width)
        also = "".join(f" and {n}" for n in others) + (", grad scaler" if scaler else "")
        constants = {"DTYPE": TYPES[dtype], "COMMITS": commits, "BLENDS": commits,
                     "LEVELS": BOOKS[book], "EXACT": exact, "TILE": tile, "WIDTHS": (*others, width),
                     "ALIGNED": True}
        return Case(f"{what}, groups of {width}{also}, {book}, {dtype}{', exact' if exact else ''}",
                    step_short_groups, TABLE | _stage(commits) | {"max_iter": "i32"} | (SCALER if scaler else {}), constants,
                    tile, tile // PER_WARP, budget, trips=SEARCH if exact else ALTERNATION,
                    wide_loads=True)

    return [case("fused_trial", "1 bit", 512, 100), case("fused_step", "1 bit", 512, 100),
            case("fused_trial", "2 bits", 128, 150), case("fused_step", "2 bits", 128, 200),
            case("fused_trial", "pow2 4 bits", 128, 200), case("fused_step", "pow2 4 bits", 128, 200),
            case("fused_step", "pow2 4 bits", 128, 200, "bf16"),
            case("fused_step", "pow2 4 bits", 1024, 200),
            case("fused_step", "pow2 4 bits", 8192, 200),
            # Several widths in one launch: the count is of all branches, of which a program takes one.
            case("fused_step", "pow2 4 bits", 8192, 700, "bf16", others=(64, 512, 4096)),
            case("fused_trial", "pow2 4 bits", 128, 200, "fp16", scaler=True),
            case("fused_step", "pow2 4 bits", 128, 220, "fp16", scaler=True),
            case("fused_step", "linear 4 bits", 128, 400),
            case("fused_step", "pow2 4 bits", 128, 6000, exact=True)]


def _solves() -> list[Case]:
    return [Case(f"solve, groups of 128, pow2 4 bits, {method}", solve_short_groups,
                 TABLE | {"curvature": "*fp32", "codes": "*u8", "init": "*fp32", "max_iter": "i32"},
                 {"LEVELS": BOOKS["pow2 4 bits"], "EXACT": method == "exact", "TILE": TILE_LEAST,
                  "WIDTHS": (128,), "ALIGNED": True}, TILE_LEAST, TILE_LEAST // PER_WARP, budget,
                 trips=trips, wide_loads=True)
            for method, trips, budget in (("alternating", ALTERNATION, 120), ("exact", SEARCH, 4000))]


def _long() -> list[Case]:
    tile = {"TILE": CHUNK, "ALIGNED": True}
    found = []
    for what, book, budget, exact in (("fused_trial", "1 bit", 60, False),
                                      ("fused_trial", "pow2 4 bits", 150, False),
                                      ("fused_step", "1 bit", 80, False),
                                      ("fused_step", "pow2 4 bits", 180, False),
                                      ("fused_step", "linear 4 bits", 300, False),
                                      ("fused_step", "pow2 4 bits", 180, True)):
        commits, several = what == "fused_step", book != "1 bit"
        memory = {"w_scratch": None if commits else "*fp32", "max_iter": "i32",
                  "code_scratch": "*u8" if several and commits else None,
                  "bins": "*i64" if exact else None}
        octaves = NEAR if exact else AROUND if several else ALONE
        found.append(Case(
            f"{what}, long, first pass, {book}, fp32{', exact, grad scaler' if exact else ''}",
            step_long_groups, TABLE | _stage(commits) | (SCALER if exact else {}) | STATE | memory,
            {"DTYPE": tl.float32, "COMMITS": commits, "BLENDS": commits, "LEVELS": BOOKS[book],
             "OCTAVES": octaves, "EXACT": exact, "COPIES": 8} | tile, CHUNK, CHUNK // PER_WARP,
            budget, wide_loads=True, ticket=True))
    levels = {"LEVELS": BOOKS["pow2 4 bits"]} | tile
    for what, first, search, budget in (("alternation", False, False, 35),
                                        ("first sums of a solve", True, False, 35),
                                        ("search of an exact solve", False, True, 120)):
        found.append(Case(
            f"long, {what}, pow2 4 bits", sum_long_groups,
            TABLE | STATE | {"curvature": "*fp32", "init": "*fp32" if first else None,
                             "bins": "*i64" if search else None},
            {"FIRST": first, "OCTAVES": ALONE, "EXACT": search, "COPIES": 8} | levels, CHUNK,
            CHUNK // PER_WARP, budget, wide_loads=True, ticket=True))
    found.append(Case("long, codes, pow2 4 bits", code_long_groups,
                      TABLE | {"codes": "*u8", "states": "*fp32"}, levels, CHUNK,
                      CHUNK // PER_WARP, 30, wide_loads=True))
    for what, dtype, scaler in (("fused_step", "fp32", None), ("fused_step", "bf16", "*fp32"),
                                ("fused_trial", "bf16", "*fp32")):
        commits = what == "fused_step"
        found.append(Case(
            f"{what}, long, last pass, pow2 4 bits, {dtype}{', grad scaler' if scaler else ''}",
            write_long_groups,
            TABLE | {"found_inf": scaler, "flips": "*i64" if commits else None, "states": "*fp32",
                     "w_scratch": None if commits else "*fp32",
                     "code_scratch": "*u8" if commits else None},
            {"DTYPE": TYPES[dtype], "COMMITS": commits} | levels, CHUNK, CHUNK // PER_WARP, 50,
            wide_loads=True))
    return found

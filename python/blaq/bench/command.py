"""Time every op against the best alternative that torch has, in interleaved rounds.

  blaq bench                                  every op, default sizes; minutes
  blaq bench packed_linear --bits 1 --sizes 1x4096x4096 --plot linear.png
  blaq bench fused_step --method exact --dtype bfloat16 --full
  blaq bench --targets                        the project's aims: measured, bound, met
  blaq bench --targets linear-4096 --csv rows.csv
  blaq bench packed --plot packed.svg         packed layers against every peer, over the batch
  blaq bench sweep --bits 1 4                 is torch faster on any of 60 shapes?
  blaq bench --list                           ops, what their sizes mean, targets

Numbers are medians; "/ blaq" is a time over blaq's, above 1 where blaq is faster. The memory floor
is torch's a.add_(b) on as many bytes as the op must at least read and write. Results on a busy
machine are noise: close what you can.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .binary import TABLES as BINARY
from .case import AXES, Case, Result, Row, Table, run_case
from .machine import Environment, describe
from .network import TABLES as NETWORK
from .output import format_result, format_verdicts, write_csv, write_json
from .packed import TABLES as PACKED
from .plot import plot, plot_over_batch
from .suites import SUITES
from .targets import TARGETS, Verdict
from .training import TABLES as TRAINING

__all__ = ["TABLES", "add_arguments", "run"]

TABLES: dict[str, Table] = {**TRAINING, **PACKED, **BINARY, **NETWORK}
BUSY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="ops, or with --targets targets (default: all)")
    add("--targets", action="store_true", help="run the project's aims instead of the tables")
    add("--sizes", nargs="+", type=_size, default=[], metavar="AxB",
        help="as --list shows them, for the ops that they fit")
    add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"],
        help="of params, inputs, unpacked weights")
    add("--bits", nargs="+", type=int, choices=[1, 2, 3, 4], help="widths of a weight")
    add("--group-size", nargs="+", type=int, metavar="G", help="0 tensor, -1 row, g inputs")
    add("--method", nargs="+", choices=["alternating", "exact"], help="of solving for the scale")
    add("--full", action="store_true",
        help="also the slow alternatives: the reference, eager and under torch.compile")
    add("--stream", action="store_true", help="nothing in the caches before a call")
    add("--threads", type=int, help="torch's threads (default: as torch has it)")
    add("--rounds", type=int, default=20, help="interleaved samples of each variant (default: 20)")
    add("--csv", type=Path, metavar="FILE",
        help="write rows with machine, versions, commit; targets go to FILE-targets.csv beside it")
    add("--json", type=Path, metavar="FILE", help="write everything as one object")
    add("--plot", type=Path, metavar="FILE", help="draw times over blaq's, .png or .svg")
    add("--list", action="store_true", help="show ops, sizes and targets, run nothing")


def run(args: argparse.Namespace) -> int:
    if args.list:
        print(_list())
        return 0
    known = TARGETS if args.targets else {**TABLES, **SUITES}
    for name in args.names:
        kind = "target" if args.targets else "op"
        _require(name in known, kind, f"one of {', '.join(known)}", name)
    _require(args.rounds >= 1, "--rounds", "at least 1", args.rounds)
    whole = "--targets" if args.targets else " ".join(SUITES.keys() & args.names)
    _require(not (args.stream and whole), "--stream", "used with ops", whole)
    _require(args.threads is None or args.threads >= 1, "--threads", "at least 1", args.threads)
    for file in (args.csv, args.json, args.plot):  # before minutes of work, not after
        _require(file is None or file.absolute().parent.is_dir(), "folder of output", "there", file)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks of the reference
    for name in args.names if SUITES.keys() & args.names else ():
        _require(name in SUITES, "names", "suites or ops, not both", name)
    before = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return _measure(args)
    finally:
        torch.set_num_threads(before)


def _measure(args: argparse.Namespace) -> int:
    suites = [SUITES[name] for name in args.names if name in SUITES]
    cases = [] if args.targets or suites else _cases(args)
    environment = describe()
    commit = str(environment["commit"])[:10] + " with changes" * bool(environment["dirty"])
    title = (f"{environment['machine']}, {environment['threads']} threads, "
             f"torch {environment['torch']}, blaq {environment['blaq']} "
             f"({environment['capability']}), commit {commit}")
    print(f"{title}\n", flush=True)
    if float(environment["load"] or 0) > BUSY:
        print(f"warning: load average {environment['load']}: something else is running, and "
              "threads that wait for each other wait for it too\n", file=sys.stderr)
    rows: list[Row] = []
    verdicts: list[Verdict] = []

    def keep(result: Result) -> None:
        print(format_result(result), flush=True)
        rows.extend(result.rows)

    def show(case: Case, full: bool) -> Result:
        result = run_case(case, TABLES[case.op], args.rounds, full, args.stream)
        keep(result)
        return result

    if args.targets:
        for name in args.names or TARGETS:
            verdicts.extend(TARGETS[name](show))
        print(format_verdicts(verdicts))
    for suite in suites:
        suite(keep, args.bits or (), args.rounds, args.sizes, [args.threads] if args.threads else ())
    for case in cases:
        show(case, args.full)
    _write(args, environment, rows, verdicts, title)
    return 0


def _cases(args: argparse.Namespace) -> list[Case]:
    """All cases are made before the first runs, so that a wrong size ends here. An op takes the
    sizes of as many numbers as its own, and its defaults if there are none."""
    chosen = {name: getattr(args, name) or () for name in AXES}
    tables = [TABLES[name] for name in args.names or TABLES]
    lengths = {len(table.dims): "x".join(table.dims) for table in tables}
    for size in args.sizes:
        _require(len(size) in lengths, "a size", " or ".join(lengths.values()),
                 "x".join(map(str, size)))
    return [case for table in tables for case in table.cases(
        [size for size in args.sizes if len(size) == len(table.dims)], **chosen)]


def _write(args: argparse.Namespace, environment: Environment,
           rows: Sequence[Row], verdicts: Sequence[Verdict], title: str) -> None:
    if args.csv:
        write_csv(args.csv, environment, rows)
    if args.csv and verdicts:
        beside = args.csv.with_name(f"{args.csv.stem}-targets{args.csv.suffix}")
        write_csv(beside, environment, verdicts)
    if args.json:
        write_json(args.json, environment, rows, verdicts)
    if args.plot:
        (plot_over_batch if "packed" in args.names else plot)(args.plot, rows, title)


def _list() -> str:
    lines = ["op              size, and the defaults"]
    for table in TABLES.values():
        sizes = " ".join("x".join(map(str, size)) for size in table.sizes)
        lines.append(f"{table.op:16}{'x'.join(table.dims)}: {sizes}")
    lines += ["", "suite           what it measures"]
    lines += [f"{name:16}{suite.__doc__}" for name, suite in SUITES.items()]
    lines += ["", "target          what it measures"]
    lines += [f"{name:16}{' '.join((target.__doc__ or '').split())}"
              for name, target in TARGETS.items()]
    return "\n".join(lines)


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        message = f"a size must be positive numbers joined by x, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return size


def _require(condition: bool, argument: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"blaq.bench: {argument} must be {rule}, got {value}")

"""Make a figure or table of the paper: data, plot, and "paper says / here measured / verdict".

  blaq reproduce theory                             what theory says, to rounding; needs no data
  blaq reproduce table4 --data-dir ~/mnist          LeNet-5 on MNIST, every method, one recipe
  blaq reproduce table2 --budget full --device cuda --limit-minutes 9
  blaq reproduce --list

Writes NAME.json, NAME.png and NAME.svg into --out, and a folder for each training run below it. The
same command goes on where it stopped: finished runs are kept, others go on from their last epoch.
With --limit-minutes it stops by itself, and its exit status is 1 until all runs are finished.

Budgets: quick (seconds; shows that the pieces work, measures nothing), brief (about 20 minutes of
one core; table4, which runs every method, three hours), short (a few hours), full (the paper's
length). Learning rates are swept on training images that are held out; the test images decide
nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..reproduce import EXPERIMENTS, Options
from ..reproduce.experiments import BUDGETS
from ..reproduce.plots import save
from ..reproduce.results import read_versioned, write_results
from ..reproduce.runs import deadline_in
from ..train.loop import check_device

UNFINISHED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME",
                        help=f"figure or table: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true", help="say what each is")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR",
                        help="folder of results and runs (default: runs/paper)")
    parser.add_argument("--data-dir", default="", metavar="DIR",
                        help="folder of the data's original files (default: $BLAQ_DATA/<data>)")
    parser.add_argument("--budget", choices=BUDGETS, default="short",
                        help="how much is run (default: short)")
    parser.add_argument("--quick", dest="budget", action="store_const", const="quick",
                        help="the same as --budget quick")
    parser.add_argument("--rows", default="", metavar="A,B",
                        help="only these rows of a table (default: all of the budget)")
    parser.add_argument("--workers", type=int, default=1, metavar="N",
                        help="training runs at a time, one thread each (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--init", default="", metavar="FILE",
                        help="float weights (safetensors) that a table's runs start from")
    parser.add_argument("--limit-minutes", type=float, default=0.0, metavar="M",
                        help="stop after this time, to be resumed; 0: no limit (default)")


def run(args: argparse.Namespace) -> int:
    if args.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:8} {experiment.title}")
        return 0
    if args.name not in EXPERIMENTS:
        raise ValueError(f"figure or table must be one of {', '.join(EXPERIMENTS)}, "
                         f"got {args.name!r}")
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if not 0 <= args.limit_minutes < float("inf"):
        raise ValueError(f"--limit-minutes must be at least 0, got {args.limit_minutes}")
    check_device(args.device)
    experiment, path = EXPERIMENTS[args.name], args.out / f"{args.name}.json"
    if args.rows and not experiment.has_rows:
        raise ValueError(f"--rows must not be given for {args.name}, got {args.rows!r}")
    if path.exists():
        read_versioned(path)  # another version's is not written over
    args.out.mkdir(parents=True, exist_ok=True)
    outcome = experiment.run(Options(
        args.out, args.budget, args.data_dir,
        tuple(key for key in args.rows.split(",") if key), args.workers, args.device,
        args.init, deadline_in(args.limit_minutes)))
    write_results(path, args.name, experiment.title, {"budget": args.budget, "rows": args.rows},
                  outcome.claims, {**outcome.content, "not_run": list(outcome.unfinished)})
    save(outcome.figure, path)
    for line in (*outcome.table, *map(str, outcome.claims)):
        print(line)
    print(f"{path}, .png, .svg")
    if outcome.unfinished:
        print(f"{len(outcome.unfinished)} runs are not finished; the same command goes on")
    return UNFINISHED if outcome.unfinished else 0

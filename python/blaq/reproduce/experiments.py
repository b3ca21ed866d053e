"""Every figure and table by name: what it needs, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .._text import table
from ..train import data as datasets
from .plots import table_figure, theory_figure, toy_figure
from .results import Claim, Spread
from .study import Resources, Study, claims_of, run_study
from .tables import STUDIES
from .theory import figure_1, theory

__all__ = ["BUDGETS", "EXPERIMENTS", "Experiment", "Options", "Outcome"]

BUDGETS = ("quick", "brief", "short", "full")


@dataclass(frozen=True)
class Options:
    """How an experiment is run.

    Attributes:
        out: folder of results; run folders go below it.
        budget: of ``BUDGETS``.
        data_dir: folder of the original files; empty: ``$BLAQ_DATA/<data>``.
        rows: keys of the rows to run; empty: the budget's.
        workers: runs at a time.
        device: to train on.
        deadline: of ``time.monotonic()``.
    """

    out: Path
    budget: str = "short"
    data_dir: str = ""
    rows: tuple[str, ...] = ()
    workers: int = 1
    device: str = "cpu"
    deadline: float = float("inf")


@dataclass(frozen=True)
class Outcome:
    """What an experiment gives.

    Attributes:
        content: of its file, plain data.
        claims: with verdicts.
        figure: matplotlib's.
        unfinished: what is yet to be run; the same command goes on.
        table: lines for the terminal.
    """

    content: Mapping[str, Any]
    claims: Sequence[Claim]
    figure: Any
    unfinished: Sequence[str] = ()
    table: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment:
    """A figure or table."""

    title: str
    run: Callable[[Options], Outcome]


def _theory(options: Options) -> Outcome:
    content, claims = theory(200 if options.budget == "quick" else 5000)
    return Outcome(content, claims, theory_figure(content))


def _figure_1(options: Options) -> Outcome:
    quick = options.budget == "quick"
    content, claims = figure_1(20 if quick else 1000, 200)
    return Outcome(content, claims, toy_figure(content))


def run_table(study: Study, options: Options) -> Outcome:
    """A table of :data:`blaq.reproduce.tables.STUDIES`."""
    data = datasets.load(study.data, options.data_dir or None)
    content = run_study(study, options.budget, data, Resources(
        options.out, options.workers, options.deadline, options.device), options.rows)
    plan = study.plans[options.budget]
    note = f"budget {options.budget}: {plan.epochs} epochs"
    return Outcome(content, claims_of(study, content, note), table_figure(content, note),
                   content["missing"], table_lines(content))


def table_lines(content: Mapping[str, Any]) -> list[str]:
    """A study's rows for the terminal."""
    head = ("", "paper", "here, % ± sd", "seeds", "lr", "epochs", "gradients", "seconds")
    return table([head, *((
        row["label"], "" if row["paper"] is None else f"{row['paper']:.2f}",
        Spread(**row["test_accuracy"]).text(100), str(len(row["runs"])), f"{row['lr']:g}",
        str(row["epochs"]), f"{row['evaluations']:,}", f"{row['seconds']['mean']:.0f}")
        for row in content["rows"])], right=range(1, 8))


EXPERIMENTS = {
    "theory": Experiment("what theory says of LAQ and BLAQ, to rounding", _theory),
    **{name: Experiment(study.title, partial(run_table, study))
       for name, study in STUDIES.items()},
    "fig1": Experiment("zig-zag of two weights between signs", _figure_1),
}

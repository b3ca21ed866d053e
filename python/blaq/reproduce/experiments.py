"""Every figure and table by name: what it needs, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .._text import table
from ..train import data as datasets
from .charlm import PLANS as CHAR_PLANS
from .charlm import charlm_claims, run_charlm
from .oscillation import PLANS, oscillation_claims, run_oscillation
from .plots import (
    charlm_figure,
    curves_figure,
    spread_figure,
    swing_figure,
    table_figure,
    theory_figure,
    toy_figure,
    traces_figure,
)
from .results import Claim, Spread, difference, spread, verdict
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
        init: safetensors file of float weights that a table's runs start from.
        deadline: of ``time.monotonic()``.
    """

    out: Path
    budget: str = "short"
    data_dir: str = ""
    rows: tuple[str, ...] = ()
    workers: int = 1
    device: str = "cpu"
    init: str = ""
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
    """A figure or table; ``has_rows``: whether it can be asked for some of its rows."""

    title: str
    run: Callable[[Options], Outcome]
    has_rows: bool = False


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
        options.out, options.workers, options.deadline, options.device, options.init), options.rows)
    plan = study.plans[options.budget]
    note = f"budget {options.budget}: {plan.epochs} epochs"
    if "width" in plan.settings:
        note += f", {plan.settings['width']} of the width"
    return Outcome(content, claims_of(study, content, note), table_figure(content, note),
                   content["missing"], table_lines(content))


def _figure_5(options: Options) -> Outcome:
    """Fig. 5: training curves of LAQ and BLAQ. The paper's network and data are not known here:
    these are Table 4's runs."""
    study = STUDIES["table4"]
    names = options.rows or ("laq", "blaq", "laq-2x")
    outcome = run_table(study, replace(options, rows=names))
    rows = [row for row in outcome.content["rows"] if row["row"] in names]
    content = {**outcome.content, "rows": rows}
    claims = [_lower_loss(rows, key, text) for key, text in (
        ("laq", "as many epochs"), ("laq-2x", "as many gradient evaluations"))]
    note = f"budget {options.budget}"
    return Outcome(content, claims, curves_figure(content, note),
                   [name for name in outcome.unfinished if name.rpartition("-")[0] in names],
                   table_lines(content))


def _lower_loss(rows: Sequence[Mapping[str, Any]], key: str, text: str) -> Claim:
    losses = {row["row"]: {run["seed"]: run["history"][-1]["train_loss"] for run in row["runs"]}
              for row in rows}
    claim = f"BLAQ's last training loss is below LAQ's after {text}"
    seeds = sorted(losses.get("blaq", {}).keys() & losses.get(key, {}).keys())
    if not seeds:
        return Claim(claim, "faster convergence", "nothing", "not measured")
    laq, blaq = ([losses[name][seed] for seed in seeds] for name in (key, "blaq"))
    return Claim(claim, "faster convergence", f"{spread(blaq).text(1, 4)} against "
                 f"{spread(laq).text(1, 4)}, {len(seeds)} seeds", verdict(difference(laq, blaq)))


def _oscillation(options: Options, names: Sequence[str], draw: Callable[..., Any]) -> Outcome:
    plan = PLANS[options.budget]
    data = datasets.load(plan.data, options.data_dir or None)
    content = run_oscillation(plan, options.budget, data, options.out, workers=options.workers,
                              deadline=options.deadline, device=options.device)
    head = ("", "amplitude", "code changes", "Nagel frequency", "seeds")
    lines = table([head, *((
        f"{row['method'].upper()}, {row['bits']} bit", f"{row['amplitude']['mean']:.3g}",
        f"{row['frequency']['mean']:.3g}", f"{row['nagel']['mean']:.3g}", str(row["seeds"]))
        for row in content["rows"])], right=range(1, 5))
    return Outcome(content, oscillation_claims(content, names), draw(content), content["missing"],
                   lines)


def _charlm(options: Options) -> Outcome:
    content = run_charlm(CHAR_PLANS[options.budget], options.budget, options.data_dir, options.out,
                         rows=options.rows, deadline=options.deadline, device=options.device)
    return Outcome(content, charlm_claims(content), charlm_figure(content), content["missing"])


def table_lines(content: Mapping[str, Any]) -> list[str]:
    """A study's rows for the terminal."""
    head = ("", "paper", "here, % ± sd", "last epoch", "seeds", "lr", "epochs", "gradients",
            "seconds")
    return table([head, *((
        row["label"], "" if row["paper"] is None else f"{row['paper']:.2f}",
        Spread(**row["test_accuracy"]).text(100), Spread(**row["last_accuracy"]).text(100),
        str(len(row["runs"])), f"{row['lr']:g}",
        str(row["epochs"]), f"{row['evaluations']:,}", f"{row['seconds']['mean']:.0f}")
        for row in content["rows"])], right=range(1, 9))


EXPERIMENTS = {
    "theory": Experiment("what theory says of LAQ and BLAQ, to rounding", _theory),
    **{name: Experiment(study.title, partial(run_table, study), has_rows=True)
       for name, study in STUDIES.items()},
    "table1": Experiment("amplitude and frequency of oscillation, LAQ and BLAQ", partial(
        _oscillation, names=("amplitude", "frequency"), draw=swing_figure)),
    "fig2": Experiment("latent weights over the steps of a window", partial(
        _oscillation, names=("amplitude",), draw=traces_figure)),
    "fig3": Experiment("amplitude and frequency over all weights", partial(
        _oscillation, names=("frequency",), draw=spread_figure)),
    "fig5": Experiment("training curves, LAQ and BLAQ", _figure_5, has_rows=True),
    "charlm": Experiment("LSTM on War and Peace, LAB's setting", _charlm, has_rows=True),
    "fig1": Experiment("zig-zag of two weights between signs", _figure_1),
}

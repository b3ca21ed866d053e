"""A table of the paper as a study: every method under one recipe, learning rates swept first.

1. Sweep: each row at each rate, a few epochs on part of the training images; the rate of the
   highest validation accuracy is kept.
2. Runs: each row at its rate with every seed, seed by seed, so that an interrupted study compares
   all methods by the seeds that it finished.
3. Test accuracy is read at the epoch of the highest validation accuracy, and beside it at the last
   epoch, where no choice adds its noise. The validation images are training images that no run
   trains on; the test images take no part in any choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..train.checkpoint import write_json
from ..train.config import TrainConfig
from ..train.data import Data, Split, held_out
from ..train.loop import quantized_epochs
from .results import Claim, difference, read_versioned, spread, verdict
from .runs import RECORD, Job, OutOfTime, Record, read_record, train_jobs

__all__ = ["Comparison", "Plan", "Resources", "Row", "Study", "best_line", "claims_of",
           "limited", "run_study", "summarise"]

SWEEP_SEED = 1000
"""Of the sweep's runs: none of a study's own."""


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Attributes:
        key: name of its folders.
        label: in tables and plots.
        settings: fields of :class:`TrainConfig` beside the study's recipe.
        paper: test accuracy that the paper reports, in percent.
        project: it is not the paper's, but an improvement of this project's or a control.
        like: key of the row whose learning rate it takes; empty: its own sweep.
        epochs: factor on the plan's epochs.
        evaluations: gradient evaluations that a step takes.
    """

    key: str
    label: str
    settings: Mapping[str, Any]
    paper: float | None = None
    project: bool = False
    like: str = ""
    epochs: float = 1.0
    evaluations: int = 1


@dataclass(frozen=True)
class Plan:
    """How much of a study is run.

    Attributes:
        epochs: of a run.
        seeds: number of runs of a row.
        rates: learning rates that the sweep tries; a single one is taken as it is.
        sweep_epochs: epochs of the sweep's runs.
        sweep_images: training images of the sweep's runs; 0: all.
        rows: keys of the rows that are run; empty: all.
        settings: fields of :class:`TrainConfig` that differ from the recipe's.
        validation: images held out of the training set.
        images: training images, and at most test images, that there are at all; 0: all.
    """

    epochs: int
    seeds: int
    rates: tuple[float, ...]
    sweep_epochs: int = 1
    sweep_images: int = 0
    rows: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    validation: int = 10_000
    images: int = 0


@dataclass(frozen=True)
class Comparison:
    """A claim that a row is above another, and the gap in percent that the paper reports."""

    claim: str
    ours: str
    theirs: str
    paper: float | None = None


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        name, title: ``table4`` and what it shows.
        data: name of the data set.
        recipe: fields of :class:`TrainConfig` that all rows share.
        rows: methods.
        plans: by the name of a budget.
        comparisons: what the table is about.
        milestones: of the schedule ``step``, as shares of the run.
    """

    name: str
    title: str
    data: str
    recipe: Mapping[str, Any]
    rows: Sequence[Row]
    plans: Mapping[str, Plan]
    comparisons: Sequence[Comparison] = ()
    milestones: tuple[float, ...] = ()

    def row(self, key: str) -> Row:
        for row in self.rows:
            if row.key == key:
                return row
        raise ValueError(f"blaq.reproduce: rows of {self.name} must be among "
                         f"{', '.join(row.key for row in self.rows)}, got {key!r}")

    def config(self, row: Row, plan: Plan, *, lr: float, seed: int, epochs: int,
               device: str) -> TrainConfig:
        """Of one run."""
        milestones = ",".join(f"{share * epochs:g}" for share in self.milestones)
        return TrainConfig.of({
            "data": self.data, "milestones": milestones, "threads": 1, "device": device,
            **self.recipe, **plan.settings, **row.settings, "lr": lr, "seed": seed,
            "epochs": epochs})


@dataclass(frozen=True)
class Resources:
    """What a study may use.

    Attributes:
        out: folder of the run folders.
        workers, deadline: of :func:`train_jobs`.
        device: to train on.
        init: safetensors file of float weights that every run starts from.
    """

    out: Path
    workers: int = 1
    deadline: float = float("inf")
    device: str = "cpu"
    init: str = ""


def run_study(study: Study, budget: str, data: Data, using: Resources,
              only: Sequence[str] = ()) -> dict[str, Any]:
    """Run what is not finished of a study, up to the deadline, and sum up what is.

    Args:
        budget: key of ``study.plans``.
        data: the data set.
        only: keys of the rows to run now; all finished rows are summed up.
    """
    plan = study.plans[budget]
    if using.init:
        plan = replace(plan, settings={**plan.settings, "init": using.init})
    chosen = [study.row(key) for key in only or plan.rows] or list(study.rows)
    data = limited(data, plan.images)
    out = using.out / f"{study.name}-{budget}"
    try:
        rates = _sweep(study, plan, chosen, data, using, out)
        jobs = [Job(f"{row.key}-s{seed}", _final(study, plan, row, rates, seed, using.device),
                    row.evaluations) for seed in range(plan.seeds) for row in chosen]
        for part in _apart(jobs):  # the second finds its runs done
            _share_records(part, study, plan, rates, out, using.device)
            train_jobs(part, out, data, workers=using.workers, deadline=using.deadline)
    except OutOfTime:
        pass
    return summarise(study, plan, out, using.device)


def _apart(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Jobs, and those that are the same run as one of these."""
    first: dict[TrainConfig, Job] = {}
    own = [job for job in jobs if first.setdefault(job.config, job) is job]
    return own, [job for job in jobs if first[job.config] is not job]


def _share_records(jobs: Sequence[Job], study: Study, plan: Plan, rates: Mapping[str, float],
                   out: Path, device: str) -> None:
    """Give a job the record of a finished run that is the same but for its name: two rows are one
    where a control's learning rate is that which its row's own sweep chose."""
    finished = {}
    for row in study.rows:
        for seed in range(plan.seeds if (row.like or row.key) in rates else 0):
            record = out / f"{row.key}-s{seed}" / RECORD
            if record.exists():
                finished[_final(study, plan, row, rates, seed, device)] = record
    for job in jobs:
        record = out / job.name / RECORD
        if job.config in finished and not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, read_versioned(finished[job.config]))


def limited(data: Data, images: int) -> Data:
    """The first images of both splits, at most this many; 0: all."""
    def part(split: Split) -> Split:
        return replace(split, images=split.images[:images], labels=split.labels[:images])

    return Data(*map(part, data)) if images else data


def _final(study: Study, plan: Plan, row: Row, rates: Mapping[str, float], seed: int,
           device: str) -> TrainConfig:
    config = study.config(row, plan, lr=rates[row.like or row.key], seed=seed, device=device,
                          epochs=round(plan.epochs * row.epochs))
    return config.replaced({"validation": plan.validation})


def _sweep(study: Study, plan: Plan, rows: Sequence[Row], data: Data, using: Resources,
           out: Path) -> dict[str, float]:
    """The learning rate of each row, by validation images; the test images are not there."""
    if len(plan.rates) == 1:
        return dict.fromkeys((row.key for row in study.rows), plan.rates[0])
    rest, valid = held_out(data.train, plan.validation)
    part = Data(limited(Data(rest, valid), plan.sweep_images).train, valid)
    swept = [study.row(key) for key in dict.fromkeys(row.like or row.key for row in rows)]
    jobs = [Job(_sweep_name(row, lr), _swept(study, plan, row, lr, using.device), row.evaluations)
            for row in swept for lr in plan.rates]
    train_jobs(jobs, out, part, workers=using.workers, deadline=using.deadline)
    return _chosen_rates(study, plan, out, using.device)[0]


def _sweep_name(row: Row, lr: float) -> str:
    return f"sweep-{row.key}-{lr:g}"


def _swept(study: Study, plan: Plan, row: Row, lr: float, device: str) -> TrainConfig:
    return study.config(row, plan, lr=lr, seed=SWEEP_SEED, epochs=plan.sweep_epochs,
                        device=device)


def _chosen_rates(study: Study, plan: Plan, out: Path, device: str
                  ) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The best rate of every row whose sweep is finished, and the sweep's table. A sweep's run
    measures the validation images where others measure the test images."""
    rates, table = {}, []
    for row in study.rows:
        found = []
        for lr in plan.rates:
            name = _sweep_name(row, lr)
            if (out / name / RECORD).exists():
                record = read_record(out / name, _swept(study, plan, row, lr, device))
                epochs = quantized_epochs(record["history"])
                best = max((line["test_accuracy"] for line in epochs), default=0.0)
                found.append((best, lr))
        if len(found) == len(plan.rates):
            rates[row.key] = max(found, key=lambda pair: (pair[0], -pair[1]))[1]
            table.append({"row": row.key, "chosen": rates[row.key], "validation_accuracy": {
                f"{lr:g}": best for best, lr in found}})
    return rates, table


def best_line(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The epoch of the highest validation accuracy; of equals, of the lowest validation loss."""
    return max(quantized_epochs(history),
               key=lambda line: (line["valid_accuracy"], -line["valid_loss"]))


def summarise(study: Study, plan: Plan, out: Path, device: str = "cpu") -> dict[str, Any]:
    """Everything that is finished: the sweep, a summary of each row with its runs, what is not."""
    rates, sweep = _chosen_rates(study, plan, out, device)
    if len(plan.rates) == 1:
        rates = dict.fromkeys((row.key for row in study.rows), plan.rates[0])
    rows, missing, diverged = [], [], []
    for row in study.rows:
        wanted = not plan.rows or row.key in plan.rows
        runs = []
        for seed in range(plan.seeds):
            name = f"{row.key}-s{seed}"
            if not (out / name / RECORD).exists() or (row.like or row.key) not in rates:
                if wanted or (out / name).exists():
                    missing.append(name)
                continue
            record = read_record(out / name, _final(study, plan, row, rates, seed, device))
            if record["history"]:
                runs.append(_run_summary(seed, record))
            else:
                diverged.append(name)
        if runs:
            rows.append(_row_summary(row, rates[row.like or row.key], runs))
    return {"study": study.name, "title": study.title, "recipe": dict(study.recipe),
            "plan": asdict(plan), "sweep": sweep, "rows": rows, "missing": missing,
            "diverged": diverged}


def _run_summary(seed: int, record: Record) -> dict[str, Any]:
    history = record["history"]
    best = best_line(history)
    return {"seed": seed, "epoch": best["epoch"], "test_accuracy": best["test_accuracy"],
            "last_accuracy": quantized_epochs(history)[-1]["test_accuracy"],
            "valid_accuracy": best["valid_accuracy"], "evaluations": history[-1]["evaluations"],
            "seconds": round(sum(line["seconds"] for line in history), 1),
            "oscillation": history[-1]["oscillation"], "command": record["command"],
            "commit": record["origin"]["commit"], "dirty": record["origin"]["dirty"],
            "date": record["origin"]["date"], "config": record["config"], "history": history}


def _row_summary(row: Row, lr: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"row": row.key, "label": row.label, "project": row.project, "paper": row.paper,
            "lr": lr, "epochs": len(runs[0]["history"]), "evaluations": runs[0]["evaluations"],
            "test_accuracy": asdict(spread([run["test_accuracy"] for run in runs])),
            "last_accuracy": asdict(spread([run["last_accuracy"] for run in runs])),
            "valid_accuracy": asdict(spread([run["valid_accuracy"] for run in runs])),
            "seconds": asdict(spread([run["seconds"] for run in runs])), "runs": runs}


def claims_of(study: Study, content: Mapping[str, Any], note: str) -> list[Claim]:
    """Verdicts on the study's comparisons, by the seeds that both rows have.

    Args:
        note: what is to be known of the length of the runs.
    """
    rows = {row["row"]: row for row in content["rows"]}
    claims = []
    for item in study.comparisons:
        paper = "more" if item.paper is None else f"{item.paper:+.2f} points"
        if item.ours not in rows or item.theirs not in rows:
            claims.append(Claim(item.claim, paper, "nothing", "not measured"))
            continue
        gap, text = _gap(rows[item.ours], rows[item.theirs], "test_accuracy")
        _, last = _gap(rows[item.ours], rows[item.theirs], "last_accuracy")
        claims.append(Claim(item.claim, paper, f"{text} ({note}); at the last epoch {last}",
                            verdict(gap)))
    return claims


def _gap(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str
         ) -> tuple[dict[str, Any], str]:
    """The difference in percent over the seeds that both rows have, and in words."""
    a, b = ({run["seed"]: 100 * run[key] for run in row["runs"]} for row in (ours, theirs))
    seeds = sorted(a.keys() & b.keys())
    gap = difference([a[seed] for seed in seeds], [b[seed] for seed in seeds])
    text = f"{gap['mean']:+.3f} points"
    if gap["low"] is not None:
        text += f", 95 % interval {gap['low']:+.3f} to {gap['high']:+.3f}, {len(seeds)} seeds"
    return gap, text

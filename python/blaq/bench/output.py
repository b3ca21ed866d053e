"""Results as text, CSV, JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._text import table
from .case import Result, Row
from .machine import Environment
from .targets import Verdict

__all__ = ["format_result", "format_verdicts", "write_csv", "write_json"]

HEADINGS = ("", "median µs", "p20", "p80", "/ blaq", "GB/s", "GOP/s", "error")


def format_result(result: Result) -> str:
    """A case as a table: one line for each variant, times over blaq's in the column ``/ blaq``."""
    own = result.rows[0]
    lines = [[row.variant, _number(row.median_us), _number(row.p20_us), _number(row.p80_us),
              f"{row.ratio:.2f}", _number(row.gb_per_s), _number(row.gop_per_s),
              "" if row.error is None else f"{row.error:.1e}"] for row in result.rows]
    title = (f"{own.case}   [{own.backend}; {own.threads} threads, {own.cache}; "
             f"{own.of_floor:.0%} of the speed of memory]")
    return "\n".join([title, *table([HEADINGS, *lines], right=range(1, len(HEADINGS))), ""])


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """The targets as a table."""
    lines = [[v.target, v.quantity, f"{v.measured:.3g}",
              f"{v.rule} {v.bound:g}" if v.bound is not None else "",
              "" if v.met is None else "met" if v.met else "NOT MET"] for v in verdicts]
    heading = ["target", "quantity", "measured", "bound", ""]
    return "\n".join(table([heading, *lines], right=(2,)))


def write_csv(path: Path, environment: Environment, items: Sequence[Row | Verdict]) -> None:
    """One line for each row, the environment's columns before its own."""
    records = [{**environment, **asdict(item)} for item in items]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else list(environment))
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in record.items()} for record in records)


def write_json(path: Path, environment: Environment, rows: Sequence[Row],
               verdicts: Sequence[Verdict]) -> None:
    """All of a run in one object: ``environment``, ``rows``, ``targets``."""
    report = {"environment": dict(environment), "rows": [asdict(row) for row in rows],
              "targets": [asdict(verdict) for verdict in verdicts]}
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


"""A figure's or table's file: what was measured, by which command, and the verdicts on the claims.

``NAME.json`` holds ``format``, ``version``, ``name``, ``title``, ``command``, ``settings``,
``origin`` (date, machine, versions, commit), ``claims`` and ``content``, which differs by name.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._extras import import_extra
from ..bench.machine import describe
from ..train.checkpoint import write_json

__all__ = ["FORMAT", "VERSION", "Claim", "Spread", "command_line", "difference", "read_versioned",
           "spread", "write_results"]

FORMAT, VERSION = "blaq-reproduce", 1
FOLDERS = ("--out", "--data-dir")


@dataclass(frozen=True)
class Claim:
    """A statement of the paper or of theory, beside what was measured here.

    Attributes:
        claim: what is asserted.
        paper: the number of the paper, or of ``source``.
        here: this measurement.
        verdict: ``holds``, ``does not hold``, ``undecided`` (within the uncertainty), ``not
            measured``, or ``holds only where ...``.
        source: ``paper`` or ``theory``.
    """

    claim: str
    paper: str
    here: str
    verdict: str
    source: str = "paper"

    def __str__(self) -> str:
        return (f"{self.claim}: {self.source} says {self.paper} / here measured {self.here} / "
                f"verdict: {self.verdict}")


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of a sample; None for one value) and number of values."""

    mean: float
    sd: float | None
    count: int

    def text(self, factor: float = 1.0, digits: int = 2) -> str:
        sd = "" if self.sd is None else f" ± {factor * self.sd:.{digits}f}"
        return f"{factor * self.mean:.{digits}f}{sd}"


def spread(values: Sequence[float]) -> Spread:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Mean of the paired differences and its 95 % interval by Student's t.

    Args:
        ours, theirs: of the same seeds, in the same order.
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(gaps)
    if len(gaps) < 2:
        return {"mean": mean, "low": None, "high": None}
    quantile = import_extra("scipy.stats", "train").t.ppf(0.975, len(gaps) - 1)
    half = float(quantile) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(gap: dict[str, float | None]) -> str:
    """Of the claim that a :func:`difference` is positive."""
    if gap["low"] is None or gap["high"] is None:
        return "undecided (one seed)"
    return "holds" if gap["low"] > 0 else "does not hold" if gap["high"] < 0 else "undecided"


def command_line() -> str:
    """The command that this process was started by, without the folders that it names: they belong
    to a machine and decide nothing."""
    words, kept = iter(sys.argv[1:]), ["blaq"]
    for word in words:
        if word in FOLDERS:
            next(words, None)
        elif not word.startswith(tuple(f"{flag}=" for flag in FOLDERS)):
            kept.append(word)
    return " ".join(kept)


def write_results(path: Path, name: str, title: str, settings: dict[str, Any],
                  claims: Sequence[Claim], content: dict[str, Any]) -> None:
    write_json(path, {
        "format": FORMAT, "version": VERSION, "name": name, "title": title,
        "command": command_line(), "settings": settings, "origin": describe(),
        "claims": [asdict(claim) for claim in claims], "content": content})


def read_versioned(path: Path) -> dict[str, Any]:
    """A file of this format and version.

    Raises:
        ValueError: it is no JSON, or of another format or version; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"blaq.reproduce: {path}: file must be JSON, got: {error}") from None
    found = content if isinstance(content, dict) else {}
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if found.get(key) != expected:
            raise ValueError(f"blaq.reproduce: {path}: {key} must be {expected!r}, got "
                             f"{found.get(key)!r}; try another --out")
    return found

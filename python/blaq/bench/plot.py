"""Bars of how many times blaq's time each alternative takes, and lines of time over the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from .._extras import import_extra
from .case import BLAQ, FLOOR, Row

__all__ = ["plot", "plot_over_batch"]

LINE = 0.2
"""Inches of a bar, and of a case's name above its bars."""
FASTER, SLOWER = "#2f6f9f", "#c9773c"


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a chart: a block for each case, in it a bar for each alternative, on a log scale.

    Args:
        path: with an ending that matplotlib writes: .png, .svg, .pdf.
        rows: of any number of cases; blaq's own and the floor's make no bar.
        title: small, above the chart: machine and versions.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_class = import_extra("matplotlib.figure", "train").Figure
    ticker = import_extra("matplotlib.ticker", "train")
    bars: dict[float, Row] = {}
    names: dict[float, str] = {}
    at = 0.0
    for case, block in itertools.groupby(rows, lambda row: row.case):
        names[at] = case
        for row in block:
            if row.variant not in (BLAQ, FLOOR):
                at += 1
                bars[at] = row
        at += 1.6
    figure = figure_class(figsize=(8, LINE * at + 0.9), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(list(bars), [row.ratio - 1 for row in bars.values()], left=1, height=0.8,
                      color=[FASTER if row.ratio >= 1 else SLOWER for row in bars.values()])
    axes.bar_label(drawn, [f"{row.ratio:.2g}×" for row in bars.values()], padding=3, fontsize=7)
    axes.set_yticks(list(bars), [row.variant for row in bars.values()], fontsize=7)
    for y, case in names.items():
        axes.text(0.005, y, case, fontsize=8, fontweight="bold", va="center",
                  transform=axes.get_yaxis_transform())
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=99))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_ylim(at - 0.8, -0.8)
    axes.margins(x=0.1)
    axes.set_xlabel("time over blaq's; right of the line blaq is faster", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, fontsize=7, color="dimgray")
    figure.savefig(path, dpi=150)


def plot_over_batch(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a chart of microseconds over M, a panel for each width, thread count and cache.

    Args:
        path: with an ending that matplotlib writes.
        rows: of packed_linear; sizes are ``MxNxK``.
        title: small, above the chart.
    """
    figure_class = import_extra("matplotlib.figure", "train").Figure
    rows = [row for row in rows if row.variant != FLOOR]
    across = sorted({(row.cache, row.threads) for row in rows})
    down = sorted({row.bits for row in rows if row.bits})
    names = list(dict.fromkeys(row.variant for row in rows))
    colours = import_extra("matplotlib", "train").colormaps["tab10"].colors
    figure = figure_class(figsize=(3.6 * len(across), 3.0 * len(down) + 1), layout="constrained")
    panels = figure.subplots(len(down), len(across), squeeze=False, sharex=True, sharey=True)
    for line, bits in zip(panels, down, strict=True):
        for axes, (cache, threads) in zip(line, across, strict=True):
            for i, name in enumerate(names):
                points = sorted((int(row.size.split("x")[0]), row.median_us) for row in rows if (
                    row.variant, row.bits, row.cache, row.threads) == (name, bits, cache, threads))
                own = name.startswith(BLAQ)
                axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3,
                          color=colours[i % 10], linewidth=2 if own else 1,
                          linestyle="-" if own else "--")
            axes.set_title(f"{bits} bit{'s' * (bits > 1)}, {threads} thread{'s' * (threads > 1)}, "
                           f"{cache}", fontsize=8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("M", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("µs", fontsize=8)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=7)
    figure.suptitle(title, fontsize=7, color="dimgray")
    figure.savefig(path, dpi=150)

"""Curves of training runs as inline SVG: one panel each, in the colours of the page they stand in.

A figure is drawn with placeholder colours, which become CSS variables in its SVG: so it follows the
page into dark mode, and takes its legend from the page (:data:`STYLES`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._extras import import_extra

__all__ = ["STYLES", "Curve", "Style", "draw", "to_svg"]


class Style(NamedTuple):
    """How a kind of run is drawn: CSS variable of the colour, its place-holder, the line's dashes
    (lengths on, off, … in points; none: solid)."""

    variable: str
    placeholder: str
    dashes: tuple[float, ...]


STYLES = {"fp": Style("--fp", "#010203", (1.0, 1.6)), "laq": Style("--laq", "#010204", (5.0, 2.0)),
          "blaq": Style("--blaq", "#010205", ()),
          "blaq-half": Style("--half", "#010206", (6.0, 1.5, 1.0, 1.5))}
INK, GRID = "#010207", "#010208"
VARIABLES = {**{style.placeholder: style.variable for style in STYLES.values()}, INK: "--ink",
             GRID: "--grid"}


@dataclass(frozen=True)
class Curve:
    """One line with its band: the mean, and the smallest to the largest, over runs.

    Attributes:
        style: key of ``STYLES``.
        x: of every point.
        runs: ``[runs][points]``.
    """

    style: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]


def draw(curves: Sequence[Curve], x_label: str, y_label: str, *, log: bool = False,
         zoom: bool = False) -> Any:
    """A matplotlib figure of one panel.

    Args:
        curves: to draw; the last is on top.
        x_label, y_label: of the axes, with units.
        log: logarithmic y; values of 0 leave a gap.
        zoom: y from the lowest value after the first fifth of a curve, so that what begins far off
            does not flatten the rest.
    """
    figure_class = import_extra("matplotlib.figure", "train").Figure
    figure = figure_class(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    lowest, highest = [], []
    for curve in curves:
        style, values = STYLES[curve.style], np.asarray(curve.runs, dtype=float)
        if log:
            values = np.where(values > 0, values, np.nan)
        low, mean, high = values.min(0), values.mean(0), values.max(0)
        axes.fill_between(curve.x, low, high, color=style.placeholder, alpha=0.16, linewidth=0)
        dashes = (0, style.dashes) if style.dashes else "solid"
        axes.plot(curve.x, mean, color=style.placeholder, linestyle=dashes, linewidth=1.8,
                  marker="o" if len(curve.x) == 1 else None, markersize=4)
        settled = slice(min(len(curve.x) // 5, len(curve.x) - 1), None)
        lowest.append(low[settled].min())
        highest.append(high.max())
    if log:
        axes.set_yscale("log")
        ticker = import_extra("matplotlib.ticker", "train")
        few = max(highest) < 100 * min(lowest)  # two powers of 10 or fewer: label more than these
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    elif zoom and max(highest) > min(lowest):
        margin = 0.06 * (max(highest) - min(lowest))
        axes.set_ylim(min(lowest) - margin, max(highest) + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    return figure


def to_svg(figure: Any, title: str) -> str:
    """The figure as an SVG element for an HTML page that defines the CSS variables."""
    matplotlib = import_extra("matplotlib", "train")
    buffer = io.StringIO()
    # Text stays text, set in the page's font; a fixed salt gives the same file for the same data.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"#0102\d\d", lambda match: f"var({VARIABLES[match[0]]})", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)

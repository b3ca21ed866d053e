"""Drawing of figures: one style, PNG and SVG from the same figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import import_extra
from ..train.checkpoint import write_whole

__all__ = ["COLOURS", "charlm_figure", "curves_figure", "figure", "finish", "save", "spread_figure",
           "swing_figure", "table_figure", "theory_figure", "toy_figure", "traces_figure"]

COLOURS = {"fp": "#4d4d4d", "laq": "#d55e00", "blaq": "#0072b2", "other": "#999999",
           "project": "#009e73"}
"""Of Okabe and Ito (2008): apart for the colour-blind too."""
SHADES = ("#d55e00", "#e69f00", "#009e73", "#0072b2", "#cc79a7", "#56b4e9")


def figure(columns: int = 1, size: tuple[float, float] = (5.2, 3.6), **options: Any) -> Any:
    """A matplotlib figure and its axes, always a list."""
    made = import_extra("matplotlib.figure", "train").Figure(
        figsize=(size[0] * columns, size[1]), layout="constrained")
    return made, made.subplots(1, columns, squeeze=False, **options)[0].tolist()


def finish(axes: Any, title: str, x_label: str, y_label: str, legend: bool = True) -> None:
    """Titles, grid and legend of one panel."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)


def save(made: Any, path: Path) -> None:
    """Write ``path`` with .png and .svg; the SVG is the same for the same data."""
    matplotlib = import_extra("matplotlib", "train")
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        write_whole(path.with_suffix(".png"),
                    lambda file: made.savefig(file, format="png", dpi=130))
        write_whole(path.with_suffix(".svg"),
                    lambda file: made.savefig(file, format="svg", metadata={"Date": None}))


def table_figure(content: Mapping[str, Any], note: str) -> Any:
    """A study's test accuracies: mean and standard deviation over seeds, and the paper's values."""
    rows = content["rows"]
    made, (axes,) = figure(size=(7.2, 0.32 * max(len(rows), 1) + 1.7))
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        found, key = row["test_accuracy"], row["row"].partition("-")[0]
        kind = "project" if row["project"] else key if key in COLOURS else "other"
        axes.plot([100 * run["test_accuracy"] for run in row["runs"]], [place] * len(row["runs"]),
                  "o", color=COLOURS[kind], markersize=3, alpha=0.45)
        axes.errorbar(100 * found["mean"], place, xerr=100 * (found["sd"] or 0), fmt="D",
                      color=COLOURS[kind], capsize=3, markersize=5)
        if row["paper"] is not None:
            axes.plot(row["paper"], place, marker="|", linestyle="", color="black", markersize=12,
                      markeredgewidth=1.6)
    axes.plot([], [], "D", color="#777777", markersize=5, label="mean ± sd of the seeds (dots)")
    if any(row["paper"] is not None for row in rows):
        axes.plot([], [], marker="|", linestyle="", color="black", markersize=9,
                  markeredgewidth=1.6, label="the paper's, by its own recipe")
    axes.set_yticks(places, [f"{row['label']} ({row['evaluations']:,} gradients)" for row in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    finish(axes, f"{content['title']} ({note})", "test accuracy in %", "", legend=False)
    made.legend(*axes.get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2,
                loc="outside lower center")
    return made


def curves_figure(content: Mapping[str, Any], note: str) -> Any:
    """Fig. 5: training loss over epochs, and test error over gradient evaluations."""
    made, (left, right) = figure(2)
    styles = {"laq": ("LAQ", "-"), "blaq": ("BLAQ, a = 0.6", "-"),
              "laq-2x": ("LAQ, twice the epochs", "--")}
    for row in content["rows"]:
        if row["row"] not in styles:
            continue
        label, line = styles[row["row"]]
        colour = COLOURS[row["row"].partition("-")[0]]
        histories = [run["history"] for run in row["runs"]]
        for axes, x, y in ((left, "epoch", "train_loss"), (right, "evaluations", "test_accuracy")):
            values = np.array([[item[y] for item in history] for history in histories])
            values = 100 * (1 - values) if y == "test_accuracy" else values
            places = [item[x] for item in histories[0]]
            axes.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.15,
                              linewidth=0)
            axes.plot(places, values.mean(0), line, color=colour, marker="o", markersize=4,
                      label=label)
    left.set_yscale("log")
    ticker = import_extra("matplotlib.ticker", "train")
    left.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_minor_formatter(ticker.NullFormatter())
    left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    finish(left, content["title"], "epoch", "training loss, mean over the epoch")
    finish(right, f"{note}; band: least to most of the seeds", "gradient evaluations",
           "test error in %")
    return made


def charlm_figure(content: Mapping[str, Any]) -> Any:
    """Test cross-entropy over gradient evaluations."""
    made, (axes,) = figure()
    styles = {"fp": "full precision", "bc": "BinaryConnect", "bwn": "BWN", "laq": "LAQ",
              "blaq": "BLAQ, a = 0.6"}
    colours = {**COLOURS, "bc": SHADES[4], "bwn": SHADES[1]}
    for run in content["runs"]:
        axes.plot([line["evaluations"] for line in run["history"]],
                  [line["test_loss"] for line in run["history"]], "o-", markersize=4,
                  color=colours[run["method"]],
                  label=styles[run["method"]] if run["seed"] == 0 else None)
    plan = content["plan"]
    finish(axes, f"LSTM of {plan['units']} units on War and Peace, 1 bit", "gradient evaluations",
           "test cross-entropy in nats", legend=bool(content["runs"]))
    return made


def swing_figure(content: Mapping[str, Any]) -> Any:
    """Table 1: amplitude and frequency of LAQ and BLAQ at each width."""
    made, panels = figure(3, (3.9, 3.4))
    kinds = ((panels[0], "amplitude", "amplitude of latent weights"),
             (panels[1], "frequency", "code changes of a weight in the window"),
             (panels[2], "nagel", "oscillation frequency (Nagel et al.)"))
    for axes, name, label in kinds:
        for offset, method in ((-0.2, "laq"), (0.2, "blaq")):
            rows = [row for row in content["rows"] if row["method"] == method]
            bars = axes.bar([(1, 2, 4).index(row["bits"]) + offset for row in rows],
                            [row[name]["mean"] for row in rows], 0.38, color=COLOURS[method],
                            yerr=[row[name]["sd"] or 0.0 for row in rows], capsize=3,
                            label="LAQ" if method == "laq" else "BLAQ, a = 0.6")
            axes.bar_label(bars, [f"{row[name]['mean']:.2g}" for row in rows], fontsize=7,
                           padding=2)
        axes.set_xticks([0, 1, 2], ["1", "2", "4"])
        axes.margins(y=0.3 if axes is panels[0] else 0.15)
        finish(axes, label, "bits", "", legend=axes is panels[0])
    return made


def traces_figure(content: Mapping[str, Any]) -> Any:
    """Fig. 2: the same latent weights under LAQ and BLAQ, in the window."""
    made, panels = figure(3, (4.2, 3.4))
    for axes, bits in zip(panels, (1, 2, 4), strict=True):
        for method in ("laq", "blaq"):
            runs = [run for run in content["runs"] if (run["method"], run["bits"]) ==
                    (method, bits)]
            for number, trace in enumerate(runs[0]["traces"] if runs else []):
                axes.plot(trace, color=COLOURS[method], linewidth=1.0, alpha=0.9,
                          label=None if number else method.upper())
        axes.axhline(0, color="#888888", linewidth=0.6)
        finish(axes, f"{bits} bit{'s' if bits > 1 else ''}", "step of the window",
               "latent weight" if bits == 1 else "")
    return made


def spread_figure(content: Mapping[str, Any]) -> Any:
    """Fig. 3: how amplitude and frequency are spread over the weights, by width."""
    made, (left, right) = figure(2, (5.4, 3.8))
    lines = {1: "-", 2: "--", 4: ":"}
    for run in content["runs"]:
        if run["seed"] != 0:
            continue
        label = f"{run['method'].upper()}, {run['bits']} bit{'s' if run['bits'] > 1 else ''}"
        style = {"color": COLOURS[run["method"]], "linestyle": lines[run["bits"]], "label": label}
        left.plot([100 * q for q in run["quantiles"]], run["amplitude_quantiles"], marker="o",
                  markersize=3, **style)
        counts = np.array(run["frequency_histogram"], dtype=float)
        above = counts[::-1].cumsum()[::-1] / counts.sum()
        right.plot(range(len(above)), np.where(above > 0, above, np.nan), **style)
    right.set_yscale("log")
    finish(left, "Amplitude", "quantile of the weights in %", "(max - min) / 2 in the window")
    finish(right, "Frequency", "code changes in the window, at least (20: or more)",
           "share of the weights")
    return made


def theory_figure(content: Mapping[str, Any]) -> Any:
    """The power law's paths, and the measured stability limits."""
    made, (left, right) = figure(2)
    for law, colour in zip(content["power_law"], SHADES, strict=False):
        name = "LAQ" if law["backtrack"] == 1 else f"BLAQ a = {law['backtrack']:g}"
        left.plot(law["path"], "o-", color=colour, markersize=4, label=name)
    finish(left, "$|w|^{1.5}$, exact Hessian, 1 bit", "step", "w", legend=False)
    left.set_ylim(-0.78, 1.15)
    left.legend(fontsize=8, frameon=False, loc="upper center", ncols=2)
    limits = sorted(content["limits"], key=lambda item: item["theory"])
    names = ["LAQ" if item["backtrack"] == 1 else f"a = {item['backtrack']:g}" for item in limits]
    drawn = right.bar(names, [item["measured"] for item in limits], color=COLOURS["blaq"],
                      width=0.55, label="measured")
    right.bar_label(drawn, [f"{item['measured']:.3f}" for item in limits], fontsize=8, padding=2)
    right.plot(names, [item["theory"] for item in limits], marker="_", linestyle="",
               color="black", markersize=24, label="theory")
    right.margins(y=0.12)
    finish(right, "Quadratic without quantization", "backtrack", "stable up to lr × curvature")
    return made


def toy_figure(content: Mapping[str, Any]) -> Any:
    """Fig. 1: latent paths at η = 1.9 on the loss, and flips over η."""
    made, (left, right) = figure(2)
    side = np.linspace(-0.6, 0.6, 121)
    one, two = np.meshgrid(side, side)
    left.contour(one, two, 5 * (one - 0.054) ** 2 + (two + 0.055) ** 2,
                 levels=[0.02, 0.1, 0.3, 0.7, 1.2, 2.0], colors="#cccccc", linewidths=0.8)
    for key, colour in (("laq", COLOURS["laq"]), ("blaq", COLOURS["blaq"])):
        path = np.asarray(content["paths"][key])
        left.plot(path[:, 0], path[:, 1], "-", color=colour, linewidth=0.9, marker=".",
                  markersize=4, label="LAQ" if key == "laq" else "BLAQ a = 0.6")
    start = content["paths"]["laq"][0]
    left.plot(*start, "s", color="black", markersize=5, label="start")
    left.plot(0.054, -0.055, "*", color="black", markersize=10, label="optimum")
    left.axhline(0, color="#888888", linewidth=0.6)
    left.axvline(0, color="#888888", linewidth=0.6)
    left.set_xlim(-0.62, 0.62)
    left.set_ylim(-0.62, 0.62)
    finish(left, f"Latent weights at η = {content['path_eta']:g}", "ω₁", "ω₂")
    for (name, curve), colour in zip(content["curves"].items(), SHADES, strict=False):
        right.plot(content["etas"], curve, "o-", markersize=3, color=colour, label=name)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(right, f"Sign flips in {content['steps']} steps, mean of {content['starts']} starts",
           "η (1 is Newton's step)", "flips of both weights")
    return made

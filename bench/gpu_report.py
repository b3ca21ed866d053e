"""Results of bench/gpu.py as JSON, a table in Markdown and a roofline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def write(folder: Path, report: Report) -> None:
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "results.md").write_text("\n".join(markdown(report)) + "\n")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no roofline: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    roofline(figure.add_subplot(), report)
    figure.savefig(folder / "roofline.png", dpi=130)


def markdown(report: Report) -> Iterator[str]:
    environment, card = report["environment"], report["card"]
    copy = card["copy_bytes_per_second"]
    yield f"# {environment['gpu']}"
    yield ""
    yield (f"{environment['date']}, torch {environment['torch']}, Triton {environment['triton']}, CUDA "
           f"{environment['cuda']}, commit {environment['commit']}"
           f"{' with changes' if environment['dirty'] else ''}. Copy {copy / 1e12:.2f} TB/s; 8192³ "
           f"product {card['bfloat16_operations_per_second'] / 1e12:.0f} TFLOP/s in bfloat16, "
           f"{card['float16_operations_per_second'] / 1e12:.0f} in float16. Medians of interleaved "
           "rounds, CUDA graphs, cold data.")
    for name, error in report.get("failures", {}).items():
        yield f"\n**{name} failed**: {error}"
    if "host_microseconds" in report:
        yield "\n| eager call | µs of the processor |\n|---|--:|"
        for name, value in report["host_microseconds"].items():
            yield f"| {name} | {value:.1f} |"
    for section in ("packed_linear", "step"):
        rows = [row for row in report["rows"] if row["section"] == section]
        if rows:
            yield (f"\n## {section}\n\n| case | variant | µs | blaq is faster by | of copy bandwidth | "
                   "TFLOP/s | error |\n|---|---|--:|--:|--:|--:|--:|")
            own = {row["case"]: row["microseconds"] for row in rows if row["variant"] == "blaq"}
            for row in rows:
                yield _line(row, own.get(row["case"]), copy)


def _line(row: Report, own: float | None, copy: float) -> str:
    seconds, mine = row["microseconds"] * 1e-6, row["variant"] == "blaq"
    variant = row["variant"] + ("" if row["graph"] else " (eager)")
    variant += f": {row['kernel']}" if mine and "kernel" in row else ""
    ratio = f"{row['microseconds'] / own:.2f}×" if own and not mine else ""
    bandwidth = f"{row['bytes'] / seconds / copy:.0%}" if row["bytes"] else ""
    rate = f"{row['operations'] / seconds / 1e12:.1f}" if row["operations"] else ""
    key = {"blaq": "error", "blaq CUDA C++, 8 bits": "error in 8 bits"}.get(row["variant"])
    error = f"{row[key]:.1e}" if key in row else ""
    return (f"| {row['case']} | {variant} | {row['microseconds']:.1f} | {ratio} | {bandwidth} | {rate} | "
            f"{error} |")


def roofline(axes: Any, report: Report) -> None:
    """Operations a second over operations a byte: every product, under the card's own two roofs."""
    bandwidth = report["card"]["copy_bytes_per_second"]
    peak = report["card"]["bfloat16_operations_per_second"]
    intensities = [2.0**i for i in range(-2, 14)]
    axes.plot(intensities, [min(peak, bandwidth * i) / 1e12 for i in intensities], color="black",
              linewidth=1, label="copy bandwidth, 8192³ product")
    for variant, colour in (("blaq", "#2f6f9f"), ("torch", "#c9773c")):
        rows = [row for row in report["rows"]
                if row["section"] == "packed_linear" and row["variant"] == variant]
        axes.scatter([row["operations"] / row["bytes"] for row in rows],
                     [row["operations"] / row["microseconds"] / 1e6 for row in rows], s=14,
                     color=colour, label=f"packed_linear, {variant}")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte, at least", ylabel="TFLOP/s",
             title=report["environment"]["gpu"])
    axes.legend()

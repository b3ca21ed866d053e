"""The demo's report: what was measured, as one HTML page that needs no network.

:func:`aggregate` condenses runs, :func:`render` turns the summary into the page; every number and
every sentence that compares is made from the summary, so the page can say nothing else.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._text import percent, size
from .figures import STYLES, Curve, draw, to_svg

__all__ = ["aggregate", "compare", "faster", "render", "sentence", "spread"]

Json = dict[str, Any]
FINAL = ("train_loss", "test_loss", "test_accuracy", "flip_ratio", "oscillation")
PANELS: tuple[tuple[str, str, Json], ...] = (
    ("train_loss", "training loss (nats)", {"log": True}),
    ("test_loss", "test loss (nats)", {"log": True}),
    ("test_accuracy", "test accuracy (%)", {"zoom": True}))
RESTLESS = (("flip_ratio", "codes changed by a step (share)"),
            ("oscillation", "oscillation frequency (per step)"))
STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5a6675; --page: #fbfbfa; --card: #fff;
  --grid: #e2e6ea; --fp: #6b7480; --laq: #c8500a; --blaq: #0069b4; --half: #00805c;
  --good: #00724f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #a3afbb; --page: #14181d;
  --card: #1c2229; --grid: #343d47; --fp: #a7b1bb; --laq: #ff9a57; --blaq: #5cb8f5;
  --half: #3fd0a0; --good: #4fd6a5; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; } .soft, figcaption, small { color: var(--soft); }
.cards { display: grid; gap: .8rem; margin: 1.6rem 0;
  grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem;
  padding: .9rem 1.1rem; } .card b { display: block; font-size: 1.55rem; line-height: 1.25; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { padding: .42rem .6rem; border-bottom: 1px solid var(--grid); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.words th, .words td { text-align: left; white-space: normal; }
.panels { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; } .panels svg { width: 100%; height: auto; background: var(--card);
  border: 1px solid var(--grid); border-radius: .6rem; padding: .4rem; }
svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .2rem 0 .7rem; }
.legend svg { width: 2.4rem; height: .8rem; margin-right: .45rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
a { color: var(--blaq); } code { font-size: .92em; }
"""


def aggregate(runs: Sequence[Json]) -> list[Json]:
    """A row for each setting, in the order of its first run.

    Args:
        runs: each with ``setting``, ``label``, ``style``, ``method``, ``bits`` (None: full
            precision), ``seed``, ``config`` and ``history`` (the lines that
            :func:`blaq.train.loop.train` returns).

    Returns:
        rows with those of a setting's fields, ``lr``, ``epochs``, ``evaluations``, ``seeds``,
        ``accuracies`` (by seed), ``seconds`` (mean), and for every metric of the last epoch
        ``{"mean", "std"}``: None where not measured; std is the sample's, None for one seed.
    """
    rows = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        mine = [run for run in runs if run["setting"] == setting]
        last = [run["history"][-1] for run in mine]
        same = {key: mine[0][key] for key in ("setting", "label", "style", "method", "bits")}
        rows.append({**same, "lr": mine[0]["config"]["lr"], "epochs": last[0]["epoch"],
                     "evaluations": last[0]["evaluations"], "seeds": [run["seed"] for run in mine],
                     "accuracies": [line["test_accuracy"] for line in last],
                     "seconds": statistics.mean(sum(line["seconds"] for line in run["history"])
                                                for run in mine),
                     **{key: _mean_std([line[key] for line in last]) for key in FINAL}})
    return rows


def _mean_std(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.mean(known),
            "std": statistics.stdev(known) if len(known) > 1 else None}


def compare(rows: Sequence[Json]) -> list[Json]:
    """BLAQ minus LAQ at each width: at equal epochs (BLAQ then has two gradient evaluations for
    LAQ's one) and at equal evaluations (BLAQ with half the epochs), seed by seed."""
    found = []
    by_kind = {(row["style"], row["bits"]): row for row in rows}
    for bits in dict.fromkeys(row["bits"] for row in rows if row["bits"] is not None):
        for style, basis in (("blaq", "epochs"), ("blaq-half", "gradient evaluations")):
            ours, theirs = by_kind.get((style, bits)), by_kind.get(("laq", bits))
            if ours is None or theirs is None:
                continue
            differences = [a - b for a, b in zip(ours["accuracies"], theirs["accuracies"],
                                                 strict=True)]
            found.append({"bits": bits, "basis": basis, "blaq": ours["setting"],
                          "laq": theirs["setting"], "differences": differences,
                          "mean": statistics.mean(differences),
                          "losses": [row["test_loss"]["mean"] for row in (ours, theirs)]})
    return found


def render(summary: Json) -> str:
    """The page, from what the demo writes to summary.json (its ``runs`` with their histories)."""
    table, images = summary["table"], summary["data"]["test"]
    failed = [check for check in summary["checks"] if not check["passed"]]
    seeds = len(summary["protocol"]["seeds"])
    parts = [
        "<h1>1- and 2-bit weights, trained, packed and run</h1>",
        f"<p class=soft>LeNet-5 on scikit-learn's handwritten digits ({summary['data']['train']} "
        f"images to train on, {images} to test): full precision, LAQ and BLAQ, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'} each. {_text(summary['created'])}, "
        f"{_text(summary['machine'])}.</p>",
        *(["<p class=bad>A quick run, on a smaller network and fewer epochs: it shows that the "
           "pieces work, its numbers mean nothing.</p>"] if summary["quick"] else []),
        _cards(summary),
        "<h2>Accuracy</h2>", _accuracy_table(table),
        "<p class=soft>Test accuracy after the last epoch, mean ± sample standard deviation over "
        f"seeds. One test image is {percent(1 / images)}. Gradients: mini-batches evaluated, two "
        "in a step of BLAQ; “half the epochs” is BLAQ with as many of them as LAQ, its schedule "
        "run to the end.</p>",
        "<h2>BLAQ against LAQ</h2>", _list(map(sentence, summary["comparisons"])),
    ]
    for bits in dict.fromkeys(row["bits"] for row in table if row["bits"]):
        parts += [f"<h2>Training at {_bits(bits)}</h2>", _curves(summary["runs"], bits)]
    parts += [_packed(summary), _method(summary, bool(failed))]
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><title>BLAQ demo</title>"
            f"<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n")


def _text(value: object) -> str:
    return html.escape(str(value))


def _bits(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{title}</th>" for title in head)
    return (f"<div class=scroll><table class={kind}><thead><tr>{heads}</tr></thead>"
            f"<tbody>{cells}</tbody></table></div>")


def spread(value: Json | None, show: Callable[[float], str]) -> str:
    """``mean ± std``; a dash where nothing was measured."""
    if value is None:
        return "–"
    return show(value["mean"]) + ("" if value["std"] is None else f" ± {show(value['std'])}")


def _cards(summary: Json) -> str:
    cards = [(f"{percent(row['test_accuracy']['mean'])}", _text(row["label"]))
             for row in summary["table"] if row["style"] in ("fp", "blaq")]
    best = next(item for item in summary["packed"] if item["best"])
    cards.append((f"{best['bytes_float32'] / best['bytes_packed']:.1f}×",
                  f"smaller: {_bits(best['bits'])} packed, against float32"))
    passed, count = sum(check["passed"] for check in summary["checks"]), len(summary["checks"])
    cards.append((f"{passed} of {count}", "checks passed: the packed model is the trained one"
                  if passed == count else "checks passed: see below"))
    return "<div class=cards>" + "".join(
        f"<div class=card><b>{value}</b>{label}</div>" for value, label in cards) + "</div>"


def _accuracy_table(rows: Sequence[Json]) -> str:
    head = ("", "accuracy, %", "by seed, %", "training loss", "test loss", "gradients", "lr")
    return _table(head, [
        (_text(row["label"]), spread(row["test_accuracy"], lambda x: f"{100 * x:.2f}"),
         ", ".join(f"{100 * x:.2f}" for x in row["accuracies"]),
         spread(row["train_loss"], lambda x: f"{x:.2g}"),
         spread(row["test_loss"], lambda x: f"{x:.3f}"), f"{row['evaluations']:,}",
         f"{row['lr']:g}") for row in rows])


def sentence(item: Json) -> str:
    """What a comparison shows, claiming no more than the seeds do."""
    signs = frozenset((x > 0) - (x < 0) for x in item["differences"])
    verdict = {frozenset({1}): "BLAQ is ahead in every seed",
               frozenset({-1}): "LAQ is ahead in every seed",
               frozenset({0}): "they are equal in every seed",
               frozenset({0, 1}): "BLAQ is ahead or equal in every seed",
               frozenset({0, -1}): "LAQ is ahead or equal in every seed"}.get(
        signs, "the seeds disagree: no difference is shown")
    if len(item["differences"]) == 1:
        verdict = "one seed shows no more than itself"
    each = ", ".join(_points(x) for x in item["differences"])
    return (f"{_bits(item['bits'])}, equal {item['basis']}: BLAQ's accuracy is "
            f"{_points(item['mean'])} points against LAQ's (by seed {each}); {verdict}. Test loss "
            f"{item['losses'][0]:.3f} against {item['losses'][1]:.3f}.")


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


def _curves(runs: Sequence[Json], bits: int) -> str:
    """Loss and accuracy by epoch and by evaluations, then flips and oscillation."""
    chosen: dict[str, list[Json]] = {style: [] for style in STYLES}
    for run in runs:
        if run["bits"] in (None, bits):
            chosen[run["style"]].append(run)
    chosen = {style: mine for style, mine in chosen.items() if mine}
    panels = [_panel(chosen, x, key, y, f"{y}, {_bits(bits)}, by {x}", **options)
              for key, y, options in PANELS for x in ("epoch", "evaluations")]
    quantized = {style: mine for style, mine in chosen.items() if style != "fp"}
    restless = [_panel(quantized, "epoch", key, y, f"{y}, {_bits(bits)}", log=True)
                for key, y in RESTLESS]
    return (f"{_legend(chosen)}<div class=panels>{''.join(panels)}</div>"
            f"<h3>Flips and oscillation</h3>{_legend(quantized)}"
            f"<div class=panels>{''.join(restless)}</div>"
            "<p class=soft>Lines: means over seeds; bands: smallest to largest. Accuracy's axis is "
            "cut below what a fifth of the training reaches. Codes changed: mean over an epoch's "
            "steps. Oscillation: a change of code against the direction of the weight's last one, "
            "exponential average with momentum 0.01, mean over all weights, at the epoch's end.</p>"
            )


def _panel(chosen: dict[str, list[Json]], x: str, key: str, y_label: str, title: str,
           **options: bool) -> str:
    factor = 100.0 if key == "test_accuracy" else 1.0
    curves = [Curve(style, [line[{"epoch": "epoch"}.get(x, x)] for line in mine[0]["history"]],
                    [[factor * line[key] for line in run["history"]] for run in mine])
              for style, mine in chosen.items()]
    x_label = "epoch" if x == "epoch" else "gradient evaluations (mini-batches)"
    return f"<figure>{to_svg(draw(curves, x_label, y_label, **options), title)}</figure>"


def _legend(chosen: dict[str, list[Json]]) -> str:
    def entry(style: str, label: str) -> str:
        look = STYLES[style]
        dashes = " ".join(f"{1.8 * length:g}" for length in look.dashes)
        return (f"<span><svg viewBox='0 0 40 12' aria-hidden=true><line x1=1 x2=39 y1=6 y2=6 "
                f"stroke='var({look.variable})' stroke-width=3 stroke-dasharray='{dashes}'/></svg>"
                f"{_text(label)}</span>")

    return "<div class=legend>" + "".join(
        entry(style, f"{mine[0]['label']}, lr {mine[0]['config']['lr']:g}")
        for style, mine in chosen.items()) + "</div>"


def _packed(summary: Json) -> str:
    sizes = _table(("model", "float32", "packed", "ratio", "file", "accuracy when trained"), [
        (f"{_text(item['label'])}, seed {item['seed']}", size(item["bytes_float32"]),
         size(item["bytes_packed"]), f"{item['bytes_float32'] / item['bytes_packed']:.1f}×",
         f"<a href='{_text(item['file'])}'>{_text(item['file'])}</a> ({size(item['file_bytes'])})",
         percent(item["test_accuracy"])) for item in summary["packed"]])
    latency = _table(("model", "images at once", "float32", "packed", "packed is"), [
        (_text(item["label"]), str(entry["batch"]), f"{1e6 * entry['float32']:,.0f} µs",
         f"{1e6 * entry['packed']:,.0f} µs", faster(entry["ratio"]))
        for item in summary["packed"] for entry in item["latency"]])
    checks = _table(("check", "measured", "limit", "result"), [
        (_text(check["name"]), _text(check["measured"]), _text(check["limit"]),
         "<span class=good>passed</span>" if check["passed"] else "<span class=bad>failed</span>")
        for check in summary["checks"]], "words")
    return ("<h2>The packed model</h2><p>Of each width, the BLAQ run of the best test accuracy is "
            "packed, saved, and loaded by a new process, which computes the logits of all test "
            f"images. {_text(summary['backend'])}</p>{checks}<h3>Size</h3>{sizes}"
            f"<h3>Latency</h3>{latency}<p class=soft>Whole network, one thread, medians of "
            "interleaved rounds; the ratio is the median of the rounds' ratios.</p>")


def faster(ratio: float) -> str:
    return f"{1 / ratio:.2f}× faster" if ratio < 1 else f"{ratio:.2f}× slower"


def _method(summary: Json, failed: bool) -> str:
    protocol = summary["protocol"]
    sweep = protocol["sweep"]
    rates = _table(("", *(f"lr {rate:g}" for rate in sweep["rates"])), [
        (_text(row["label"]), *(f"<b>{percent(x)}</b>" if rate == row["chosen"] else percent(x)
                                for rate, x in zip(sweep["rates"], row["accuracies"], strict=True)))
        for row in sweep["rows"]])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return (f"<h2>How it was done</h2><p>{_text(protocol['text'])}</p>"
            f"<h3>Choice of the learning rate</h3><p>{_text(sweep['text'])}</p>{rates}"
            f"<h3>Files</h3><p>All numbers of this page, every run's config and history: "
            f"<a href='summary.json'>summary.json</a>. The runs themselves lie beside it. "
            f"{_text(versions)}.</p>"
            + ("<p class=bad>A check failed: do not use these files.</p>" if failed else ""))

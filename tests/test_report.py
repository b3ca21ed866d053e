import statistics
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from blaq.train import demo, report
from blaq.train.figures import Curve, draw, to_svg


def run_of(setting, seed, accuracies, *, bits=1, style=None, flips=0.1):
    """A made-up run, one epoch for each accuracy."""
    per_epoch = 20 if style == "blaq" else 10
    history = [{"epoch": i + 1, "evaluations": per_epoch * (i + 1), "train_loss": 1.0 / (i + 1),
                "test_loss": 2.0 / (i + 1), "test_accuracy": accuracy, "lr": 0.01,
                "flip_ratio": flips and flips / (i + 1), "oscillation": flips and 0.01,
                "seconds": 1.5} for i, accuracy in enumerate(accuracies)]
    return {"setting": setting, "label": f"<{setting}>", "style": style or setting.split("-")[0],
            "method": setting.split("-")[0], "bits": bits, "seed": seed, "config": {"lr": 0.01},
            "history": history}


def test_aggregate_by_hand():
    runs = [run_of("laq", seed, [0.5, last]) for seed, last in enumerate([0.8, 0.9, 1.0])]
    runs += [run_of("fp", 0, [0.7], bits=None, flips=None)]
    laq, fp = report.aggregate(runs)
    assert (laq["setting"], laq["epochs"], laq["evaluations"], laq["lr"]) == ("laq", 2, 20, 0.01)
    assert laq["seeds"] == [0, 1, 2] and laq["accuracies"] == [0.8, 0.9, 1.0]
    assert laq["test_accuracy"]["mean"] == pytest.approx(0.9)
    assert laq["test_accuracy"]["std"] == pytest.approx(0.1)
    assert laq["train_loss"] == {"mean": 0.5, "std": 0.0} and laq["seconds"] == 3.0
    assert laq["flip_ratio"]["mean"] == pytest.approx(0.05)
    assert fp["flip_ratio"] is None and fp["test_accuracy"] == {"mean": 0.7, "std": None}


@pytest.mark.parametrize(("differences", "verdict"), [
    ((0.01, 0.02, 0.03), "BLAQ is ahead in every seed"),
    ((-0.01, -0.02, -0.03), "LAQ is ahead in every seed"),
    ((0.0, 0.0, 0.0), "they are equal in every seed"),
    ((0.01, 0.0, 0.01), "BLAQ is ahead or equal in every seed"),
    ((0.0, 0.0, -0.01), "LAQ is ahead or equal in every seed"),
    ((0.05, -0.01, 0.05), "the seeds disagree: no difference is shown"),
    ((0.5,), "one seed shows no more than itself")])
def test_a_comparison_claims_no_more_than_the_seeds_do(differences, verdict):
    laq = [run_of("laq", seed, [0.5]) for seed in range(len(differences))]
    ours = [run_of("blaq", seed, [0.5 + d]) for seed, d in enumerate(differences)]
    half = [run_of("half", seed, [0.5 - d], style="blaq-half")
            for seed, d in enumerate(differences)]
    same_epochs, same_gradients = report.compare(report.aggregate(laq + ours + half))
    assert same_epochs["differences"] == pytest.approx(differences)
    assert same_gradients["differences"] == pytest.approx([-d for d in differences])
    assert same_gradients["basis"] == "gradient evaluations" and same_gradients["blaq"] == "half"
    assert same_epochs["mean"] == pytest.approx(statistics.mean(differences))
    text = report.sentence(same_epochs)
    assert verdict in text and f"{100 * abs(differences[0]):.2f}" in text


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in its place, and on anything from elsewhere."""

    VOID = ("meta", "line", "path", "use", "rect")
    LEFT_OPEN = ("html", "head", "body")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert tag not in ("script", "link", "img", "iframe")
        for name, value in attrs:
            assert not (name in ("href", "src", "xlink:href") and "//" in value), value
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def made_up(passed=True, quick=False):
    """A summary with three seeds of every setting."""
    runs = []
    for setting in demo.SETTINGS:
        for seed in range(3):
            run = run_of(setting.name, seed, [0.5, 0.9, 0.95 + 0.01 * seed], bits=setting.bits,
                         style=setting.style, flips=0.1 if setting.bits else None)
            runs.append({**run, "label": setting.label})
    rows = report.aggregate(runs)
    packed = [{"best": bits == 1, "label": f"BLAQ, {bits}", "bits": bits, "seed": 2,
               "bytes_float32": 3200, "bytes_packed": 100 * bits, "file_bytes": 4321,
               "file": "blaq/packed.safetensors", "test_accuracy": 0.97,
               "latency": [{"batch": 64, "float32": 2e-3, "packed": 1e-3, "ratio": 0.5}]}
              for bits in (1, 2)]
    check = {"name": "logits < all", "passed": passed, "measured": "3 & 4", "limit": "0"}
    sweep = {"text": "Swept.", "rates": [0.001, 0.01], "rows": [
        {"label": "LAQ", "accuracies": [0.9123, 0.9234], "chosen": 0.01}]}
    return {"created": "now", "machine": "a <machine>", "quick": quick, "backend": "Served.",
            "versions": {"torch": "2.13"}, "data": {"train": 1437, "test": 360},
            "protocol": {"seeds": [0, 1, 2], "text": "Trained.", "sweep": sweep}, "table": rows,
            "comparisons": report.compare(rows), "packed": packed, "checks": [check], "runs": runs}


def test_the_page_is_whole_and_needs_nothing_from_elsewhere():
    page = report.render(made_up())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.seen.count("figure") == 16
    assert "url(http" not in page and "@import" not in page
    assert "#0102" not in page  # every placeholder colour became a variable
    for name in {part.split(")")[0] for part in page.split("var(")[1:]}:
        assert page.count(f"{name}: #") == 2  # in light and in dark


def test_the_page_shows_what_was_measured():
    page = report.render(made_up())
    for shown in ("96.00 ± 1.00", "95.00, 96.00, 97.00", "32.0×", "4.2 KiB", "2.00× faster",
                  "<b>92.34 %</b>", "91.23 %", "a &lt;machine&gt;", "logits &lt; all", "3 &amp; 4",
                  "1 of 1", "torch 2.13", "href='blaq/packed.safetensors'"):
        assert shown in page, shown
    assert "failed" not in page and "quick" not in page
    page = report.render(made_up(passed=False, quick=True))
    for shown in ("0 of 1", "see below", ">failed</span>", "do not use", "A quick run"):
        assert shown in page, shown


def test_figures_take_zeros_and_a_single_epoch():
    for curves, options in (([Curve("laq", [1, 2], [[0.0, 1.0], [0.5, 2.0]])], {"log": True}),
                            ([Curve("blaq", [1, 2], [[0.0, 0.0]])], {"log": True}),
                            ([Curve("fp", [1], [[0.5]]), Curve("laq", [1], [[0.5]])], {}),
                            ([Curve("fp", [1, 2, 3], [[0.1, 0.9, 1.0]])], {"zoom": True})):
        svg = to_svg(draw(curves, "x & y", "<share>", **options), "a title")
        assert ElementTree.fromstring(svg).attrib["aria-label"] == "a title"
        assert svg == to_svg(draw(curves, "x & y", "<share>", **options), "a title")



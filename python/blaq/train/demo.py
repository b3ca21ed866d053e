"""The demo: train LeNet-5 on handwritten digits, pack it, run it, and report what was measured.

``make demo``, or ``python -m blaq.train.demo --out runs/demo``: full precision, LAQ and BLAQ at 1
and 2 bits, three seeds each. Leaves a folder for each run, summary.json and report.html.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import blaq_kernels

from .._extras import import_extra
from .._text import percent, size, table
from ..bench.machine import processor
from ..bench.timing import measure
from . import data as datasets
from .checkpoint import CHECKPOINT, load_checkpoint, write_json, write_whole
from .config import TrainConfig
from .loop import restore
from .parallel import available_cores, train_all
from .report import aggregate, compare, faster, render, sentence, spread
from .verify import PACKED, Delivered, deliver

__all__ = ["RATES", "SETTINGS", "Setting", "main"]

EPOCHS, SEEDS, BATCHES = 12, (0, 1, 2), (1, 64)
FAILED, INTERRUPTED = 1, 130
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates that bench/demo_lr.py tries for every setting."""


@dataclass(frozen=True)
class Setting:
    """A row of the demo's table.

    Attributes:
        name: of its run folders, before the seed.
        label, style: in the report; a key of ``figures.STYLES``.
        method: fp, laq or blaq.
        bits: None in full precision.
        accuracies: mean validation accuracy at each of ``RATES``, from bench/results/demo_lr.csv.
    """

    name: str
    label: str
    style: str
    method: str
    bits: int | None
    accuracies: tuple[float, ...]

    @property
    def lr(self) -> float:
        """The rate of the highest validation accuracy; of equals, the lowest."""
        return RATES[self.accuracies.index(max(self.accuracies))]

    def config(self, seed: int, quick: bool = False) -> TrainConfig:
        """``quick``: a smaller network and 2 epochs."""
        epochs = 2 if quick else EPOCHS
        return TrainConfig(
            model="lenet5", data="digits", method=self.method, bits=self.bits or 1, seed=seed,
            epochs=epochs // 2 if self.style == "blaq-half" else epochs, batch_size=64, lr=self.lr,
            width=0.25 if quick else 1.0, threads=1)


SETTINGS = (
    Setting("fp", "full precision", "fp", "fp", None,
            (0.9784, 0.9805, 0.9729, 0.0807)),
    Setting("laq-1bit", "LAQ, 1 bit", "laq", "laq", 1,
            (0.9631, 0.9784, 0.9833, 0.2689)),
    Setting("blaq-1bit", "BLAQ, 1 bit", "blaq", "blaq", 1,
            (0.9652, 0.9805, 0.9854, 0.7534)),
    Setting("blaq-1bit-half", "BLAQ, 1 bit, half the epochs", "blaq-half", "blaq", 1,
            (0.9437, 0.9757, 0.9826, 0.8582)),
    Setting("laq-2bit", "LAQ, 2 bits", "laq", "laq", 2,
            (0.9756, 0.9805, 0.9812, 0.2563)),
    Setting("blaq-2bit", "BLAQ, 2 bits", "blaq", "blaq", 2,
            (0.9763, 0.9812, 0.9833, 0.4348)),
    Setting("blaq-2bit-half", "BLAQ, 2 bits, half the epochs", "blaq-half", "blaq", 2,
            (0.9596, 0.9798, 0.9812, 0.3972)),
)


@dataclass(frozen=True)
class Run:
    """One setting with one seed, and its folder."""

    setting: Setting
    seed: int
    config: TrainConfig
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.setting.label}, seed {self.seed}"

    @property
    def evaluations_per_step(self) -> int:
        return 2 if self.setting.method == "blaq" else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, 1 if anything failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m blaq.train.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder to write, and to go on from (default: runs/demo)")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N",
                        help="runs at a time, one thread each (default: the cores there are)")
    parser.add_argument("--quick", action="store_true",
                        help="a smaller network, 2 epochs, 1 seed: shows that the pieces work")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    logging.basicConfig(format="%(message)s")
    try:
        return run_demo(args.out, workers=args.workers, quick=args.quick)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {args.out} keeps every finished epoch: the same command goes on "
              "from there.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"blaq demo failed: {error}", file=sys.stderr)
        return FAILED


def run_demo(out: Path, *, workers: int, quick: bool = False) -> int:
    """Train what is not trained yet, then pack, check, time and report."""
    began = time.perf_counter()
    runs = [Run(setting, seed, setting.config(seed, quick), out / f"{setting.name}-s{seed}")
            for setting in SETTINGS for seed in (SEEDS[:1] if quick else SEEDS)]
    data = datasets.load("digits")
    print(f"LeNet-5 on {len(data.train):,} handwritten digits, {len(data.test)} for testing: "
          f"{len(runs)} runs into {out}, {workers} at a time")
    _train(runs, len(data.train), workers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training: the same sums, in the same order
    try:
        summary = _measure(runs, data, out, quick)
    finally:
        torch.set_num_threads(threads)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "summary.json", summary)
    page = render(summary).encode()
    write_whole(out / "report.html", lambda file: file.write(page))
    return _print(summary, out)


def _train(runs: Sequence[Run], images: int, workers: int) -> None:
    """Train, with a line for each finished run and a bar that counts gradient evaluations."""
    done = {run: _epochs_done(run) for run in runs}
    finished = sum(done[run] == run.config.epochs for run in runs)
    begun = sum(0 < done[run] < run.config.epochs for run in runs)
    if finished or begun:
        print(f"Going on: {finished} of {len(runs)} runs are finished, {begun} go on from their "
              "last finished epoch")
    # The longest first, so that the last ones to finish leave no core idle for long.
    left = sorted((run for run in runs if done[run] < run.config.epochs),
                  key=lambda run: (done[run] - run.config.epochs) * run.evaluations_per_step)
    steps = images // runs[0].config.batch_size
    with import_extra("tqdm", "train").tqdm(
            total=sum(steps * run.config.epochs * run.evaluations_per_step for run in runs),
            initial=sum(steps * done[run] * run.evaluations_per_step for run in runs),
            unit=" gradients", smoothing=0.05, disable=not left,
            mininterval=0.2 if sys.stderr.isatty() else 10) as bar:

        def on_epoch(index: int, line: dict[str, Any]) -> None:
            run = left[index]
            bar.set_description(f"{run.setting.name} {line['epoch']}/{run.config.epochs}", False)
            if line["epoch"] == run.config.epochs:
                bar.write(f"  {run.label:38} accuracy {percent(line['test_accuracy'])}, "
                          f"training loss {line['train_loss']:.4f}")

        train_all([(run.folder, run.config) for run in left], workers=workers, on_epoch=on_epoch,
                  on_batch=lambda index: bar.update(left[index].evaluations_per_step))


def _epochs_done(run: Run) -> int:
    """Epochs that the run has behind it; its folder must hold no other run."""
    path = run.folder / CHECKPOINT
    if not path.exists():
        return 0
    saved = load_checkpoint(path)
    ours, theirs = run.config.as_dict(), saved["config"]
    for name in ours:
        if ours[name] != theirs.get(name):
            raise ValueError(f"{run.folder} must hold a run with {name} = {ours[name]!r}, got "
                             f"{theirs.get(name)!r}; try another --out")
    return len(saved["history"])


def _measure(runs: Sequence[Run], data: datasets.Data, out: Path, quick: bool) -> dict[str, Any]:
    """Everything that summary.json holds."""
    records = [_record(run, out) for run in runs]
    rows = aggregate(records)
    packed, checks, serving = [], [], {}
    for bits in (1, 2):
        best = _best(run for run in records if run["style"] == "blaq" and run["bits"] == bits)
        delivered = deliver(out / best["folder"])
        packed.append({"best": False, **{key: best[key] for key in ("label", "bits", "seed")},
                       "file": f"{best['folder']}/{PACKED}", **delivered.sizes,
                       "test_accuracy": best["history"][-1]["test_accuracy"],
                       "latency": _latency(delivered, data.test, rounds=20 if quick else 200)})
        checks += [{**check._asdict(), "name": f"{best['label']}: {check.name}"}
                   for check in delivered.checks]
        serving = delivered.serving
    max(packed, key=lambda item: item["test_accuracy"])["best"] = True
    return {
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "quick": quick,
        "machine": f"{processor()}, {available_cores()} cores",
        "versions": {"python": platform.python_version(), **{
            name: importlib.metadata.version(name) for name in ("torch", "numpy", "scikit-learn")},
            "blaq-kernels": blaq_kernels.__version__},
        "serving": serving, "backend": _backend(serving),
        "data": {"name": "digits", "train": len(data.train), "test": len(data.test)},
        "protocol": _protocol(runs), "table": rows, "comparisons": compare(rows),
        "packed": packed, "checks": checks, "runs": records}


def _record(run: Run, out: Path) -> dict[str, Any]:
    """A run as plain data."""
    setting = run.setting
    return {"setting": setting.name, "label": setting.label, "style": setting.style,
            "method": setting.method, "bits": setting.bits, "seed": run.seed,
            "folder": str(run.folder.relative_to(out)), "config": run.config.as_dict(),
            "history": restore(run.folder)[1].history}


def _best(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The run of the highest test accuracy; of equals, of the lowest test loss."""
    def rank(record: dict[str, Any]) -> tuple[float, float]:
        return record["history"][-1]["test_accuracy"], -record["history"][-1]["test_loss"]

    return max(records, key=rank)


def _latency(delivered: Delivered, split: datasets.Split, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both networks for one batch of each size: medians of interleaved rounds."""
    found = []
    for count in BATCHES:
        images = split.normalise(split.images[:count])
        with torch.inference_mode():
            times = measure({"float32": partial(delivered.trained, images),
                             "packed": partial(delivered.packed, images)},
                            rounds=rounds, most_seconds=2.0)
        found.append({"batch": count, "float32": times["float32"].median,
                      "packed": times["packed"].median,
                      "ratio": times["packed"].over(times["float32"])})
    return found


def _backend(serving: dict[str, str]) -> str:
    linear, conv = serving["packed_linear"], serving["packed_conv2d"]
    return f"Its packed linear layers were served by {linear}, its convolutions by {conv}."


def _protocol(runs: Sequence[Run]) -> dict[str, Any]:
    config, epochs = runs[0].config, max(run.config.epochs for run in runs)
    return {
        "epochs": epochs, "batch_size": config.batch_size,
        "seeds": sorted({run.seed for run in runs}),
        "text": f"The 8×8 images are enlarged to 28×28. Every setting: {epochs} epochs (or half of "
                f"them) in batches of {config.batch_size}, cosine schedule, no weight decay, no "
                "augmentation, one thread; a seed gives all settings the same initial weights and "
                "the same order of images. Full precision is AdamW. LAQ is BLAQ with backtrack 1; "
                f"BLAQ's backtrack is {TrainConfig().backtrack}. All weights are quantized, first "
                "and last layer included, one scale a layer; biases are not.",
        "sweep": {
            "text": "Each setting has the rate, among those of the table, of the highest mean "
                    "accuracy on held-out training images: five runs, each without another fifth "
                    "of the training set, which it is then measured on. The test set had no part "
                    "in it. Measured beforehand by bench/demo_lr.py, not by this run.",
            "rates": list(RATES), "rows": [
                {"label": setting.label, "accuracies": list(setting.accuracies),
                 "chosen": setting.lr} for setting in SETTINGS]}}


def _print(summary: dict[str, Any], out: Path) -> int:
    """The outcome on the terminal, and as the exit status."""
    print("\nTest accuracy after the last epoch, mean ± standard deviation over seeds")
    print("\n".join("  " + line for line in table([
        (row["label"], spread(row["test_accuracy"], lambda x: f"{100 * x:.2f}") + " %",
         f"{row['evaluations']:,} gradient evaluations", f"lr {row['lr']:g}")
        for row in summary["table"]])))
    for item in summary["comparisons"]:
        print(f"  {sentence(item)}")
    for item in summary["packed"]:
        ratio = item["bytes_float32"] / item["bytes_packed"]
        print(f"\n{item['label']}, seed {item['seed']}{', the best' if item['best'] else ''}: "
              f"{size(item['bytes_float32'])} in float32, {size(item['bytes_packed'])} packed "
              f"({ratio:.1f}x smaller); {out / item['file']}")
        for entry in item["latency"]:
            print(f"  batch {entry['batch']:>2}: {1e6 * entry['float32']:,.0f} µs in float32, "
                  f"{1e6 * entry['packed']:,.0f} µs packed ({faster(entry['ratio'])})")
    print()
    for check in summary["checks"]:
        print(f"  {'passed' if check['passed'] else 'FAILED'}  {check['name']}: "
              f"{check['measured']} (limit: {check['limit']})")
    print(f"\n{summary['seconds']:.0f} s. Open {out / 'report.html'}")
    failed = [check["name"] for check in summary["checks"] if not check["passed"]]
    if failed:
        print(f"blaq demo failed: {'; '.join(failed)}", file=sys.stderr)
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())

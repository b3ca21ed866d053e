"""How the demo's learning rates were chosen: every setting at every rate, by cross-validation.

  python bench/demo_lr.py [--workers N]

Trains on four fifths of the digits' training set, measures accuracy on the other fifth, for each of
the five fifths (fold i with seed 100 + i); the test set has no part in it. Writes
bench/results/demo_lr.csv, whose means are in blaq.train.demo.SETTINGS (a test compares them). Runs
that are finished are not run again.
"""

import argparse
import csv
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from blaq.bench.machine import describe
from blaq.train import data as datasets
from blaq.train.demo import RATES, SETTINGS
from blaq.train.loop import restore
from blaq.train.parallel import available_cores, train_all

FOLDS = 5
RESULTS = Path(__file__).parent / "results" / "demo_lr.csv"


def fold_of(split: datasets.Split, fold: int) -> datasets.Data:
    """All but every fifth image, and every fifth from ``fold`` on."""
    held_out = torch.arange(len(split)) % FOLDS == fold
    train, held = (replace(split, images=split.images[mask], labels=split.labels[mask])
                   for mask in (~held_out, held_out))
    return datasets.Data(train, held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_lr"))
    args = parser.parse_args()
    split = datasets.load("digits").train
    rows = []
    for fold in range(FOLDS):
        jobs = {(setting.name, lr): (args.runs / f"{setting.name}-{lr:g}-fold{fold}",
                                     setting.config(100 + fold).replaced({"lr": lr}))
                for setting in SETTINGS for lr in RATES}
        with tqdm(total=sum(config.epochs for _, config in jobs.values()), unit=" epochs",
                  desc=f"fold {fold}", mininterval=10) as bar:
            train_all(list(jobs.values()), workers=args.workers, data=fold_of(split, fold),
                      on_epoch=lambda *_, bar=bar: bar.update())
        for (name, lr), (folder, _) in jobs.items():
            last = restore(folder)[1].history[-1]
            rows.append({"setting": name, "lr": lr, "fold": fold, "epochs": last["epoch"],
                         "train_loss": last["train_loss"], "accuracy": last["test_accuracy"],
                         "loss": last["test_loss"]})
    origin = describe()
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **origin} for row in rows)
    for setting in SETTINGS:
        means = [statistics.mean(row["accuracy"] for row in rows
                                 if (row["setting"], row["lr"]) == (setting.name, lr))
                 for lr in RATES]
        print(f"{setting.name:15}", *(f"{mean:.4f}" for mean in means))


if __name__ == "__main__":
    main()

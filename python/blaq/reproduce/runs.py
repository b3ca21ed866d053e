"""Many training runs, resumable: finished ones are kept as ``run.json``, others go on.

A run's folder is one of :func:`blaq.train.loop.train` until it is finished; its record then takes
the place of the checkpoint, which for a large network is hundreds of megabytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .._extras import import_extra
from .._text import percent
from ..bench.machine import describe
from ..train.checkpoint import CHECKPOINT, METRICS, load_checkpoint, write_json
from ..train.config import FLEXIBLE, TrainConfig
from ..train.data import Data
from ..train.loop import train
from ..train.parallel import train_all
from .results import FORMAT, VERSION, command_line, read_versioned

__all__ = ["RECORD", "Job", "OutOfTime", "Record", "deadline_in", "read_record", "train_jobs"]

RECORD = "run.json"
Record = dict[str, Any]


class OutOfTime(Exception):
    """The time that ``--limit-minutes`` grants is over; every finished epoch is kept."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: its folder's, below the experiment's.
        config: of the run.
        evaluations: gradient evaluations that a step of its method takes.
    """

    name: str
    config: TrainConfig
    evaluations: int = 1


def deadline_in(minutes: float) -> float:
    """``time.monotonic()`` after this many minutes; 0 means never."""
    return time.monotonic() + 60 * minutes if minutes else float("inf")


def read_record(folder: Path, config: TrainConfig, images: int = 0) -> Record:
    """The record of a finished run.

    Raises:
        ValueError: the record is of another version, or of a run with another config or, where
            ``images`` is given, with another number of them.
    """
    path = folder / RECORD
    record = read_versioned(path)
    old = TrainConfig.of(record["config"]).as_dict()
    for key, value in config.as_dict().items():
        if old[key] != value and (key not in FLEXIBLE or key == "epochs"):
            raise ValueError(f"blaq.reproduce: {path}: {key} must be {value!r}, got {old[key]!r}; "
                             "try another --out")
    if images and record["images"] != images:
        raise ValueError(f"blaq.reproduce: {path}: images must be {images}, got "
                         f"{record['images']}; try another --out")
    return record


def train_jobs(jobs: Sequence[Job], out: Path, data: Data, *, workers: int = 1,
               deadline: float = float("inf"), keep_checkpoints: bool = False) -> dict[str, Record]:
    """Train what is not finished, with a bar of gradient evaluations and the time left.

    Args:
        jobs: the runs, in this order.
        out: folder of their folders.
        data: to train on.
        workers: runs at a time, one thread each.
        deadline: of ``time.monotonic()``, see :func:`deadline_in`.
        keep_checkpoints: for who needs the trained weights.

    Returns:
        The record of each run by its name: config, history (the lines of
        :func:`blaq.train.loop.train`; empty where the run ``diverged``), command and origin.

    Raises:
        OutOfTime: at the deadline.
        ValueError, RuntimeError: as :func:`blaq.train.parallel.train_all`.
    """
    records = {job.name: read_record(out / job.name, job.config, len(data.train)) for job in jobs
               if (out / job.name / RECORD).exists()}
    left = [job for job in jobs if job.name not in records]
    steps = {job.name: max(1, (len(data.train) - job.config.validation) // job.config.batch_size)
             * job.evaluations for job in jobs}
    done = {job.name: min(_epochs_done(out / job.name), job.config.epochs) for job in left}
    with _bar(total=sum(steps[job.name] * job.config.epochs for job in jobs),
              initial=sum(steps[job.name] * done.get(job.name, job.config.epochs) for job in jobs),
              disable=not left) as bar:

        def finish(job: Job, diverged: str | None = None) -> Record:
            return _finish(out / job.name, job.config, len(data.train), keep_checkpoints, diverged)

        def on_batch(index: int) -> None:
            bar.update(left[index].evaluations)
            if time.monotonic() > deadline:
                raise OutOfTime

        def on_epoch(index: int, line: dict[str, Any]) -> None:
            job = left[index]
            bar.set_description(f"{job.name} {line['epoch']}/{job.config.epochs}", refresh=False)
            if line["epoch"] == job.config.epochs:
                records[job.name] = finish(job)
                bar.write(f"  {job.name:32} {_best(records[job.name])}")

        while left:
            try:
                _train(left, out, data, workers, on_batch, on_epoch)
            except RuntimeError as error:
                diverged = [job for job in left if f"{out / job.name}: " in str(error)
                            and "must be finite" in str(error)]
                if not diverged:
                    raise
                job = diverged[0]
                records[job.name] = finish(job, str(error))
                bar.write(f"  {job.name:32} diverged")
            else:  # killed between the last epoch and its record: no epoch is reported again
                for job in left:
                    if job.name not in records:
                        records[job.name] = finish(job)
            left = [job for job in left if job.name not in records]
    return records


def _train(jobs: Sequence[Job], out: Path, data: Data, workers: int,
           on_batch: Callable[[int], None], on_epoch: Callable[[int, dict[str, Any]], None]
           ) -> None:
    """:func:`train_all`, in this process where there is one worker."""
    if workers > 1:
        train_all([(out / job.name, job.config) for job in jobs], workers=workers, data=data,
                  on_batch=on_batch, on_epoch=on_epoch)
        return
    for index, job in enumerate(jobs):
        folder = out / job.name

        def batch_done(*_: int, index: int = index) -> None:
            on_batch(index)

        try:
            train(job.config, folder, data=data, on_batch=batch_done,
                  on_epoch=partial(on_epoch, index))
        except RuntimeError as error:
            raise RuntimeError(f"blaq.reproduce: {folder}: {error}") from None


@contextmanager
def _bar(**options: Any) -> Iterator[Any]:
    with import_extra("tqdm", "train").tqdm(
            unit=" gradients", smoothing=0.02, mininterval=0.2 if sys.stderr.isatty() else 60,
            **options) as bar:
        yield bar


def _epochs_done(folder: Path) -> int:
    path = folder / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def _finish(folder: Path, config: TrainConfig, images: int, keep_checkpoint: bool,
            diverged: str | None) -> Record:
    """Write the record; of a run that diverged, without its epochs: none of them can be used."""
    history = [] if diverged else load_checkpoint(folder / CHECKPOINT)["history"]
    record = {"format": FORMAT, "version": VERSION, "command": command_line(),
              "origin": describe(), "config": config.as_dict(), "history": history,
              "images": images, "diverged": diverged}
    write_json(folder / RECORD, record)
    if not keep_checkpoint:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return record


def _best(record: Record) -> str:
    seconds = sum(line["seconds"] for line in record["history"])
    best = max(record["history"], key=lambda line: line["test_accuracy"])
    return f"accuracy {percent(best['test_accuracy'])} in {seconds:.0f} s"

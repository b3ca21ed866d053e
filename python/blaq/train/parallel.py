"""Training runs side by side, in worker processes of one thread each.

Small networks gain little from a second thread and lose much where another program wants the core;
runs of their own gain all of it, and their outcome does not depend on how many cores there are.
"""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch

from .config import TrainConfig
from .data import Data
from .loop import train

__all__ = ["available_cores", "train_all"]

log = logging.getLogger("blaq")
Job = tuple[Path, TrainConfig]


class Stopped(BaseException):
    """Ends a run between two batches, where nothing is half-written."""


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def train_all(jobs: Sequence[Job], *, workers: int, data: Data | None = None,
              on_batch: Callable[[int], None] | None = None,
              on_epoch: Callable[[int, dict[str, Any]], None] | None = None) -> None:
    """Train every ``(folder, config)``, ``workers`` at a time, in this order, each on one thread.

    What comes of a run is in its folder, see :func:`blaq.train.loop.restore`; a run that was begun
    goes on from its last finished epoch. KeyboardInterrupt passes through as soon as the batches
    under way are done: every folder is then ready to be resumed from.

    Args:
        jobs: the runs; no folder twice.
        workers: processes at a time.
        data: to train on, in place of what the configs name.
        on_batch: called with a job's index after each of its batches.
        on_epoch: called with a job's index and an epoch's line (:func:`blaq.train.loop.train`).

    Raises:
        RuntimeError: a run failed, or its process died; the message has the run's folder and error.
            The others are stopped, and can be resumed.
    """
    context = get_context("spawn")  # a forked process cannot use torch's threads
    next_job, stop = context.Value("i", 0), context.Event()
    readers: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            with _later_interrupt():
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_work, daemon=True,
                                          args=(list(jobs), data, next_job, stop, writer))
                process.start()
                writer.close()  # the worker's end is the last: the reader sees when it is gone
                readers[reader] = process
        while readers:
            for ready in wait(list(readers)):
                reader = cast(Connection, ready)
                try:
                    kind, index, value = reader.recv()
                except EOFError:
                    process = readers.pop(reader)
                    process.join()
                    if process.exitcode != 0:
                        raise RuntimeError("blaq.train_all: a worker process died, exit code "
                                           f"{process.exitcode}") from None
                    continue
                if kind == "failed":
                    raise RuntimeError(f"blaq.train_all: {jobs[index][0]}: {value}")
                if kind == "batch" and on_batch is not None:
                    on_batch(index)
                if kind == "epoch" and on_epoch is not None:
                    on_epoch(index, value)
    finally:
        stop.set()
        for reader, process in readers.items():
            reader.close()
            process.join()


@contextmanager
def _later_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and never reaches a process that is started in it:
    it goes to every process of a terminal, and the parent tells the workers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _work(jobs: list[Job], data: Data | None, next_job: Any, stop: Any,
          writer: Connection) -> None:
    """A worker: takes jobs until there are none, or the parent wants no more of them."""
    torch.set_num_threads(1)
    index = 0

    def on_batch(*_: int) -> None:
        if stop.is_set():
            raise Stopped
        writer.send(("batch", index, None))

    def on_epoch(line: dict[str, Any]) -> None:
        writer.send(("epoch", index, line))

    try:
        while not stop.is_set():
            with next_job.get_lock():
                index = next_job.value
                next_job.value += 1
            if index >= len(jobs):
                return
            folder, config = jobs[index]
            try:
                train(config.replaced({"threads": 1}), folder, data=data, on_batch=on_batch,
                      on_epoch=on_epoch)
            except BrokenPipeError:
                raise
            except Exception as error:
                log.debug("%s", traceback.format_exc())
                writer.send(("failed", index, f"{type(error).__name__}: {error}"))
                return
    except (Stopped, BrokenPipeError):  # nobody listens: the parent is gone, or has closed its end
        return

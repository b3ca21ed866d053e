"""The training loop: one for all methods, resumed bit for bit from the last finished epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..methods import make_method
from ..methods.method import Method
from ..metrics import OscillationTracker, flip_ratio
from ..optim import BLAQ
from . import checkpoint as files
from . import data as datasets
from .config import FLEXIBLE, TrainConfig
from .losses import LOSSES
from .weights import load_weights

__all__ = ["TrainResult", "check_device", "evaluate", "learning_rate", "quantized_epochs",
           "restore", "train"]

log = logging.getLogger("blaq")
Line = dict[str, Any]


class TrainResult(NamedTuple):
    """A trained model with the weights that ship, the method that trained it, and one dict for each
    epoch (the lines of metrics.jsonl)."""

    model: nn.Module
    method: Method
    history: list[Line]


def train(config: TrainConfig, out: str | Path, *, resume: bool = True,
          data: datasets.Data | None = None,
          on_batch: Callable[[int, int, int], None] | None = None,
          on_epoch: Callable[[Line], None] | None = None) -> TrainResult:
    """Train a model, leaving after every epoch a run folder to resume from.

    The outcome is a function of the config, the data and the number of threads: the same, bit for
    bit, whether the run was interrupted (also killed, or by Ctrl-C) and resumed or not. torch's
    generators are as before when this returns.

    An epoch's line: ``epoch`` (from 1), ``evaluations`` (of gradients, so far), ``train_loss``
    (mean over the batches, at the weights before each step), ``valid_loss`` and ``valid_accuracy``
    (only where images are held out), ``test_loss``, ``test_accuracy`` (0 to 1), ``lr`` (of the last
    step), ``flip_ratio`` (share of codes that a step changes, mean over the
    epoch), ``oscillation`` (mean frequency, see :class:`blaq.OscillationTracker`), both None where
    not measured, ``seconds``; ``weight_bits`` (mean of a quantized weight) where training
    decides it, and ``quantized``, False, where a method's first phases still measure float weights.

    Args:
        config: the run.
        out: its folder; made where it does not exist.
        resume: go on from the last finished epoch of ``out``, or start if there is none; a finished
            run is returned at once. False: ``out`` must not hold a run.
        data: to train on, in place of what the config names.
        on_batch: called with the epoch (from 1), the batch (from 1) and their number, after each.
        on_epoch: called with an epoch's line, when that epoch can be resumed from.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is False, or another config's run; bad data.
        RuntimeError: a gradient or loss is not finite.
    """
    out = Path(out)
    check_device(config.device)
    saved = _saved(config, out, resume)
    if saved is not None and len(saved["history"]) == config.epochs:
        with _environment(config):
            return _Run.continued(config, saved).result
    data = data or datasets.load(config.data, config.data_dir or None)
    measured = {"test": data.test}
    train_split = data.train
    if config.validation:
        train_split, valid = datasets.held_out(train_split, config.validation)
        measured = {"valid": valid, **measured}
    train_split = train_split.to(config.device)
    measured = {name: split.to(config.device) for name, split in measured.items()}
    with _environment(config):
        run = _Run(config, train_split.in_shape, train_split.num_classes,
                   max(1, len(train_split) // config.batch_size), saved)
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / files.CONFIG, config.as_dict())
        files.write_metrics(out / files.METRICS, run.history)
        while len(run.history) < config.epochs:
            line = run.epoch(train_split, measured, on_batch)
            files.save_checkpoint(out / files.CHECKPOINT, run.state())
            files.write_metrics(out / files.METRICS, run.history)
            if on_epoch is not None:
                on_epoch(line)
        return run.result


def restore(out: str | Path) -> tuple[TrainConfig, TrainResult]:
    """Config, model and method of a run folder as of its last finished epoch, on the CPU.

    Raises:
        ValueError: the folder has no checkpoint, or a damaged one.
    """
    saved = files.load_checkpoint(Path(out) / files.CHECKPOINT)
    config = TrainConfig().replaced({**saved["config"], "device": "cpu"})
    with _environment(config):
        return config, _Run.continued(config, saved).result


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: datasets.Split, batch_size: int = 500,
             loss: str = "cross-entropy") -> tuple[float, float]:
    """Mean loss and accuracy (0 to 1) over a data set, in evaluation mode, in float32."""
    device = next(chain(model.parameters(), model.buffers())).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with parametrize.cached():  # weights that the forward pass quantizes: once, not in every batch
        for images, labels in zip(dataset.images.split(batch_size),
                                  dataset.labels.split(batch_size), strict=True):
            logits = model(dataset.normalise(images).to(device)).float()
            labels = labels.to(device)
            total += LOSSES[loss](logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    model.train(was_training)
    return total.item() / len(dataset), correct.item() / len(dataset)


def quantized_epochs(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines that measured weights that ship: those to choose an epoch from. Where no phase of
    the method has come to them, all."""
    return [line for line in history if line.get("quantized", True)] or list(history)


def check_device(name: str) -> None:
    """Raise ValueError unless this is a device to train and evaluate on, here."""
    kind, _, number = name.partition(":")
    known = (kind == "cpu" and name == kind) or (
        kind == "cuda" and (number.isdigit() or name == kind))
    if not known:
        raise ValueError(f"blaq.train: device must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= count:
        raise ValueError(f"blaq.train: device must be one of the {count} that torch finds, "
                         f"got {name!r}")


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0 over the whole run."""
    warmup, total = config.warmup * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    if config.schedule == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestone_epochs)
        return config.lr * config.gamma ** passed
    if config.schedule == "exponential":
        passed = step // steps_per_epoch - math.ceil(config.milestone_epochs[0])
        return config.lr * config.gamma ** max(0, passed)
    return config.lr


def _saved(config: TrainConfig, out: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint in ``out`` to go on from, if there is one; it must fit the config."""
    begun = (out / files.CONFIG).exists() or (out / files.CHECKPOINT).exists()
    if begun and not resume:
        raise ValueError(f"blaq.train: out must be a folder without a run, got {out}; "
                         "try --resume, or another folder")
    saved = None
    if (out / files.CHECKPOINT).exists():
        saved = files.load_checkpoint(out / files.CHECKPOINT)
        old = TrainConfig().replaced(saved["config"]).as_dict()
        for name, value in config.as_dict().items():
            if value != old[name] and name not in FLEXIBLE:
                raise ValueError(f"blaq.train: {name} must be {old[name]!r}, as the run in {out} "
                                 f"began, got {value!r}")
        done = len(saved["history"])
        if done > config.epochs:
            raise ValueError(f"blaq.train: epochs must be at least {done}, which {out} has behind "
                             f"it, got {config.epochs}")
    return saved


@contextmanager
def _environment(config: TrainConfig) -> Iterator[None]:
    """Threads, seed and deterministic kernels for the run alone."""
    device = torch.device(config.device)
    threads = torch.get_num_threads()
    with (torch.random.fork_rng([device] if device.type == "cuda" else []),
          torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)):
        try:
            torch.set_num_threads(config.threads or threads)
            torch.manual_seed(config.seed)
            yield
        finally:
            torch.set_num_threads(threads)


class _Run:
    """What changes while a run goes on."""

    def __init__(self, config: TrainConfig, in_shape: tuple[int, int, int], num_classes: int,
                 steps_per_epoch: int, saved: dict[str, Any] | None) -> None:
        self.config, self.in_shape, self.num_classes = config, in_shape, num_classes
        self.steps_per_epoch = steps_per_epoch
        self.model = config.build(num_classes, in_shape)
        if config.init and saved is None:
            load_weights(self.model, Path(config.init))
        self.model.to(config.device)
        self.method = make_method(self.model, config, steps_per_epoch)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.method.load_state_dict(saved["method"])
        self.blaq = self.method.optimizer if isinstance(self.method.optimizer, BLAQ) else None
        self.tracker = None
        if config.track_oscillation and self.blaq is not None:
            self.tracker = OscillationTracker(self.blaq)
        self.order = torch.Generator().manual_seed(config.seed)
        self.evaluations = 0
        self.history: list[Line] = []
        if saved is not None:
            self._continue(saved)

    @classmethod
    def continued(cls, config: TrainConfig, saved: dict[str, Any]) -> _Run:
        """A run as its checkpoint has it."""
        return cls(config, saved["in_shape"], saved["num_classes"], saved["steps_per_epoch"], saved)

    def _continue(self, saved: dict[str, Any]) -> None:
        if self.tracker is not None:
            self.tracker.load_state_dict(saved["oscillation"])
        self.order.set_state(saved["order"])
        torch.set_rng_state(saved["random"])
        if saved["random_cuda"] is not None and torch.device(self.config.device).type == "cuda":
            torch.cuda.set_rng_state(saved["random_cuda"], self.config.device)
        self.evaluations = saved["evaluations"]
        self.history = saved["history"]

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint."""
        on_cuda = torch.device(self.config.device).type == "cuda"
        return {"config": self.config.as_dict(), "in_shape": self.in_shape,
                "num_classes": self.num_classes, "steps_per_epoch": self.steps_per_epoch,
                "model": self.model.state_dict(), "method": self.method.state_dict(),
                "oscillation": None if self.tracker is None else self.tracker.state_dict(),
                "order": self.order.get_state(), "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state(self.config.device) if on_cuda else None,
                "evaluations": self.evaluations, "history": self.history}

    @property
    def result(self) -> TrainResult:
        """The run at its end: it cannot go on."""
        return TrainResult(self.method.finalize(), self.method, self.history)

    def epoch(self, train_split: datasets.Split, measured: dict[str, datasets.Split],
              on_batch: Callable[[int, int, int], None] | None) -> Line:
        """Train for an epoch and measure."""
        config, began, number = self.config, time.perf_counter(), len(self.history) + 1
        steps = self.steps_per_epoch
        loss_sum = torch.zeros((), dtype=torch.float64, device=train_split.images.device)
        flips, lr = 0.0, 0.0
        self.model.train()
        batches = datasets.batches(train_split, config.batch_size, self.order,
                                   augment=config.augment)
        for batch, (images, labels) in enumerate(batches):
            lr = learning_rate(config, (number - 1) * steps + batch, steps)
            self.method.set_lr(lr)
            loss_sum += self._step(images, labels)
            if self.blaq is not None:
                flips += flip_ratio(self.blaq)
            if self.tracker is not None:
                self.tracker.update()
            if on_batch is not None:
                on_batch(number, batch + 1, steps)
        self.method.epoch_ended(number)
        train_loss = loss_sum.item() / steps
        results: Line = {}
        with self.method.evaluating():
            for name, split in measured.items():
                results[f"{name}_loss"], results[f"{name}_accuracy"] = evaluate(
                    self.model, split, loss=config.loss)
        if not math.isfinite(train_loss + results["test_loss"]):
            raise RuntimeError(f"blaq.train: loss must be finite, got {train_loss} in epoch "
                               f"{number} and {results['test_loss']} after it; try a lower lr")
        line = {"epoch": number, "evaluations": self.evaluations, "train_loss": train_loss,
                **results, "lr": lr,
                "flip_ratio": flips / steps if self.blaq is not None else None,
                "oscillation": None if self.tracker is None else self.tracker.frequency(),
                "seconds": round(time.perf_counter() - began, 3)}
        if not self.method.is_quantized:
            line["quantized"] = False
        if self.method.weight_bits is not None:
            line["weight_bits"] = self.method.weight_bits
        self.history.append(line)
        return line

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimizer; the loss at the weights before it."""
        def closure() -> Any:
            self.evaluations += 1
            self.model.zero_grad()
            bf16 = self.config.amp == "bf16"
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                loss = LOSSES[self.config.loss](self.model(images), labels)
            penalty = self.method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            if self.config.max_grad_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            return loss

        return self.method.step(closure).detach()

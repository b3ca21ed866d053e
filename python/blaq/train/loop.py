"""The training loop: one for all methods, resumed bit for bit from the last finished epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from ..metrics import OscillationTracker, flip_ratio
from ..optim import BLAQ
from ..param_groups import param_groups
from . import checkpoint as files
from . import data as datasets
from .config import FLEXIBLE, TrainConfig
from .models import build
from .weights import load_weights

__all__ = ["TrainResult", "check_device", "evaluate", "learning_rate", "make_optimizer", "restore",
           "train"]

log = logging.getLogger("blaq")
Line = dict[str, Any]


class TrainResult(NamedTuple):
    """A trained model, its optimizer, and one dict for each epoch (the lines of metrics.jsonl)."""

    model: nn.Module
    optimizer: Optimizer
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
    (mean over the batches, at the weights before each step), ``test_loss``, ``test_accuracy`` (0 to
    1), ``lr`` (of the last step), ``flip_ratio`` (share of codes that a step changes, mean over the
    epoch), ``oscillation`` (mean frequency, see :class:`blaq.OscillationTracker`), both None where
    not measured, and ``seconds``.

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
            return _Run(config, saved["in_shape"], saved["num_classes"], saved).result
    data = data or datasets.load(config.data, config.data_dir or None)
    train_split, test_split = (split.to(config.device) for split in data)
    with _environment(config):
        run = _Run(config, train_split.in_shape, train_split.num_classes, saved)
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / files.CONFIG, config.as_dict())
        files.write_metrics(out / files.METRICS, run.history)
        while len(run.history) < config.epochs:
            line = run.epoch(train_split, test_split, on_batch)
            files.save_checkpoint(out / files.CHECKPOINT, run.state())
            files.write_metrics(out / files.METRICS, run.history)
            if on_epoch is not None:
                on_epoch(line)
        return run.result


def restore(out: str | Path) -> tuple[TrainConfig, TrainResult]:
    """Config, model and optimizer of a run folder as of its last finished epoch, on the CPU.

    Raises:
        ValueError: the folder has no checkpoint, or a damaged one.
    """
    saved = files.load_checkpoint(Path(out) / files.CHECKPOINT)
    config = TrainConfig().replaced({**saved["config"], "device": "cpu"})
    with _environment(config):
        return config, _Run(config, saved["in_shape"], saved["num_classes"], saved).result


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: datasets.Split,
             batch_size: int = 500) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0 to 1) over a data set, in evaluation mode, in float32."""
    device = next(chain(model.parameters(), model.buffers())).device
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in zip(dataset.images.split(batch_size), dataset.labels.split(batch_size),
                              strict=True):
        logits = model(dataset.normalise(images).to(device)).float()
        labels = labels.to(device)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    model.train(was_training)
    return loss.item() / len(dataset), correct.item() / len(dataset)


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


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The config's optimizer; a BLAQ one quantizes the model's weights at once."""
    if not config.quantized:
        return AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    groups = param_groups(model, config.bits, first=_width(config.first_bits),
                          last=_width(config.last_bits))
    return BLAQ(groups, config.lr, codebook=config.codebook, group_size=config.group_size,
                backtrack=config.backtrack_used, max_iter=config.max_iter, method=config.solve,
                one_pass=config.one_pass, weight_decay=config.weight_decay, clip=config.clip)


def _width(text: str) -> int | str | None:
    """A layer's width as ``param_groups`` takes it."""
    return int(text) if text.isdigit() else None if text == "same" else text


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0 over the whole run."""
    warmup, total = config.warmup * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    if config.schedule == "step":
        return config.lr * 0.1 ** ((step >= total / 2) + (step >= total * 3 / 4))
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
                 saved: dict[str, Any] | None) -> None:
        self.config, self.in_shape, self.num_classes = config, in_shape, num_classes
        self.model = build(config.model, num_classes, in_shape, width=config.width)
        if config.init and saved is None:
            load_weights(self.model, Path(config.init))
        self.model.to(config.device)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
        self.optimizer = make_optimizer(self.model, config)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.tracker = None
        if config.track_oscillation and isinstance(self.optimizer, BLAQ):
            self.tracker = OscillationTracker(self.optimizer)
        self.order = torch.Generator().manual_seed(config.seed)
        self.evaluations = 0
        self.history: list[Line] = []
        if saved is not None:
            self._continue(saved)

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
                "num_classes": self.num_classes, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "oscillation": None if self.tracker is None else self.tracker.state_dict(),
                "order": self.order.get_state(), "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state(self.config.device) if on_cuda else None,
                "evaluations": self.evaluations, "history": self.history}

    @property
    def result(self) -> TrainResult:
        return TrainResult(self.model, self.optimizer, self.history)

    def epoch(self, train_split: datasets.Split, test_split: datasets.Split,
              on_batch: Callable[[int, int, int], None] | None) -> Line:
        """Train for an epoch and measure."""
        config, began, number = self.config, time.perf_counter(), len(self.history) + 1
        steps = max(1, len(train_split) // config.batch_size)
        loss_sum = torch.zeros((), dtype=torch.float64, device=train_split.images.device)
        flips, lr = 0.0, 0.0
        self.model.train()
        batches = datasets.batches(train_split, config.batch_size, self.order,
                                   augment=config.augment)
        for batch, (images, labels) in enumerate(batches):
            lr = learning_rate(config, (number - 1) * steps + batch, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss_sum += self._step(images, labels)
            if isinstance(self.optimizer, BLAQ):
                flips += flip_ratio(self.optimizer)
            if self.tracker is not None:
                self.tracker.update()
            if on_batch is not None:
                on_batch(number, batch + 1, steps)
        train_loss = loss_sum.item() / steps
        test_loss, accuracy = evaluate(self.model, test_split)
        if not math.isfinite(train_loss + test_loss):
            raise RuntimeError(f"blaq.train: loss must be finite, got {train_loss} in epoch "
                               f"{number} and {test_loss} after it; try a lower lr")
        line = {"epoch": number, "evaluations": self.evaluations, "train_loss": train_loss,
                "test_loss": test_loss, "test_accuracy": accuracy, "lr": lr,
                "flip_ratio": flips / steps if isinstance(self.optimizer, BLAQ) else None,
                "oscillation": None if self.tracker is None else self.tracker.frequency(),
                "seconds": round(time.perf_counter() - began, 3)}
        self.history.append(line)
        return line

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimizer; the loss at the weights before it."""
        def closure() -> Any:
            self.evaluations += 1
            self.optimizer.zero_grad()
            bf16 = self.config.amp == "bf16"
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            if self.config.max_grad_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            return loss

        loss: Any = self.optimizer.step(closure)
        value: Tensor = loss.detach()
        return value

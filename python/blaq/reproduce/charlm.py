"""A character language model: one LSTM layer on War and Peace, in LAB's setting.

LAB (Hou et al., ICLR 2017, section 4): 512 units, one-hot characters in, forget bias 1, output
layer in full precision; each of the eight matrices (input and hidden, for each gate) is quantized
with a scale of its own. Sequences of 100 characters from a zero state, 100 at a time; gradients
clipped to ±5 each, latent weights to ±1; Adam at 0.002, x 0.98 after each epoch from the tenth
on. Text split 80/10/10. Cross-entropy is in nats a character.

BLAQ's paper has no such experiment: this is its parent's, and the reported values are LAB's.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._extras import import_extra
from ..bench.machine import describe
from ..methods import make_method
from ..train.checkpoint import write_json, write_whole
from ..train.config import TrainConfig
from ..train.data import default_folder
from .results import FORMAT, VERSION, Claim, command_line, read_versioned
from .runs import RECORD, OutOfTime

__all__ = ["PAPER", "PLANS", "CharConfig", "CharLSTM", "CharPlan", "Text", "charlm_claims",
           "read_text", "run_charlm", "train_charlm"]

PAPER = {"fp": 1.268, "bc": 2.942, "bwn": 1.312, "laq": 1.291}
"""LAB's test cross-entropy on War and Peace, 512 units; LAQ at 1 bit is LAB."""
TEXT, STATE = "warpeace_input.txt", "state.pt"
LENGTH = BATCH = 100


@dataclass(frozen=True)
class CharConfig:
    """One run: method and its width, LSTM units, epochs, seed, highest learning rate; ``limit``
    characters of the text, 0 for all."""

    method: str
    units: int
    epochs: int
    seed: int = 0
    lr: float = 2e-3
    limit: int = 0
    batch_size: int = BATCH


@dataclass(frozen=True)
class CharPlan:
    """How much is run."""

    units: int
    epochs: int
    seeds: int
    methods: tuple[str, ...]
    limit: int = 0
    batch_size: int = BATCH


PLANS = {"quick": CharPlan(8, 2, 1, ("fp", "laq", "blaq"), 6000, 4),
         "brief": CharPlan(128, 1, 1, ("laq", "blaq", "fp", "bwn")),
         "short": CharPlan(512, 2, 1, ("fp", "bwn", "laq", "blaq")),
         "full": CharPlan(512, 200, 3, ("fp", "bc", "bwn", "laq", "blaq"))}


class Text(NamedTuple):
    """Sequences of character numbers, int64 ``[n, LENGTH + 1]``, and the number of characters."""

    train: Tensor
    valid: Tensor
    test: Tensor
    symbols: int


def read_text(folder: str | Path | None = None, limit: int = 0) -> Text:
    """``warpeace_input.txt``, plain or .xz, of a folder; None: ``$BLAQ_DATA/text``.

    Raises:
        ValueError: no folder is known, it has no such file, or the file is damaged or too short.
    """
    path = Path(folder) if folder else default_folder("text")
    if path is None:
        raise ValueError(f"blaq.reproduce: a folder must be given that holds {TEXT}, got none; try "
                         "--data-dir, or set BLAQ_DATA to the folder that holds text/")
    plain, packed = path / TEXT, path / f"{TEXT}.xz"
    if not plain.is_file() and not packed.is_file():
        raise ValueError(f"blaq.reproduce: {path}: folder must hold {TEXT} or {TEXT}.xz (War and "
                         "Peace, 3,258,246 characters, of LAB's authors), got neither")
    try:
        content = plain.read_bytes() if plain.is_file() else lzma.decompress(packed.read_bytes())
    except lzma.LZMAError as error:
        raise ValueError(f"blaq.reproduce: {packed}: file must be whole xz, got: {error}") from None
    symbols, numbers = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
    numbers = numbers[:limit or None]
    count = len(numbers)
    parts = (numbers[:count * 8 // 10], numbers[count * 8 // 10:count * 9 // 10],
             numbers[count * 9 // 10:])
    if len(parts[2]) <= LENGTH:
        raise ValueError(f"blaq.reproduce: {path}: text must have more than {10 * LENGTH + 10} "
                         f"characters, got {count}")
    train, valid, test = (torch.from_numpy(part.astype(np.int64)).unfold(0, LENGTH + 1, LENGTH)
                          for part in parts)
    return Text(train, valid, test, len(symbols))


class CharLSTM(nn.Module):
    """Character numbers ``[batch, steps]`` to logits of the next ``[batch, steps, symbols]``."""

    def __init__(self, symbols: int, units: int) -> None:
        super().__init__()
        self.symbols, self.units = symbols, units
        self.input = nn.ModuleList(nn.Linear(symbols, units) for _ in "ifgo")
        self.hidden = nn.ModuleList(nn.Linear(units, units, bias=False) for _ in "ifgo")
        self.decoder = nn.Linear(units, symbols)
        for name, param in self.named_parameters():
            nn.init.zeros_(param) if "bias" in name else nn.init.uniform_(param, -0.08, 0.08)
        nn.init.ones_(_linears(self.input)[1].bias)  # the forget gate's

    def forward(self, numbers: Tensor) -> Tensor:
        one_hot = F.one_hot(numbers, self.symbols).float()
        state = one_hot.new_zeros(1, len(numbers), self.units)
        bias = torch.cat([gate.bias for gate in _linears(self.input)])
        weights = [torch.cat([gate.weight for gate in _linears(gates)])
                   for gates in (self.input, self.hidden)]
        out, _, _ = torch.lstm(one_hot, (state, state), [*weights, bias, torch.zeros_like(bias)],
                               True, 1, 0.0, self.training, False, True)
        logits: Tensor = self.decoder(out)
        return logits


def _linears(gates: nn.Module) -> list[nn.Linear]:
    return [gate for gate in gates.children() if isinstance(gate, nn.Linear)]


def _loss(model: nn.Module, sequences: Tensor) -> Tensor:
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def train_charlm(config: CharConfig, text: Text, out: Path, *, deadline: float = float("inf"),
                 on_batch: Callable[[int], None] | None = None, device: str = "cpu") -> list[Any]:
    """Train into a folder, from its last finished epoch on; a line for each epoch: ``train_loss``,
    ``valid_loss``, ``test_loss``, ``evaluations`` (of gradients, so far) and ``seconds``.

    Args:
        on_batch: called with the gradient evaluations of each step.

    Raises:
        OutOfTime: at the deadline.
    """
    torch.manual_seed(config.seed)
    text = Text(text.train.to(device), text.valid.to(device), text.test.to(device), text.symbols)
    model = CharLSTM(text.symbols, config.units).to(device)
    steps = max(1, len(text.train) // config.batch_size)
    method = make_method(model, TrainConfig.of({
        "method": config.method, "epochs": config.epochs, "lr": config.lr, "seed": config.seed,
        "last_bits": "fp", "clip": 1.0}), steps)
    order, history, evaluations = torch.Generator().manual_seed(config.seed), [], 0
    if (out / STATE).exists():
        saved = torch.load(out / STATE, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        method.load_state_dict(saved["method"])
        order.set_state(saved["order"].cpu())
        history, evaluations = saved["history"], saved["evaluations"]
    out.mkdir(parents=True, exist_ok=True)
    while len(history) < config.epochs:
        began, total = time.perf_counter(), 0.0
        method.set_lr(config.lr * 0.98 ** max(0, len(history) - 9))
        model.train()
        shuffled = torch.randperm(len(text.train), generator=order).to(device)
        for batch in torch.split(shuffled[:steps * config.batch_size], config.batch_size):
            def closure(batch: Tensor = batch) -> Tensor:
                model.zero_grad()
                loss = _loss(model, text.train[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_value_(model.parameters(), 5.0)
                return loss

            total += method.step(closure).item()
            evaluations += method.evaluations_per_step
            if on_batch is not None:
                on_batch(method.evaluations_per_step)
            if time.monotonic() > deadline:
                raise OutOfTime
        method.epoch_ended(len(history) + 1)
        line: dict[str, Any] = {"epoch": len(history) + 1, "evaluations": evaluations,
                                "train_loss": total / steps}
        with method.evaluating():
            line.update(valid_loss=_measure(model, text.valid),
                        test_loss=_measure(model, text.test))
        history.append({**line, "seconds": round(time.perf_counter() - began, 1)})
        state = {"model": model.state_dict(), "method": method.state_dict(),
                 "order": order.get_state(), "history": history, "evaluations": evaluations}
        write_whole(out / STATE, partial(torch.save, state))
    return history


@torch.inference_mode()
def _measure(model: nn.Module, sequences: Tensor) -> float:
    model.eval()
    total: float = sum(_loss(model, part).item() * len(part)
                       for part in torch.split(sequences, BATCH))
    if not math.isfinite(total):
        raise RuntimeError("blaq.reproduce: loss must be finite; try a lower lr")
    return total / len(sequences)


def run_charlm(plan: CharPlan, budget: str, folder: str, out: Path, *, rows: Sequence[str] = (),
               deadline: float = float("inf"), device: str = "cpu") -> dict[str, Any]:
    """Train what is not finished; all that is, as plain data."""
    text = read_text(folder or None, plan.limit)
    out = out / f"charlm-{budget}"
    for name in rows:
        if name not in plan.methods:
            raise ValueError(f"blaq.reproduce: rows of charlm must be among "
                             f"{', '.join(plan.methods)}, got {name!r}")
    configs = {f"{method}-s{seed}": CharConfig(method, plan.units, plan.epochs, seed,
                                               limit=plan.limit, batch_size=plan.batch_size)
               for seed in range(plan.seeds) for method in plan.methods}
    left = {name: config for name, config in configs.items()
            if not (out / name / RECORD).exists() and (not rows or config.method in rows)}
    steps = max(1, len(text.train) // plan.batch_size) * plan.epochs
    cost = sum(steps * (2 if config.method == "blaq" else 1) for config in left.values())
    with import_extra("tqdm", "train").tqdm(total=cost, unit=" gradients", mininterval=10,
                                            disable=not left) as bar:
        for name, config in left.items():
            bar.set_description(name)
            try:
                history = train_charlm(config, text, out / name, deadline=deadline, device=device,
                                       on_batch=bar.update)
            except OutOfTime:
                break
            write_json(out / name / RECORD, {
                "format": FORMAT, "version": VERSION, "command": command_line(),
                "origin": describe(), "config": asdict(config), "history": history})
            (out / name / STATE).unlink()
            bar.write(f"  {name:12} test cross-entropy {history[-1]['test_loss']:.4f}")
    runs, missing = [], []
    for name, config in configs.items():
        if not (out / name / RECORD).exists():
            missing.append(name)
            continue
        record = read_versioned(out / name / RECORD)
        if record["config"] != asdict(config):
            raise ValueError(f"blaq.reproduce: {out / name / RECORD}: config must be "
                             f"{asdict(config)}, got {record['config']}; try another --out")
        best = min(record["history"], key=lambda line: line["valid_loss"])
        runs.append({"name": name, "method": config.method, "seed": config.seed,
                     "test_loss": best["test_loss"], "epoch": best["epoch"],
                     "evaluations": record["history"][-1]["evaluations"],
                     "commit": record["origin"]["commit"], "command": record["command"],
                     "config": record["config"], "history": record["history"]})
    return {"plan": asdict(plan), "symbols": text.symbols, "runs": runs, "missing": missing}


def charlm_claims(content: Mapping[str, Any]) -> list[Claim]:
    """LAB's values beside what was measured, and BLAQ beside LAQ, which has no reported value."""
    plan = content["plan"]
    best: dict[str, float] = {}
    for run in content["runs"]:
        best[run["method"]] = min(best.get(run["method"], math.inf), run["test_loss"])
    note = f"{plan['units']} units, {plan['epochs']} epochs"
    claims = []
    for method, paper in PAPER.items():
        if method in best:
            near = abs(best[method] - paper) <= 0.03
            same = plan["units"] == 512 and plan["epochs"] == 200
            claims.append(Claim(f"test cross-entropy by {method}", f"{paper} (LAB, 512 units, 200 "
                                "epochs)", f"{best[method]:.3f} ({note})", "undecided (shorter run)"
                                if not same else "holds" if near else "does not hold"))
    if {"laq", "blaq"} <= best.keys():
        claims.append(Claim(
            "BLAQ is below LAQ after as many epochs", "nothing",
            f"{best['blaq']:.3f} and {best['laq']:.3f} ({note})", "undecided (one seed)"))
    return claims

"""Table 1, Figs. 2 and 3: how far and how often latent weights swing, LAQ against BLAQ.

A run trains at a constant learning rate, the same for both methods; then a window of further steps
is measured. Amplitude is (max - min) / 2 of a latent weight over the window, frequency how often
its code changed: the paper defines neither, nor its window, so only ratios between methods can be
compared with it. Beside them stands the oscillation frequency of Nagel et al. (2022).

Which weights and moments the paper's Figs. 2 and 3 show is not known. Here Fig. 2 is the latent
weights themselves (amplitude), Fig. 3 the distribution of both quantities over all weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..metrics import AmplitudeTracker, OscillationTracker
from ..optim import BLAQ
from ..train import data as datasets
from ..train.checkpoint import CHECKPOINT, write_json
from ..train.config import TrainConfig
from ..train.data import Data
from ..train.loop import restore
from ..train.losses import LOSSES
from .results import FORMAT, VERSION, Claim, difference, read_versioned, spread, verdict
from .runs import RECORD, Job, OutOfTime, train_jobs
from .study import limited

__all__ = ["PAPER", "PLANS", "OscillationPlan", "measure_window", "oscillation_claims",
           "run_oscillation"]

WINDOW = "window.json"
PAPER = {("laq", 1): (4.86e-4, 15), ("laq", 2): (3.42e-4, 11), ("laq", 4): (2.61e-4, 8),
         ("blaq", 1): (1.43e-4, 4), ("blaq", 2): (1.02e-4, 3), ("blaq", 4): (6.7e-5, 1)}
"""Amplitude and frequency of the paper's Table 1 (ResNet-18) by method and bits."""
SAMPLED, TRACED = 1000, 4
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class OscillationPlan:
    """How much is run: epochs before the window, steps in it, seeds, and the network."""

    epochs: int
    steps: int
    seeds: int
    settings: Mapping[str, Any]
    images: int = 0
    data: str = "mnist"


PLANS = {"quick": OscillationPlan(1, 10, 2, {"model": "lenet5", "width": 0.2, "batch_size": 20},
                                  160),
         "brief": OscillationPlan(1, 200, 3, {"model": "lenet5", "batch_size": 100}, 20_000),
         "short": OscillationPlan(1, 200, 3, {"model": "lenet5", "batch_size": 100}),
         "full": OscillationPlan(20, 2000, 3, {"model": "resnet18", "batch_size": 128,
                                               "augment": True}, data="cifar10")}
LR = 3e-3


def run_oscillation(plan: OscillationPlan, budget: str, data: Data, out: Path, *, workers: int = 1,
                    deadline: float = float("inf"), device: str = "cpu") -> dict[str, Any]:
    """Train and measure what is not finished; everything that is, as plain data."""
    data = limited(data, plan.images)
    out = out / f"oscillation-{budget}"
    keys = [(method, bits, seed) for seed in range(plan.seeds) for bits in (1, 2, 4)
            for method in ("laq", "blaq")]
    jobs = {key: Job(f"{key[0]}-{key[1]}bit-s{key[2]}", TrainConfig.of({
        "data": plan.data, **plan.settings, "method": key[0], "bits": key[1], "seed": key[2],
        "lr": LR, "schedule": "none", "epochs": plan.epochs, "threads": 1, "device": device,
        "track_oscillation": False}), 2 if key[0] == "blaq" else 1) for key in keys}
    for key in keys:
        job = jobs[key]
        if (out / job.name / WINDOW).exists():
            continue
        try:
            train_jobs([job], out, data, workers=workers, deadline=deadline, keep_checkpoints=True)
        except OutOfTime:
            break
        found = measure_window(out / job.name, data, plan.steps)
        write_json(out / job.name / WINDOW, {"format": FORMAT, "version": VERSION,
                                             "steps": plan.steps, **found})
        (out / job.name / CHECKPOINT).unlink(missing_ok=True)
    runs, missing = [], []
    for (method, bits, seed), job in jobs.items():
        if not (out / job.name / WINDOW).exists():
            missing.append(job.name)
            continue
        found = read_versioned(out / job.name / WINDOW)
        record = read_versioned(out / job.name / RECORD)
        runs.append({"method": method, "bits": bits, "seed": seed, "commit":
                     record["origin"]["commit"], "command": record["command"],
                     "config": record["config"],
                     **{k: v for k, v in found.items() if k not in ("format", "version")}})
    return {"plan": {"epochs": plan.epochs, "steps": plan.steps, "seeds": plan.seeds, "lr": LR,
                     "data": plan.data, **plan.settings},
            "runs": runs, "rows": _rows(runs), "missing": missing}


def measure_window(folder: Path, data: Data, steps: int) -> dict[str, Any]:
    """Go on with a run for ``steps`` steps at its learning rate, and follow every weight.

    Args:
        folder: of a run of LAQ or BLAQ with its checkpoint.
        data: that it was trained on.

    Returns:
        Means (``amplitude``, ``frequency``, ``nagel``, ``share_oscillating``: of weights that
        oscillate in more than 0.5 % of the steps), quantiles of both over the weights, and
        ``traces``: of the largest layer, the latent weights nearest to 0 among ``SAMPLED``.
    """
    config, (model, method, _) = restore(folder)
    optimizer = method.optimizer
    assert isinstance(optimizer, BLAQ)
    method.set_lr(config.lr)
    amplitudes, oscillations = AmplitudeTracker(optimizer), OscillationTracker(optimizer)
    largest = max((p for group in optimizer.param_groups if group["bits"] for p in group["params"]),
                  key=Tensor.numel)
    latent = optimizer.state[largest]["latent"].view(-1)
    sample = torch.randperm(latent.numel(), generator=torch.Generator().manual_seed(0))[:SAMPLED]
    traced = sample[latent[sample].abs().argsort()[:TRACED]]
    order = torch.Generator().manual_seed(config.seed + 1)
    traces, done = [latent[traced].clone()], 0
    model.train()
    while done < steps:
        for images, labels in datasets.batches(data.train, config.batch_size, order,
                                               augment=config.augment):
            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                model.zero_grad()
                loss = LOSSES[config.loss](model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            method.step(closure)
            amplitudes.update()
            oscillations.update()
            traces.append(latent[traced].clone())
            done += 1
            if done == steps:
                break
    swing, changes = amplitudes.per_weight()
    return {"amplitude": amplitudes.amplitude(), "frequency": amplitudes.frequency(),
            "nagel": oscillations.frequency(), "share_oscillating": oscillations.share_above(),
            "scale": float(latent.abs().mean()),
            "quantiles": list(QUANTILES), "amplitude_quantiles": _quantiles(swing),
            "frequency_histogram": torch.bincount(changes.clamp_max(20)).tolist(),
            "traces": torch.stack(traces, 1).tolist()}


def _quantiles(values: Tensor) -> list[float]:
    ascending = values.sort().values
    places = [round(q * (len(ascending) - 1)) for q in QUANTILES]
    return [float(ascending[place]) for place in places]


def _rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (method, bits), (amplitude, frequency) in PAPER.items():
        found = [run for run in runs if (run["method"], run["bits"]) == (method, bits)]
        if found:
            rows.append({"method": method, "bits": bits, "seeds": len(found), "paper_amplitude":
                         amplitude, "paper_frequency": frequency, **{
                             name: asdict(spread([run[name] for run in found]))
                             for name in ("amplitude", "frequency", "nagel", "share_oscillating")}})
    return rows


def oscillation_claims(content: Mapping[str, Any], names: Sequence[str]) -> list[Claim]:
    """BLAQ against LAQ at each width: ``names`` among amplitude and frequency."""
    claims = []
    for bits in (1, 2, 4):
        for name in names:
            paper = [PAPER[method, bits][name == "frequency"] for method in ("laq", "blaq")]
            values = [{run["seed"]: run[name] for run in content["runs"]
                       if (run["method"], run["bits"]) == (method, bits)}
                      for method in ("laq", "blaq")]
            seeds = sorted(values[0].keys() & values[1].keys())
            claim = f"{bits} bit{'s' if bits > 1 else ''}: BLAQ's {name} is below LAQ's"
            said = f"{paper[0]:g} and {paper[1]:g}, a ratio of {paper[1] / paper[0]:.2f}"
            if not seeds:
                claims.append(Claim(claim, said, "nothing", "not measured"))
                continue
            laq, blaq = ([value[seed] for seed in seeds] for value in values)
            means = spread(laq).mean, spread(blaq).mean
            here = (f"{means[0]:.3g} and {means[1]:.3g}, a ratio of "
                    f"{means[1] / max(means[0], 1e-300):.2f}, seeds: {len(seeds)}")
            claims.append(Claim(claim, said, here, verdict(difference(laq, blaq))))
    return claims

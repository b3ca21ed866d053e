"""Measure accuracy and loss of a run folder, or of a model file that a run left.

  blaq eval runs/digits-lenet5-blaq1-s0                       the checkpoint, as trained
  blaq eval runs/digits-lenet5-blaq1-s0/packed.safetensors    from bit-packed weights
  blaq eval model.safetensors --config run.toml               a file elsewhere

A file needs to know its network and data: from config.json beside it, or from --config.
Accuracy is the share of images whose largest logit is the right class; loss is the mean of the
run's: cross-entropy in nats, or squared hinge.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from .._text import percent
from ..train import data as datasets
from ..train.checkpoint import CONFIG
from ..train.config import TrainConfig, load_config
from ..train.loop import check_device, evaluate, restore
from ..train.weights import load_any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, help="run folder, or safetensors file")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="network and data of a file (default: config.json beside it)")
    parser.add_argument("--data-dir", metavar="DIR",
                        help="folder of the data (default: as the run had it)")
    parser.add_argument("--split", choices=("test", "train"), default="test",
                        help="images to evaluate on (default: test)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="INT", default=0,
                        help="CPU threads; 0: torch's choice (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.target.is_dir():
        config, (model, _, _) = restore(args.target)
        split = getattr(_data(config, args), args.split)
    else:
        config, model, split = _from_file(args)
    loss, accuracy = evaluate(model.to(args.device), split, loss=config.loss)
    correct = round(accuracy * len(split))
    if args.json:
        print(json.dumps({"target": str(args.target), "split": args.split, "images": len(split),
                          "correct": correct, "accuracy": accuracy, "loss": loss}))
    else:
        print(f"{config.data} {args.split}: accuracy {percent(accuracy)} "
              f"({correct} of {len(split)}), loss {loss:.4f}")
    return 0


def _data(config: TrainConfig, args: argparse.Namespace) -> datasets.Data:
    return datasets.load(config.data, args.data_dir or config.data_dir or None)


def _from_file(args: argparse.Namespace) -> tuple[TrainConfig, nn.Module, datasets.Split]:
    if not args.target.exists():
        raise ValueError(f"target must exist, got {args.target}")
    beside = args.config or args.target.parent / CONFIG
    if not beside.is_file():
        raise ValueError(f"{args.target} must have its run's {CONFIG} beside it, got none; "
                         "try --config")
    config = load_config(beside)
    split = getattr(_data(config, args), args.split)
    model = config.build(split.num_classes, split.in_shape)
    return config, load_any(model, args.target), split

"""Train a network, in full precision (fp), by BLAQ, LAQ, or another method, into a run folder.

  blaq train                                        LeNet-5 on the bundled digits, 1 bit, BLAQ
  blaq train --method laq --bits 2 --seed 1
  blaq train --data mnist --data-dir ~/mnist --model mlp4 --epochs 50 --batch-size 100
  blaq train --config cifar.toml --device cuda      flags win over the file
  blaq train --resume --out runs/digits-lenet5-blaq1-s0

The folder holds config.json, metrics.jsonl (a line for each epoch), checkpoint.pt (to resume from;
the result is the same, bit for bit), model.safetensors (the weights as floats) and, if
a packed format holds them, packed.safetensors (the same weights bit-packed: blaq eval, blaq
inspect, blaq.load). Ctrl-C leaves the last finished epoch.

Data are read from local copies in their original formats, from --data-dir or $BLAQ_DATA/<data>:
mnist (idx, plain or .gz; any MNIST-like set), cifar10 and cifar100 (binary version), svhn (cropped,
.mat), images (train/CLASS/*.jpg and test/ or val/; needs torchvision). digits needs none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from .._extras import import_extra
from .._text import percent, size, table
from ..convert import is_quantized, pack
from ..io import save
from ..train import loop
from ..train.checkpoint import CHECKPOINT, CONFIG
from ..train.config import TrainConfig, load_config, read_config
from ..train.weights import save_weights

SECTIONS = {"model": "network and data", "method": "quantization", "epochs": "optimization",
            "seed": "seed and machine"}
"""Heading in --help before each of these fields."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [options]"
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="run folder (default: runs/<data>-<model>-<method><bits>-s<seed>)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, as its config.json says")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="TOML or JSON file whose keys are the flags below, _ for -")
    parser.add_argument("--tensorboard", action="store_true",
                        help="also log to DIR/tensorboard (needs blaq-kernels[tensorboard])")
    section: Any = parser
    for entry in fields(TrainConfig):
        if entry.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[entry.name])
        _add_field(section, entry)


def _add_field(section: Any, entry: Any) -> None:
    """A flag that is absent from the namespace unless it is given."""
    flag, shown = "--" + entry.name.replace("_", "-"), entry.default
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    if isinstance(entry.default, bool):
        options["action"], shown = argparse.BooleanOptionalAction, "yes" if entry.default else "no"
    else:
        choices = entry.metadata["choices"]
        options |= {"type": type(entry.default), "choices": choices and list(filter(None, choices))}
        if choices is None:
            options["metavar"] = type(entry.default).__name__.upper().replace("STR", "TEXT")
    help = entry.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
    section.add_argument(flag, help=help, **options)


def run(args: argparse.Namespace) -> int:
    config, out = _configured(args)
    log = _tensorboard(out) if args.tensorboard else None
    tqdm = import_extra("tqdm", "train").tqdm
    print(f"{config.label}, into {out}")
    with tqdm(total=0, unit="batch", leave=False, disable=None) as bar:  # none without a terminal

        def on_batch(epoch: int, batch: int, batches: int) -> None:
            if batch == 1:
                bar.reset(batches)
                bar.set_description(f"epoch {epoch}/{config.epochs}")
            bar.update()

        def on_epoch(line: dict[str, Any]) -> None:
            bar.write(_epoch_line(line, config.epochs))
            if log is not None:
                log(line)

        try:
            result = loop.train(config, out, resume=args.resume, on_batch=on_batch,
                                on_epoch=on_epoch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; go on with: blaq train --resume --out {out}") from None
    sizes = _write_models(result.model, out)
    print(_summary(result.history, sizes))
    return 0


def _configured(args: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The run's config, flags over file, and its folder."""
    flags = {entry.name: getattr(args, entry.name) for entry in fields(TrainConfig)
             if hasattr(args, entry.name)}
    if args.resume:
        if args.out is None or args.config is not None:
            raise ValueError("--resume must go with --out, the folder to resume, and no --config")
        if not (args.out / CONFIG).is_file():
            raise ValueError(f"--out must be a run to resume, got {args.out} without {CONFIG}")
        config = load_config(args.out / CONFIG).replaced(flags)
    elif args.config is None:
        config = TrainConfig.of(flags)
    else:
        config = read_config(args.config, **flags)
    return config, args.out or Path("runs") / config.label


def _tensorboard(out: Path) -> Callable[[dict[str, Any]], None]:
    import_extra("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))

    def log(line: dict[str, Any]) -> None:
        for name, value in line.items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    return log


def _epoch_line(line: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}",
             f"train loss {line['train_loss']:.4f}", f"test loss {line['test_loss']:.4f}",
             f"accuracy {percent(line['test_accuracy'])}", f"lr {line['lr']:.2e}"]
    if line["flip_ratio"] is not None:
        parts.append(f"flips {line['flip_ratio']:.2e}")
    return "  ".join([*parts, f"{line['seconds']:.1f} s"])


def _write_models(model: nn.Module, out: Path) -> dict[str, int]:
    """Write the model files; bytes of each by name."""
    names = ["model.safetensors"]
    save_weights(model, out / names[0])
    if any(map(is_quantized, model.modules())):
        names.append("packed.safetensors")
        save(pack(model), out / names[1])
    return {name: (out / name).stat().st_size for name in [*names, CHECKPOINT]}


def _summary(history: list[dict[str, Any]], sizes: dict[str, int]) -> str:
    criterion = "valid_accuracy" if "valid_accuracy" in history[-1] else "test_accuracy"
    last = history[-1]
    best = max(loop.quantized_epochs(history), key=lambda line: line[criterion])
    which = "best validation epoch's" if criterion == "valid_accuracy" else "best epoch's"
    rows = [("", ""), ("test accuracy", percent(last["test_accuracy"])),
            (which, f"{percent(best['test_accuracy'])} (epoch {best['epoch']})"),
            ("gradient evaluations", str(last["evaluations"])),
            ("time", f"{sum(line['seconds'] for line in history):.1f} s"),
            *((name, size(count)) for name, count in sizes.items())]
    return "\n".join(table(rows))

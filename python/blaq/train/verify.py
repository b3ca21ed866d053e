"""Pack a trained run, and show by a new process that nothing was lost.

The new process is ``python -m blaq.train.verify FOLDER LOGITS THREADS ACCURACY``: it has the packed file,
the run's config and the data, nothing else, and writes the logits of every test image.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import blaq_kernels

from ..accuracy import set_accuracy
from ..convert import pack, unpack
from ..io import load, save
from ..nn import PackedConv2d, PackedLinear
from ..summary import summary
from . import data as datasets
from .checkpoint import CONFIG
from .config import load_config
from .loop import restore
from .weights import save_weights

__all__ = ["FLOATS", "PACKED", "Check", "Delivered", "check_logits", "deliver", "fresh_logits"]

FLOATS, PACKED = "model.safetensors", "packed.safetensors"
HIGH = 4e-4  # relative error that a layer of accuracy "high" may make


class Check(NamedTuple):
    """One thing that must hold, with its numbers."""

    name: str
    passed: bool
    measured: str
    limit: str


class Delivered(NamedTuple):
    """A run's network as trained and as packed, both in evaluation mode."""

    trained: nn.Module
    packed: nn.Module
    sizes: dict[str, int]
    """Bytes: ``bytes_float32`` and ``bytes_packed`` of the tensors, ``file_bytes``."""
    checks: list[Check]
    serving: dict[str, str]
    """Which backend served each op in the new process that used the kernels."""


def deliver(folder: Path) -> Delivered:
    """Pack a run's model into ``folder``, beside its weights as floats, and check the file.

    It must decode to the trained weights, bit for bit; and a new process must compute the trained
    model's logits from it: bit for bit where plain PyTorch serves the ops, and within the budget of
    :func:`check_logits` on the kernels.
    """
    config, (trained, _, _) = restore(folder)
    split = datasets.load(config.data, config.data_dir or None).test
    save_weights(trained, folder / FLOATS)
    packed = pack(restore(folder)[1].model)
    save(packed, folder / PACKED)
    checks = [_check_weights(trained, _loaded(folder, split))]
    trained.eval()
    with torch.inference_mode():
        images = split.normalise(split.images)
        logits, exact = trained(images), copy.deepcopy(trained).double()(images.double())
    reference, _ = fresh_logits(folder, "reference")
    fast, serving = fresh_logits(folder, "auto")
    high, _ = fresh_logits(folder, "auto", "high")
    layers = sum(isinstance(layer, PackedLinear | PackedConv2d) for layer in packed.modules())
    checks += check_logits(logits, exact, reference, fast, high, layers)
    total = summary(packed)
    sizes = {"bytes_float32": total.bytes_float32, "bytes_packed": total.bytes_packed,
             "file_bytes": (folder / PACKED).stat().st_size}
    return Delivered(trained, packed.eval(), sizes, checks, serving)


def check_logits(trained: Tensor, exact: Tensor, reference: Tensor, fast: Tensor, high: Tensor,
                 layers: int) -> list[Check]:
    """Compare a packed model's logits with the trained model's, all ``[images, classes]``.

    Args:
        trained: of the trained model, float32.
        exact: the same in float64.
        reference: of the packed model where plain PyTorch serves the ops: must equal ``trained``.
        fast: of the packed model on the kernels, accuracy ``exact``: its largest error against
            ``exact`` must be at most twice that of ``trained``, plus one rounding of the largest
            logit to float32.
        high: the same at the accuracy ``high``, packed layers' default: the norm of its error must
            be at most 4e-4 of that of ``exact`` for each packed layer.
        layers: how many layers are packed.
    """
    def error(logits: Tensor) -> float:
        return (logits.double() - exact).abs().max().item()

    different = int((trained != reference).sum())  # NaN differs too
    eps = torch.finfo(torch.float32).eps
    budget = 2 * error(trained) + eps * exact.abs().max().item()
    relative = ((high.double() - exact).norm() / exact.norm()).item()

    def others(logits: Tensor) -> str:
        other = int((logits.argmax(1) != trained.argmax(1)).sum())
        return f"{other:,} of {len(logits):,} predictions differ"

    return [
        Check("logits of a new process, plain PyTorch", different == 0,
              f"{different:,} of {trained.numel():,} differ from the trained model's", "0"),
        Check("logits of a new process, kernels: largest error against float64",
              error(fast) <= budget,  # false for NaN
              f"{error(fast):.2g}; {others(fast)}",
              f"{budget:.2g}: twice float32's, {error(trained):.2g}, and a rounding"),
        Check("logits of a new process, kernels at accuracy high: relative error against float64",
              relative <= HIGH * layers, f"{relative:.2g}; {others(high)}",
              f"{HIGH * layers:.2g}: {HIGH} a packed layer")]


def _check_weights(trained: nn.Module, packed: nn.Module) -> Check:
    """Compare every tensor, byte for byte; unpacks ``packed``."""
    ours, theirs = ([tensor.contiguous().flatten().view(torch.uint8)
                     for tensor in model.state_dict().values()]
                    for model in (trained, unpack(packed)))
    wrong = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))
    return Check("tensors decoded from the file", wrong == 0,
                 f"{wrong:,} of {sum(map(len, ours)):,} bytes differ from the trained model's", "0")


def fresh_logits(folder: Path, backend: str, accuracy: str = "exact"
                 ) -> tuple[Tensor, dict[str, str]]:
    """Logits of the packed file in ``folder`` from a new process, as many threads as here.

    Args:
        folder: of a run, with ``packed.safetensors``.
        backend: value of ``BLAQ_BACKEND`` there.
        accuracy: of packed layers there.

    Returns:
        float32 ``[test images, classes]``, and which backend served each op there.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "logits.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(folder), str(answer),
             str(torch.get_num_threads()), accuracy], env={**os.environ, "BLAQ_BACKEND": backend},
            capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"blaq.fresh_logits: a new process, BLAQ_BACKEND={backend}, must "
                               f"load {folder / PACKED}, got: {done.stderr.strip()[-2000:]}")
        with safe_open(answer, "pt") as file:
            return file.get_tensor("logits"), json.loads(file.metadata()["serving"])


def _loaded(folder: Path, split: datasets.Split) -> nn.Module:
    """A new network of the run's kind, with the packed file's contents."""
    config = load_config(folder / CONFIG)
    return load(folder / PACKED, config.build(split.num_classes, split.in_shape))


def _answer(arguments: Sequence[str]) -> None:
    """What the new process does."""
    folder, answer, threads = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    torch.set_num_threads(threads)
    set_accuracy(arguments[3])
    config = load_config(folder / CONFIG)
    split = datasets.load(config.data, config.data_dir or None).test
    model = _loaded(folder, split).eval()
    with torch.inference_mode():
        logits = model(split.normalise(split.images))
    save_file({"logits": logits.clone()}, answer,
              metadata={"serving": json.dumps(blaq_kernels.serving())})


if __name__ == "__main__":
    _answer(sys.argv[1:])

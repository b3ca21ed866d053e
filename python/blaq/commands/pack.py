"""Write the model of a trained run with bit-packed weights: safetensors, format version 1.

  blaq pack runs/digits-lenet5-blaq1-s0 --out lenet5-1bit.safetensors

Nothing is lost: each packed weight is compared with the trained one, bit for bit, before the file
is written. blaq train writes the same file at its end; this is for a run that was interrupted.
Read it with blaq.load, blaq eval or blaq inspect.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .._text import size
from ..convert import is_quantized, pack
from ..io import save
from ..nn import PackedLayer
from ..train.loop import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder of blaq train")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="file to write (default: packed.safetensors in the run folder)")


def run(args: argparse.Namespace) -> int:
    config, (model, _, history) = restore(args.run)
    if not any(map(is_quantized, model.modules())):
        raise ValueError("run must be of a method whose weights fit a packed format, "
                         f"got {config.method}")
    out = args.out or args.run / "packed.safetensors"
    floats = sum(4 * param.numel() for param in model.parameters())
    pack(model)
    save(model, out)
    layers = sum(isinstance(module, PackedLayer) for module in model.modules())
    packed = out.stat().st_size
    print(f"{out}: {layers} packed layers of epoch {len(history)}, {size(packed)}; "
          f"{size(floats)} in float32 ({floats / packed:.1f}x)")
    return 0

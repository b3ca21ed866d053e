"""Show what a packed file holds, layer by layer, without building the model.

  blaq inspect runs/digits-lenet5-blaq1-s0/packed.safetensors

Every field is checked as blaq.load checks it. Bytes are those of a layer's qweight, scale and bias;
"x" is how many times more its weight and bias would take in float32. A group is the weights that
share a scale: the whole tensor, a row, or so many inputs of a row. Last comes what running the model
on a CPU with 8-bit kernels adds in memory: each packed weight in the order that they read, or decoded
where torch's own product of it is faster.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blaq_kernels.packed_rules import conv_repacked_shape, repacked_bytes

from .._text import size, table
from ..decoded_conv import takes_conv
from ..format import PackedSpec, join
from ..io import PackedFile, inspect

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1,
              "U8": 1, "BOOL": 1}
GROUPS = {0: "tensor", -1: "row"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="packed safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    content = describe(inspect(args.file))
    print(json.dumps(content, indent=2) if args.json else "\n".join(_lines(content)))
    return 0


def describe(file: PackedFile) -> dict[str, Any]:
    """The file as plain data: what ``--json`` prints."""
    stored = {name: math.prod(shape) * ITEM_BYTES[dtype]
              for name, (dtype, shape) in file.tensors.items()}
    packed = {join(name, key) for name, spec in file.layers.items() for key in spec.tensors()}
    layers = []
    for name, spec in file.layers.items():
        counts = {key: stored.get(join(name, key), 0) for key in spec.tensors()}
        floats = 4 * math.prod(spec.shape) + (4 * spec.shape[0] if counts["bias"] else 0)
        layers.append({"name": name, **asdict(spec), "bytes": sum(counts.values()),
                       "bytes_float32": floats,
                       "bytes_repacked": _repacked(spec)})
    others = {name: count for name, count in stored.items() if name not in packed}
    return {"file": str(file.path), "format_version": file.metadata["blaq.format_version"],
            "bytes": file.size, "layers": layers, "aliases": file.aliases,
            "other_tensors": [{"name": name, "dtype": file.tensors[name][0],
                               "shape": file.tensors[name][1], "bytes": count}
                              for name, count in others.items()]}


def _repacked(spec: PackedSpec) -> int:
    """Bytes that a layer keeps beside its tensors; of a convolution in groups, at least."""
    n, k = spec.shape[0], math.prod(spec.shape[1:])
    dtype = getattr(torch, spec.dtype)
    if spec.kind == "conv2d" and takes_conv(dtype, spec.shape, 1, spec.bits, spec.group_size, "high"):
        return n * k * dtype.itemsize
    if spec.kind == "linear" or spec.group_size > 0:
        return repacked_bytes(spec.bits, n, (k + 7) // 8)
    return math.prod(conv_repacked_shape(spec.bits, n, k, math.prod(spec.shape[2:]), 1))


def _lines(content: dict[str, Any]) -> list[str]:
    rows = [("layer", "kind", "shape", "dtype", "bits", "levels", "group", "bytes", "x")]
    for layer in content["layers"]:
        levels, group = layer["levels"], layer["group_size"]
        rows.append((layer["name"] or "(model)", layer["kind"], "x".join(map(str, layer["shape"])),
                     layer["dtype"], str(layer["bits"]), " ".join(f"{x:.4g}" for x in levels),
                     GROUPS.get(group, str(group)), size(layer["bytes"]),
                     f"{layer['bytes_float32'] / layer['bytes']:.1f}"))
    repacked = sum(layer["bytes_repacked"] for layer in content["layers"])
    lines = [f"{content['file']}: format version {content['format_version']}, "
             f"{size(content['bytes'])}", "", *table(rows)]
    if others := content["other_tensors"]:
        lines += ["", *table([("other tensor", "dtype", "shape", "bytes"), *(
            (t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar", size(t["bytes"]))
            for t in others)])]
    lines += [f"{name} is {owner}" for name, owner in content["aliases"].items()]
    lines += ["", f"in memory, repacked for 8-bit CPU kernels: {size(repacked)} more"]
    return lines

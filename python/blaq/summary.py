"""What a model is quantized to, layer by layer, and what that weighs: ``summary``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blaq_kernels.codebook import bits_of
from blaq_kernels.reference import matrix_shape

from ._text import size, table
from .codebook import levels_for, levels_of
from .convert import is_quantized, obstacles
from .nn import PackedLayer
from .quantization import Quantization, quantization_of

__all__ = ["LayerSummary", "Summary", "summary"]

CODEBOOKS = ("binary", "pow2", "ternary", "linear", "pow2_zero", "uniform")


@dataclass(frozen=True)
class LayerSummary:
    """One module with parameters or buffers of its own.

    Attributes:
        name, kind: of the module: where it is, and its class.
        shape: of ``weight``; None without one.
        bits: width of a code; None in full precision.
        codebook: ``pow2``, …, or ``custom``; None in full precision.
        levels: the magnitudes.
        group_size: 0, -1 or g > 0; None in full precision.
        bytes_float32: with every floating-point tensor in float32, quantized or not.
        bytes_now: of the module's tensors as they are; codes whose planes were dropped are in
            ``bytes_repacked`` alone.
        bytes_packed: after ``blaq.pack``; as now, where the layer is packed or stays as it is.
        bytes_repacked: of the copy in the order that this processor's kernels read, which a packed
            layer keeps from its first call on.
        mean_scale: mean over the groups; None in full precision.
        flip_ratio: share of codes that the optimizer's last step changed; None where nobody counts.
        note: why a quantized layer will stay float; empty otherwise.

    A tensor that several modules share counts in the first.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    bits: int | None
    codebook: str | None
    levels: tuple[float, ...] | None
    group_size: int | None
    bytes_float32: int
    bytes_now: int
    bytes_packed: int
    bytes_repacked: int
    mean_scale: float | None
    flip_ratio: float | None
    note: str


@dataclass(frozen=True)
class Summary:
    """Rows of a model, and their totals; ``str`` makes a table of it.

    Attributes:
        layers: in the model's order.
        bytes_float32, bytes_now, bytes_packed, bytes_repacked: totals.
        flip_ratio: over all weights whose flips are counted; None if none are.
    """

    layers: tuple[LayerSummary, ...]
    bytes_float32: int
    bytes_now: int
    bytes_packed: int
    bytes_repacked: int
    flip_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "bits", "codebook", "group", "fp32", "now", "packed",
                "scale", "flips")
        rows = [_cells(layer) for layer in self.layers]
        flips = "" if self.flip_ratio is None else f"{self.flip_ratio:.2%}"
        total = ("total", *[""] * 5, *map(size, (self.bytes_float32, self.bytes_now,
                                                 self.bytes_packed)), "", flips)
        lines = table([head, *rows, total])
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        lines += [f"{layer.name or 'the model'} will stay float: {layer.note}"
                  for layer in self.layers if layer.note]
        if self.bytes_repacked:
            lines.append(f"repacked for this processor's kernels: {size(self.bytes_repacked)} more")
        return "\n".join(lines)


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """Per layer bits, bytes and scale of a float model, one in training, or a packed one.

    The bytes are the model's: in training, BLAQ keeps 12 bytes more for each quantized weight, the
    float32 ``latent``, ``exp_avg`` and ``exp_avg_sq``, and gradients come on top. Training takes
    more memory than inference in float32 does; only the packed model takes less.

    >>> print(summary(nn.Linear(256, 4, bias=False)))
    layer  kind    shape    bits  codebook  group  fp32     now      packed   scale  flips
    --------------------------------------------------------------------------------------
           Linear  4 × 256                         4.0 KiB  4.0 KiB  4.0 KiB
    --------------------------------------------------------------------------------------
    total                                          4.0 KiB  4.0 KiB  4.0 KiB
    """
    notes = obstacles(model, [module for module in model.modules() if is_quantized(module)])
    seen: set[int] = set()
    rows, flips, counted = [], 0, 0
    for name, module in model.named_modules():
        own = [x for x in (*module._parameters.values(), *module._buffers.values())
               if x is not None]
        if own:
            fresh = [x for x in own if id(x) not in seen]
            seen.update(map(id, fresh))
            quantization = _quantization(module)
            rows.append(_row(name, module, fresh, quantization, notes.get(module, "")))
            if quantization is not None and quantization.flips is not None:
                flips += int(quantization.flips)
                counted += module.weight.numel()
    totals = [sum(getattr(row, field) for row in rows)
              for field in ("bytes_float32", "bytes_now", "bytes_packed", "bytes_repacked")]
    return Summary(tuple(rows), *totals, flips / counted if counted else None)


def _quantization(module: nn.Module) -> Quantization | None:
    if isinstance(module, PackedLayer):
        return Quantization(module.levels, module.group_size, module.scale)
    return quantization_of(module.weight) if is_quantized(module) else None


def _row(name: str, module: nn.Module, fresh: Sequence[Tensor], quantization: Quantization | None,
         note: str | None) -> LayerSummary:
    """``note`` is None for a float layer that can be packed."""
    is_packed = isinstance(module, PackedLayer)
    weight = module._parameters.get("weight")
    shape = module.weight_shape if is_packed else None if weight is None else tuple(weight.shape)
    now = _bytes(fresh)
    float32 = sum(x.numel() * (4 if x.is_floating_point() else x.element_size()) for x in fresh)
    packed = now
    if is_packed and any(x is module.qweight for x in fresh):
        float32 += 4 * math.prod(shape) - _bytes([module.qweight, module.scale])
    elif note is None and any(x is weight for x in fresh):
        n, k = matrix_shape(shape)
        packed += quantization.bits * n * -(-k // 8) + _bytes([quantization.scale])
        packed -= _bytes([weight])
    q = quantization
    flips = None if q is None or q.flips is None else int(q.flips) / weight.numel()
    return LayerSummary(
        name, type(module).__name__, shape, q and q.bits, q and _codebook(q.levels), q and q.levels,
        q and q.group_size, float32, now, packed, module.bytes_repacked if is_packed else 0,
        q and q.scale.float().mean().item(), flips, note or "")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _codebook(levels: Sequence[float]) -> str:
    bits = bits_of(levels)
    if tuple(levels) == levels_for("uniform", 8):
        return "uniform"
    for name in CODEBOOKS if bits <= 4 else ():
        try:
            if levels_of(name, bits) == tuple(levels):
                return name
        except ValueError:  # a codebook that does not exist at this width
            continue
    return "custom"


def _cells(layer: LayerSummary) -> tuple[str, ...]:
    def show(value: object) -> str:
        return "" if value is None else str(value)

    shape = "" if layer.shape is None else " × ".join(map(str, layer.shape))
    group = {None: "", 0: "tensor", -1: "row"}.get(layer.group_size, show(layer.group_size))
    scale = "" if layer.mean_scale is None else f"{layer.mean_scale:.4g}"
    flips = "" if layer.flip_ratio is None else f"{layer.flip_ratio:.2%}"
    return (layer.name, layer.kind, shape, show(layer.bits), show(layer.codebook), group,
            *map(size, (layer.bytes_float32, layer.bytes_now, layer.bytes_packed)), scale, flips)

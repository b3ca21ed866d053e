"""The packed file, format version 1: what its header says, and every rule a reader holds it to.

docs/format.md is the specification. The rules are here once, for reading and for writing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from blaq_kernels.codebook import bits_of, check_levels
from blaq_kernels.reference import matrix_shape, scale_shape

from .nn import PackedConv2d, PackedLayer, PackedLinear

VERSION = "1"
KINDS: dict[str, type[PackedLayer]] = {"linear": PackedLinear, "conv2d": PackedConv2d}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes of a packed layer's weight and bias, by torch's name and by safetensors'."""
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
          torch.uint8: "U8", torch.bool: "BOOL"}
"""Every dtype that a file may hold, by safetensors' name."""

Require = Callable[[bool, str, str, object], None]


def requirer(op: str, path: object) -> Require:
    """``require(condition, what, rule, got)`` that raises ValueError in the name of op and file."""
    def require(condition: bool, what: str, rule: str, got: object) -> None:
        if not condition:
            raise ValueError(f"blaq.{op}: {path}: {what} must {rule}, got {got}")
    return require


def join(module: str, key: str) -> str:
    """Name of a module's tensor; a model that is itself a layer has the empty name."""
    return f"{module}.{key}" if module else key


@dataclass(frozen=True)
class PackedSpec:
    """One entry of ``blaq.config``: a packed layer.

    Attributes:
        kind: ``linear`` or ``conv2d``.
        shape: of the weight, ``[N, K]`` or ``[out, in/groups, kh, kw]``.
        levels: ascending magnitudes, at most 8, the largest 1.0.
        bits: width of a code.
        group_size: 0, -1 or g > 0.
        dtype: of the weight (and the bias): ``float32``, ``bfloat16`` or ``float16``.
    """

    kind: str
    shape: tuple[int, ...]
    levels: tuple[float, ...]
    bits: int
    group_size: int
    dtype: str

    @classmethod
    def of(cls, layer: PackedLayer) -> PackedSpec:
        kind = next(name for name, type_ in KINDS.items() if isinstance(layer, type_))
        return cls(kind, layer.weight_shape, layer.levels, layer.bits, layer.group_size,
                   str(layer.dtype).removeprefix("torch."))

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Stored dtype and shape of qweight, scale and bias; the bias may be absent."""
        n, k = matrix_shape(self.shape)
        return {"qweight": ("U8", [self.bits, n, -(-k // 8)]),
                "scale": ("F32", list(scale_shape(self.shape, self.group_size))),
                "bias": (DTYPES[self.dtype], [n])}


def dump_config(specs: Mapping[str, PackedSpec]) -> str:
    """``blaq.config`` of these layers."""
    return json.dumps({name: asdict(spec) for name, spec in specs.items()}, sort_keys=True,
                      separators=(",", ":"))


def parse_config(text: str, require: Require) -> dict[str, PackedSpec]:
    """``blaq.config``, every value checked for itself."""
    config = parse_json("blaq.config", text, require)
    specs = {}
    for name, entry in config.items():
        what = f"blaq.config of {name!r}"
        keys = [field.name for field in fields(PackedSpec)]
        require(isinstance(entry, dict) and sorted(entry) == sorted(keys), what,
                f"have exactly {', '.join(keys)}", entry)
        kind, shape, levels = entry["kind"], entry["shape"], entry["levels"]
        bits, group_size, dtype = entry["bits"], entry["group_size"], entry["dtype"]
        require(kind in ("linear", "conv2d"), what, "have kind linear or conv2d", kind)
        dims = 2 if kind == "linear" else 4
        require(_is_list(shape, int) and len(shape) == dims and min(shape) >= 1, what,
                f"have a shape of {dims} positive integers", shape)
        require(_is_codebook(levels), what,
                "have levels, 1 to 8 ascending magnitudes in [0, 1], the largest 1.0", levels)
        require(type(bits) is int and bits == bits_of(levels), what,
                f"have bits {bits_of(levels)} for {len(levels)} levels", bits)
        require(type(group_size) is int and group_size >= -1, what,
                "have group_size 0, -1 or positive", group_size)
        require(dtype in tuple(DTYPES), what, f"have dtype {', '.join(DTYPES)}", dtype)
        specs[name] = PackedSpec(kind, tuple(shape), tuple(map(float, levels)), bits, group_size,
                                 dtype)
    return specs


def parse_json(what: str, text: str, require: Require) -> dict[str, Any]:
    """A JSON object of the metadata."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    require(isinstance(value, dict), what, "be a JSON object", repr(text[:60]))
    return value


def _is_list(value: object, of: Any) -> bool:
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(x, of) and not isinstance(x, bool) for x in value))


def _is_codebook(levels: object) -> bool:
    try:
        check_levels("load", levels if _is_list(levels, (int, float)) else [])
    except ValueError:
        return False
    return True


def check_contents(name: str, spec: PackedSpec, qweight: Tensor, scale: Tensor,
                   require: Require) -> None:
    """What the bits themselves must satisfy; shapes and dtypes are known to be right."""
    finite = scale.isfinite()
    require(bool(finite.all()), join(name, "scale"), "be finite", scale[~finite][:1].tolist())
    padding = -matrix_shape(spec.shape)[1] % 8
    tail = qweight[..., -1] >> (8 - padding) if padding else qweight.new_zeros(1)
    require(not tail.any(), join(name, "qweight"), f"have {padding} padding bits of 0 in a row",
            "a 1")
    sign, index = qweight[-1], qweight[:-1]
    beyond = _any_code(index, range(len(spec.levels), 2 ** len(index)))
    require(not beyond.any(), join(name, "qweight"), f"have codes of {len(spec.levels)} levels",
            "an index beyond")
    if spec.levels[0] == 0.0:
        signed_zero = _any_code(index, [0]) & sign
        require(not signed_zero.any(), join(name, "qweight"), "have no sign on a level of zero",
                "a negative zero")


def _any_code(index: Tensor, wanted: Any) -> Tensor:
    """Bit mask, in the planes' layout, of the positions whose index is one of ``wanted``."""
    found = torch.zeros_like(index[0]) if len(index) else torch.zeros(1, dtype=torch.uint8)
    for code in wanted:
        match = torch.full_like(found, 0xFF)
        for b, plane in enumerate(index):
            match &= plane if code >> b & 1 else ~plane
        found |= match
    return found


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32, 8 hex digits, of config and aliases, then each stored tensor's name and bytes."""
    crc = zlib.crc32((metadata["blaq.config"] + metadata.get("blaq.aliases", "")).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        if tensors[name].numel():
            crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"

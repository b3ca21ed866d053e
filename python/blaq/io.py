"""Packed models on disk: ``save``, ``load``, ``inspect`` of safetensors files (docs/format.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .binary import BINARY_OF, binarize
from .format import (
    DTYPES,
    KINDS,
    STORED,
    VERSION,
    PackedSpec,
    Require,
    check_contents,
    checksum,
    dump_config,
    join,
    parse_config,
    parse_json,
    requirer,
)
from .nn import PackedLayer, require_unfolded
from .replace import replace

__all__ = ["PackedFile", "inspect", "load", "save"]


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds.

    Attributes:
        path: of the file.
        size: in bytes.
        layers: the packed layers, by module name.
        tensors: dtype (safetensors' name) and shape of every stored tensor.
        aliases: names that stand for another, stored tensor.
        metadata: every text field of the header, as it stands there.
    """

    path: Path
    size: int
    layers: dict[str, PackedSpec]
    tensors: dict[str, tuple[str, list[int]]]
    aliases: dict[str, str]
    metadata: dict[str, str]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed model: safetensors, format version 1, the same bytes for the same model.

    Packed layers go as ``qweight``, ``scale`` and ``bias``, everything else in ``state_dict`` under
    its own name; a tensor that several names share is stored once. The file appears whole or not at
    all.

    Raises:
        ValueError: the model has no packed layer, a tensor that the format cannot hold, or a layer
            that norms are folded into.
    """
    path, model = Path(path), _bare(model)
    require = requirer("save", path)
    specs = {name: PackedSpec.of(layer) for name, layer in _modules(model).items()
             if isinstance(layer, PackedLayer)}
    for name, module in _modules(model).items():
        require_unfolded("save", name, module)
    require(bool(specs), "model", "have a packed layer; try blaq.pack(model)", "none")
    for name, spec in specs.items():
        require(spec.dtype in DTYPES, name or "model", f"be {' or '.join(DTYPES)}", spec.dtype)
    state = _other_tensors(model, {join(name, "_extra_state") for name in specs})
    for name, value in state.items():
        storable = (isinstance(value, Tensor) and value.dtype in STORED and not value.is_meta
                    and value.layout == torch.strided)
        got = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value)
        require(storable, name, "be a dense tensor of a plain dtype, with data", got)
    tensors, aliases = _distinct(state)
    for name, spec in specs.items():
        for key, expected in spec.tensors().items():
            value = state.get(join(name, key))
            actual = None if value is None else (STORED[value.dtype], list(value.shape))
            require(actual == expected or (actual is None and key == "bias"), join(name, key),
                    f"be {_say(expected)}, as the layer is", _say(actual))
        check_contents(name, spec, *(state[join(name, key)].cpu() for key in ("qweight", "scale")),
                       require)
    metadata = {"blaq.format_version": VERSION, "blaq.config": dump_config(specs)}
    if aliases:
        metadata["blaq.aliases"] = json.dumps(aliases, sort_keys=True, separators=(",", ":"))
    metadata["blaq.crc32"] = checksum(metadata, tensors)
    _write(path, tensors, metadata)


def load(path: str | os.PathLike[str], model: nn.Module, *, mmap: bool = False) -> nn.Module:
    """Read a packed file into ``model``: a float model of the same architecture, or a packed one.

    The layers that the file has packed are replaced in place, everything else is copied; the model
    is returned, or the new layer where the model is itself one layer. Every field of the file is
    checked against the others and against the model first. A model on the meta device takes the
    file's tensors as they are, on the CPU.

    Args:
        mmap: leave the codes of layers on the CPU in the file, whose pages every process that loads
            it shares. A layer that has repacked its weight gives its pages back, and the file is
            read again if something wants them. The file may be renamed, deleted, or replaced as
            :func:`save` does it; cut short in place, the process dies of SIGBUS at the next look at
            what is gone. Writing to such a ``qweight`` changes this process's copy, never the file.

    Raises:
        ValueError: a rule of the format is broken, or the file is of another model; the message
            names the file, the tensor and the rule. The model is unchanged.
    """
    require = requirer("load", path)
    compiled, model = model, _bare(model)
    with _opened(path, require) as (file, handle):
        layers = _match_layers(file, model, require)
        others = _match_others(file, model, require)
        tensors = _read(file, handle, require, mmap)
    new: dict[Any, PackedLayer] = {}
    for name, old in layers.items():
        layer = _make_layer(name, file.layers[name], old, tensors, mmap)
        first = new.setdefault(old, layer)
        require(_same_state(first, layer), name, "equal its other name in the model", "other codes")
    for name, owner in _owners(others).items():
        require(tensors[name].equal(tensors[owner]), name, f"equal {owner}, the same tensor of the "
                "model", "other values")
    loaded = replace(model, new)
    assign = any(value.is_meta for value in others.values())
    loaded.load_state_dict({name: tensors[name] for name in others}, strict=False, assign=assign)
    replace(loaded, binarize(loaded))
    return compiled if loaded is model else loaded


def inspect(path: str | os.PathLike[str]) -> PackedFile:
    """What a packed file holds, checked as ``load`` checks it, but for the model.

    Raises:
        ValueError: a rule of the format is broken; the message names the file, tensor and rule.
    """
    require = requirer("inspect", path)
    with _opened(path, require) as (file, handle):
        _read(file, handle, require)
    return file


def _bare(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile returns, whose names have a prefix."""
    return getattr(model, "_orig_mod", model)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _other_tensors(model: nn.Module, without: set[str]) -> dict[str, Any]:
    return {name: value for name, value in model.state_dict().items() if name not in without}


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, contiguous on the CPU, none sharing memory; and which names alias them."""
    tensors: dict[str, Tensor] = {}
    storages = set()
    aliases = _owners(state)
    for name in sorted(set(state) - set(aliases)):
        value = state[name].detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return tensors, aliases


def _owners(state: dict[str, Tensor]) -> dict[str, str]:
    """For each name whose tensor also has an earlier name, the earliest."""
    first: dict[Any, str] = {}
    owners = {}
    for name, value in sorted(state.items()):
        if value.numel() and not value.is_meta:
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape,
                   value.stride(), value.dtype)
            if first.setdefault(key, name) != name:
                owners[name] = first[key]
    return owners


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Beside the target, then in its place: no reader ever sees half a file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.touch()  # where it cannot be written, an OSError says so
    try:
        save_file(tensors, draft, metadata)
        with draft.open("r+b") as file:
            _sort_metadata(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _sort_metadata(file: Any) -> None:
    """safetensors writes metadata in hash order, another in every process; sorted, a model has one
    file. The header keeps its length: it ends in padding."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    file.seek(8)
    file.write(text)


@contextmanager
def _opened(path: str | os.PathLike[str], require: Require) -> Iterator[tuple[PackedFile, Any]]:
    """The file's header, every field checked against the others, and a handle to its tensors."""
    open(path, "rb").close()  # where it cannot be read, an OSError says so
    try:
        handle = safe_open(os.fspath(path), "pt")
    except SafetensorError as error:
        require(False, "file", "be whole safetensors", error)
    with handle:
        metadata = handle.metadata() or {}
        version = metadata.get("blaq.format_version")
        require(version == VERSION, "blaq.format_version", f"be {VERSION}", version)
        layers = parse_config(metadata.get("blaq.config", ""), require)
        aliases = parse_json("blaq.aliases", metadata.get("blaq.aliases", "{}"), require)
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        tensors = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
        for name, (dtype, _) in tensors.items():
            require(dtype in STORED.values(), name, "be of a dtype of the format", dtype)
        for name, owner in aliases.items():
            require(isinstance(owner, str) and owner in tensors and name not in tensors,
                    f"blaq.aliases[{name!r}]", "name a stored tensor for one that is not", owner)
        for name, spec in layers.items():
            for key, expected in spec.tensors().items():
                full = join(name, key)
                stored = tensors.get(aliases.get(full, full))
                if stored is not None or key != "bias":
                    require(stored == expected, full, f"be {_say(expected)}, as blaq.config has it",
                            _say(stored))
        size = os.path.getsize(path)
        yield PackedFile(Path(path), size, layers, tensors, aliases, metadata), handle


def _say(stored: tuple[str, list[int]] | None) -> str:
    return "no such tensor" if stored is None else f"{stored[0]} {stored[1]}"


def _read(file: PackedFile, handle: Any, require: Require,
          mapped: bool = False) -> dict[str, Tensor]:
    """Every tensor by every name, its contents checked; copies, independent of the file, but for
    codes that stay ``mapped``."""
    packed = {join(name, "qweight") for name in file.layers if mapped}
    packed = {file.aliases.get(name, name) for name in packed}
    tensors = {name: handle.get_tensor(name) for name in file.tensors}
    tensors = {name: x if name in packed else x.clone() for name, x in tensors.items()}
    stored = dict(tensors)
    tensors |= {name: tensors[owner] for name, owner in file.aliases.items()}
    for name, spec in file.layers.items():
        check_contents(name, spec, tensors[join(name, "qweight")], tensors[join(name, "scale")],
                       require)
    crc = file.metadata.get("blaq.crc32")
    if crc is not None:
        actual = checksum(file.metadata, stored)
        require(crc == actual, "blaq.crc32", f"be {actual} if the file is undamaged", crc)
    return tensors


def _match_layers(file: PackedFile, model: nn.Module, require: Require) -> dict[str, nn.Module]:
    """The model's layer for each of the file's."""
    modules = _modules(model)
    for name, spec in file.layers.items():
        kind, old = KINDS[spec.kind], modules.get(name)
        what = name or "model"
        require(type(old) in (kind, kind.FLOAT, BINARY_OF[kind]), what,
                f"be a {kind.FLOAT.__name__} of the model, as blaq.config has it",
                "no such module" if old is None else type(old).__name__)
        shape = old.weight_shape if isinstance(old, PackedLayer) else tuple(old.weight.shape)
        require(shape == spec.shape, f"{what}.shape", f"be the model's {list(shape)}",
                list(spec.shape))
        dtype = str(old.dtype if isinstance(old, PackedLayer) else old.weight.dtype)
        require(dtype == f"torch.{spec.dtype}", f"{what}.dtype", f"be the model's {dtype}",
                spec.dtype)
        bias = join(name, "bias")
        has_bias = bias in file.tensors or bias in file.aliases
        require(has_bias == (old.bias is not None), bias,
                "be in the file as in the model", "there" if has_bias else "no such tensor")
    for name, module in modules.items():
        require(not isinstance(module, PackedLayer) or name in file.layers, name or "model",
                "be packed in the file as in the model; try blaq.unpack(model)", "no such layer")
    return {name: modules[name] for name in file.layers}


def _match_others(file: PackedFile, model: nn.Module, require: Require) -> dict[str, Tensor]:
    """The model's tensors that the file has as they are."""
    layer_tensors = {join(name, key) for name in file.layers
                     for key in ("weight", "bias", "qweight", "scale", "_extra_state")}
    others = _other_tensors(model, layer_tensors)
    packed = {join(name, key) for name, spec in file.layers.items() for key in spec.tensors()}
    for name in [*file.tensors, *file.aliases]:
        require(name in others or name in packed, name, "be a tensor of the model", "an extra one")
    for name, value in others.items():
        require(isinstance(value, Tensor) and value.dtype in STORED, f"the model's {name}",
                "be a tensor that a packed file can hold", type(value))
        stored = file.tensors.get(file.aliases.get(name, name))
        expected = (STORED[value.dtype], list(value.shape))
        require(stored == expected, name, f"be {_say(expected)}, as in the model", _say(stored))
    return others


def _make_layer(name: str, spec: PackedSpec, old: nn.Module, tensors: dict[str, Tensor],
                mapped: bool) -> PackedLayer:
    """The packed layer to put in the place of ``old``, on its device."""
    layer = KINDS[spec.kind].like(old, spec.levels, spec.group_size, getattr(torch, spec.dtype))
    at = old.qweight.device if isinstance(old, PackedLayer) else old.weight.device
    device = torch.device("cpu") if at.type == "meta" else at
    layer.qweight = tensors[join(name, "qweight")].to(device)
    layer.mapped = layer.qweight if mapped and device.type == "cpu" else None
    layer.scale = tensors[join(name, "scale")].to(device)
    if old.bias is not None:
        layer.bias = nn.Parameter(tensors[join(name, "bias")].to(device), old.bias.requires_grad)
    return layer


def _same_state(a: PackedLayer, b: PackedLayer) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return a is b or all(x.equal(y) for x, y in pairs)

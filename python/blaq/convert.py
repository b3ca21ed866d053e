"""Between float and packed models: ``pack`` and ``unpack``, exact inverses, each all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from blaq_kernels.codebook import MAX_LEVELS
from blaq_kernels.rules import require

from .binary import binarize
from .codebook import levels_for
from .encoding import recover_scale
from .fold import check_foldable
from .fold import fold_norm as fold
from .nn import PackedConv2d, PackedLayer, PackedLinear, require_unfolded
from .quantization import Quantization, quantization_of, record
from .replace import replace

__all__ = ["pack", "unpack"]

PACKED_OF: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
log = logging.getLogger("blaq")


@torch.no_grad()
def pack(model: nn.Module, *, bits: int | None = None, codebook: str | Sequence[float] = "pow2",
         group_size: int = 0, skip: Iterable[str] = (), fold_norm: bool = False) -> nn.Module:
    """Replace every quantized Linear and Conv2d by its packed layer, losing nothing.

    The model is changed in place and returned; a model that is itself a layer is returned packed.
    Every layer is packed and compared with its float weight, bit for bit, before any is replaced.

    A layer with 1-bit weights that follows a :class:`blaq.BinaryActivation` in an ``nn.Sequential``
    becomes one that multiplies bits by bits.

    Without ``bits``, the layers that a BLAQ optimizer quantized are packed as it quantized them.
    With ``bits``, every layer is, by its values alone: for a model loaded from a float checkpoint,
    or a deep copy, which no optimizer knows.

    Left in float, and named at INFO: codes of more than 8 levels; subclasses of the two layers
    (parametrized ones are) and other kinds of layer, whose forward may be another; weights that are
    not a plain parameter, are empty, or are shared with a module that stays in float; layers with
    tensors of their own beside weight and bias. Packed layers that shared a weight share its codes.

    Args:
        bits: 1 to 4, the width of a code; None takes what the optimizer recorded.
        codebook: name or magnitudes, see :func:`blaq.levels_for`; used with ``bits``.
        group_size: 0, -1 or g > 0; used with ``bits``.
        skip: names or patterns (``"layer1.*"``) of modules to leave in float, with all inside them.
        fold_norm: whether :func:`blaq.fold_norm` follows: faster, but for inference alone.

    Raises:
        ValueError: a weight, named, is not ``level × scale`` bit for bit; a name in ``skip`` fits
            no module; there is nothing to pack; norms cannot be folded. The model is unchanged.
    """
    require(bits in (None, 1, 2, 3, 4), "pack", "bits", "be 1, 2, 3 or 4", bits)
    require(group_size >= -1, "pack", "group_size", "be 0, -1 or positive", group_size)
    if fold_norm:
        check_foldable(model)
    levels = None if bits is None else levels_for(codebook, bits)
    names = {name.removeprefix("_orig_mod."): module  # without what torch.compile puts in front
             for name, module in model.named_modules(remove_duplicate=False)}
    skipped = _skipped(names, skip)
    wanted = {m: name for name, m in _unique(names)
              if (is_quantized(m) if levels is None else isinstance(m, tuple(PACKED_OF)))}
    rule = ("have a layer that an optimizer quantized; try bits=…" if levels is None
            else "have a Linear or Conv2d")
    has_packed = any(isinstance(m, PackedLayer) for m in names.values())
    require(bool(wanted) or has_packed, "pack", "model", rule, "none")
    chosen = {m: name for m, name in wanted.items() if m not in skipped}
    packed: dict[nn.Module, PackedLayer] = {}
    for layer, reason in obstacles(model, chosen).items():
        name = chosen[layer]
        if reason is not None:
            log.info("blaq.pack: %s stays float: %s", name or "the model", reason)
            continue
        quantization = (quantization_of(layer.weight) if levels is None else Quantization(
            levels, group_size, recover_scale(layer.weight, levels, group_size)))
        packed[layer] = PACKED_OF[type(layer)].from_float(layer, quantization,
                                                          f"{name}.weight".lstrip("."))
    _share(packed, "weight", ("qweight", "scale"))
    model = replace(model, packed)
    model = replace(model, binarize(model))
    return fold(model) if fold_norm else model


@torch.no_grad()
def unpack(model: nn.Module) -> nn.Module:
    """Replace every packed layer by its float layer: the exact inverse of :func:`pack`, in place.

    The weights come out quantized, bit for bit as they went in, and known as such, so that ``pack``
    needs no ``bits``. A model that is itself one packed layer is returned as a float layer.

    Raises:
        ValueError: a layer has norms or ReLUs folded into it. The model is unchanged.
    """
    for name, module in model.named_modules():
        require_unfolded("unpack", name, module)
    layers = {m: m.to_float() for m in model.modules() if isinstance(m, PackedLayer)}
    _share(layers, "qweight", ("weight",))
    for layer, plain in layers.items():
        record(plain.weight, Quantization(layer.levels, layer.group_size, layer.scale.detach()))
    return replace(model, layers)


def _unique(names: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()
    for name, module in names.items():
        if module not in seen:
            seen.add(module)
            yield name, module


def is_quantized(module: nn.Module) -> bool:
    """Whether an optimizer quantized the module's weight."""
    weight = module._parameters.get("weight")
    return weight is not None and quantization_of(weight) is not None


def _skipped(names: dict[str, nn.Module], skip: Iterable[str]) -> set[nn.Module]:
    skipped: set[nn.Module] = set()
    for pattern in [skip] if isinstance(skip, str) else skip:
        matching = [module for name, module in names.items() if fnmatchcase(name, pattern)]
        require(bool(matching), "pack", "skip", "name modules of the model", repr(pattern))
        skipped.update(inner for module in matching for inner in module.modules())
    return skipped


def obstacles(model: nn.Module, chosen: Collection[nn.Module]) -> dict[nn.Module, str | None]:
    """Why a chosen layer cannot be packed; None where it can."""
    reasons = {layer: _obstacle(layer) for layer in chosen}
    holders: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for param in module._parameters.values():
            holders.setdefault(id(param), set()).add(module)
    for layer in chosen:
        if reasons[layer] is None:
            shared = holders[id(layer.weight)]
            if any(reasons.get(other, "not chosen") for other in shared):
                reasons[layer] = "its weight is shared with a module that stays float"
    return reasons


def _obstacle(layer: nn.Module) -> str | None:
    weight = layer._parameters.get("weight")
    if type(layer) not in PACKED_OF:
        return f"only Linear and Conv2d are packed, not {type(layer).__name__}"
    if weight is None:
        return "its weight is no plain parameter"
    if weight.numel() == 0:
        return "its weight is empty"
    if set(layer._parameters) - {"weight", "bias"} or layer._buffers or layer._modules:
        return "it has tensors or modules of its own"
    quantization = quantization_of(weight)
    if quantization is not None and len(quantization.levels) > MAX_LEVELS:
        return f"{quantization.bits}-bit codes are too wide to pack"
    return None


def _share(new: dict[Any, Any], tied: str, copies: tuple[str, ...]) -> None:
    """Layers that had one tensor ``tied`` in common get their ``copies`` in common."""
    first: dict[int, nn.Module] = {}
    for old, layer in new.items():
        source: Tensor = getattr(old, tied)
        original = first.setdefault(id(source), layer)
        for name in copies:
            setattr(layer, name, getattr(original, name))

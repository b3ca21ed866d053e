"""``fold_norm``: batch norms and ReLUs behind packed layers become part of them, for inference."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from blaq_kernels.rules import require

from .binary import BinaryActivation
from .nn import PackedConv2d, PackedLayer, PackedLinear
from .replace import replace

__all__ = ["check_foldable", "fold_norm"]

NORMS = {PackedConv2d: nn.BatchNorm2d, PackedLinear: nn.BatchNorm1d}
log = logging.getLogger("blaq")


@torch.no_grad()
def fold_norm(model: nn.Module) -> nn.Module:
    """Fold every batch norm that only a packed layer feeds, and the ReLU behind it, into that layer.

    The norm's multiplier goes into the layer's ``scale`` (one for each row, if it was one for all), its
    shift into ``bias``; codes stay. A ReLU behind a convolution, with a norm between or without, is done
    by the convolution. What was folded is an ``nn.Identity`` then, so names and structure stay. The model
    is changed in place and returned; it computes what it did in eval mode, up to rounding, and a folded
    layer refuses to run in training mode.

    A module that is called more than once, or behind a layer whose output goes elsewhere too, stays: in
    torchvision's ``BasicBlock`` one ``relu`` serves the sum as well, so that one stays and the norms go.
    A folded model is for running: :func:`blaq.save` takes the packed one, and ``fold_norm`` comes after
    :func:`blaq.load`.

    Raises:
        ValueError: ``torch.fx`` cannot trace the model, or a norm to fold is in training mode. The model
            is unchanged.
    """
    graph = check_foldable(model)
    calls = _calls(model, graph)
    source = {norm: layer for layer, norm in _pairs(calls) if isinstance(layer, PackedLayer)}
    rectified = dict(_rectified(calls, source))
    for norm, layer in source.items():
        _fold(layer, norm)
    for layers in rectified.values():
        for layer in layers:
            layer.relu = True
    gone = [*source, *rectified]
    log.info("blaq.fold_norm: folded %d norms and %d ReLUs", len(source), len(rectified))
    return replace(model, {module: nn.Identity().train(module.training) for module in gone})


def check_foldable(model: nn.Module) -> fx.Graph:
    """The model's graph, before or after packing.

    Raises:
        ValueError: there is none, or a norm behind a layer is in training mode.
    """
    kind = type(model).__name__
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises for want of real tensors
        raise ValueError(f"blaq.fold_norm: model must be one that torch.fx traces, got {kind}: "
                         f"{error}") from error
    for layer, norm in _pairs(_calls(model, graph)):
        require(not norm.training, "fold_norm", "model", "be in eval mode; try model.eval()",
                f"a {type(norm).__name__} behind {type(layer).__name__} in training mode")
    return graph


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = isinstance(module, PackedLayer | BinaryActivation)
        return own or super().is_leaf_module(module, name)


Calls = dict[nn.Module, list[tuple[nn.Module | None, bool]]]
"""For each module the calls of it: the module whose result it takes, and whether it alone takes that."""


def _calls(model: nn.Module, graph: fx.Graph) -> Calls:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: Calls = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            before = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            known = before is not None and before.op == "call_module"
            calls[modules[node.target]].append(
                (modules[before.target], len(before.users) == 1) if known else (None, False))
    return calls


def _pairs(calls: Calls) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Layers, float or packed, with the norm behind them."""
    for norm, sources in calls.items():
        layer, alone = sources[0]
        if len(sources) > 1 or not alone or len(calls[layer]) > 1 or _has_hooks(norm, layer):
            continue
        kind = next((k for k in NORMS if isinstance(layer, k | k.FLOAT)), None)
        if kind is not None and type(norm) is NORMS[kind] and norm.running_mean is not None:
            if isinstance(layer, PackedLayer) or type(layer) is kind.FLOAT:
                yield layer, norm


def _rectified(calls: Calls, source: dict[nn.Module, nn.Module]
               ) -> Iterator[tuple[nn.Module, list[PackedConv2d]]]:
    """ReLUs whose every call takes the result of a convolution, perhaps through its norm, alone."""
    for module, sources in calls.items():
        if type(module) is nn.ReLU and not _has_hooks(module):
            layers = [source.get(before, before) for before, _ in sources]
            if all(alone and type(layer) is PackedConv2d and len(calls[before]) == 1
                   and not _has_hooks(layer)
                   for layer, (before, alone) in zip(layers, sources, strict=True)):
                yield module, layers


def _has_hooks(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def _fold(layer: PackedLayer, norm: nn.Module) -> None:
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * factor
    scale: Tensor = layer.scale.detach().double() * factor[:, None]
    layer.scale = scale.to(layer.scale.dtype)
    layer.bias = nn.Parameter(shift.to(layer.dtype), requires_grad=False)
    layer.group_size = layer.group_size or -1
    layer.folded = True

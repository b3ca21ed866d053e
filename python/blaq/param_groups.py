"""Parameter groups of :class:`blaq.BLAQ`: the bits of each layer, and what a group may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blaq_kernels.rules import METHODS, PARAM_DTYPES, require

from .codebook import levels_for

__all__ = ["param_groups"]

Width = int | str | None
QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDTHS = (1, 2, 3, 4, 8)


def param_groups(model: nn.Module, bits: Width | Mapping[str, Width] = 1, *,
                 skip: Iterable[str] = (), first: Width = None, last: Width = None,
                 codebook: str | Sequence[float] | None = None,
                 group_size: int | None = None) -> list[dict[str, Any]]:
    """Split a model's parameters by the width that their layer is quantized to.

    The weights of Linear and Conv layers are quantized; norms, biases and embeddings (also one that
    is tied to a Linear) never are. A shared parameter counts once, frozen ones are left out.

    Args:
        model: plain, compiled or wrapped for data parallelism; the optimizer keeps its buffers
            from the trial evaluation.
        bits: 1 to 4; 8 (uniform grid, trained by AdamW through ``fake_quantize``); ``"fp"``: not
            quantized. Or a dict from layer name or pattern (``"layer1.*"``; the first match counts)
            to one of these; layers without a match stay in full precision.
        skip: names or patterns of layers that stay in full precision.
        first, last: width of the first and the last quantizable layer in the order of
            ``model.named_modules()``; None: as ``bits`` says.
        codebook: a name that :func:`blaq.levels_of` knows, or magnitudes.
        group_size: 0 one scale for a tensor (the paper), -1 for a row, g > 0 for g inputs. None for
            either: as the optimizer says.

    Returns:
        Groups that carry names, ``bits``, ``model`` and, where given, ``codebook``, ``group_size``.
        Add keys (``lr``, ``weight_decay``, …) to a group as to any optimizer's.

    Raises:
        ValueError: a name in ``skip`` or ``bits`` matches no layer, a width or codebook does not
            exist, or two names of one shared weight ask for different widths.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> [(g["bits"], [n for n, _ in g["params"]]) for g in param_groups(model, bits=1, last=8)]
    [(1, ['0.weight']), (8, ['2.weight']), (None, ['0.bias', '1.weight', '1.bias', '2.bias'])]
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    layers = {_plain(name): module for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, QUANTIZABLE)}
    widths = _widths(list(layers), bits, [skip] if isinstance(skip, str) else list(skip))
    for argument, width, name in (("first", first, [*layers][:1]), ("last", last, [*layers][-1:])):
        if width is not None:
            widths.update(dict.fromkeys(name, _width(argument, width)))
    by_param = _by_param(model, layers, widths)
    options = {"codebook": codebook, "group_size": group_size}
    options = {key: value for key, value in options.items() if value is not None}
    if codebook is not None:
        for width in sorted({w for w in by_param.values() if w is not None}):
            levels_for(codebook, width)

    members: dict[int | None, list[tuple[str, Tensor]]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            width = by_param.get(param)
            members.setdefault(width, []).append((_plain(name), param))
    return [{"params": members[width], "bits": width, "model": model, **options}
            for width in sorted(members, key=lambda w: (w is None, w))]


def _plain(name: str) -> str:
    """A name without the parts that torch.compile puts in."""
    return name.replace("_orig_mod.", "")


def _width(argument: str, width: Width) -> int | None:
    """None for full precision, which users write as "fp"."""
    if width is None or width == "fp":
        return None
    known = isinstance(width, int) and not isinstance(width, bool) and width in WIDTHS
    require(known, "param_groups", argument, "be 1, 2, 3, 4, 8 or 'fp'", repr(width))
    return width


def _widths(layers: list[str], bits: Width | Mapping[str, Width],
            skip: list[str]) -> dict[str, int | None]:
    """Width of every layer by name."""
    rules = dict(bits) if isinstance(bits, Mapping) else {}
    for argument, patterns in (("skip", skip), ("bits", rules)):
        for pattern in patterns:
            require(any(fnmatchcase(name, pattern) for name in layers), "param_groups", argument,
                    f"name layers of the model ({', '.join(layers) or 'it has none'})",
                    repr(pattern))
    if not isinstance(bits, Mapping):
        rules = {"*": _width("bits", bits)}
    rules = {**dict.fromkeys(skip, None), **{k: _width("bits", v) for k, v in rules.items()
                                             if k not in skip}}
    return {name: next((w for pattern, w in rules.items() if fnmatchcase(name, pattern)), None)
            for name in layers}


def _by_param(model: nn.Module, layers: dict[str, nn.Module],
              widths: dict[str, int | None]) -> dict[Tensor, int | None]:
    """Width of every layer's weight; an embedding's is full precision, whoever shares it."""
    embedded = {id(m.weight) for m in model.modules()
                if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: dict[Tensor, int | None] = {}
    for name, module in layers.items():
        weight = module._parameters.get("weight")
        if weight is None:  # computed by a parametrization: no leaf to quantize
            continue
        width = None if id(weight) in embedded else widths[name]
        require(found.setdefault(weight, width) == width, "param_groups", "bits",
                "be one width for a weight that layers share",
                f"{found[weight]} and {width} at {name!r}")
    return found


def check_group(group: dict[str, Any]) -> None:
    """Every hyper-parameter of a group, and what its parameters must be."""
    op, lr = "BLAQ", group["lr"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, op, "lr", "have one element", list(lr.shape))
    require(lr >= 0.0, op, "lr", "be at least 0", lr)
    require(len(group["betas"]) == 2 and all(0.0 <= beta < 1.0 for beta in group["betas"]), op,
            "betas", "be two numbers in [0, 1)", group["betas"])
    for name in ("eps", "weight_decay", "clip"):
        require(group[name] >= 0.0, op, name, "be at least 0", group[name])
    require(0.0 < group["backtrack"] <= 1.0, op, "backtrack", "be in (0, 1]", group["backtrack"])
    require(isinstance(group["max_iter"], int) and group["max_iter"] >= 1, op, "max_iter",
            "be an integer of at least 1", group["max_iter"])
    require(group["method"] in METHODS, op, "method", "be 'alternating' or 'exact'",
            repr(group["method"]))
    require(group["on_nonfinite"] in ("raise", "skip"), op, "on_nonfinite", "be 'raise' or 'skip'",
            repr(group["on_nonfinite"]))
    require(isinstance(group["group_size"], int) and group["group_size"] >= -1, op, "group_size",
            "be 0, -1 or positive", group["group_size"])
    require(group["bits"] in (None, *WIDTHS), op, "bits", "be 1, 2, 3, 4, 8 or None",
            repr(group["bits"]))
    if group["bits"] is None:
        return
    levels_for(group["codebook"], group["bits"])
    names = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        require(param.dtype in PARAM_DTYPES, op, name, "be float32, bfloat16 or float16",
                param.dtype)
        require(param.is_contiguous(), op, name, "be contiguous", f"strides {list(param.stride())}")
        require(param.numel() > 0, op, name, "have elements", list(param.shape))
        require(bool(param.detach().isfinite().all()), op, name, "be finite", "NaN or Inf")

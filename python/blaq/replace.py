"""Putting modules in the place of others."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["replace"]


def replace(model: nn.Module, new: dict[Any, Any]) -> nn.Module:
    """Put ``new[layer]`` wherever ``layer`` stands in the model, with its hooks."""
    for old, layer in new.items():
        for key in vars(old):
            if key.startswith(("_forward_", "_backward_", "_is_full_backward")):
                layer.__dict__[key] = old.__dict__[key]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent.add_module(name, new[child])
    return new.get(model, model)

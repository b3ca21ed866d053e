"""Float weights in safetensors files: what a run may start from, and leaves for other tools."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..io import load
from .checkpoint import write_whole

__all__ = ["load_any", "load_weights", "save_weights"]


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's ``state_dict``; the file appears whole or not at all."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    write_whole(path, lambda file: file.write(save(tensors)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a file with exactly the model's ``state_dict``.

    Raises:
        ValueError: there is no such file, it is damaged, or of another model; nothing was changed.
    """
    if not path.is_file():
        raise ValueError(f"blaq.load_weights: {path}: file must exist, got no such file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"blaq.load_weights: {path}: file must be whole safetensors, got: {error}"
                         ) from None
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = (list(side[name].shape) if name in side else "no such tensor"
                        for side in (own, tensors))
        if ours != theirs:
            raise ValueError(f"blaq.load_weights: {path}: {name} must be {ours} as in the model, "
                             f"got {theirs}")
    model.load_state_dict(tensors)


def load_any(model: nn.Module, path: Path) -> nn.Module:
    """Read a packed file or one of float weights, whichever it is; returns the model.

    Raises:
        ValueError: as :func:`load_weights` and :func:`blaq.load`.
    """
    try:
        with safe_open(path, "pt") as file:
            is_packed = "blaq.format_version" in (file.metadata() or {})
    except SafetensorError:
        is_packed = False  # load_weights says what is wrong
    if is_packed:
        return load(path, model)
    load_weights(model, path)
    return model

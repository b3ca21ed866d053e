"""Files of a run folder: written whole or not at all, checked before anything is taken from them.

``config.json``       the :class:`TrainConfig`
``metrics.jsonl``     one JSON object for each finished epoch
``checkpoint.pt``     everything that the run needs to go on bit for bit: tensors and plain values
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["CHECKPOINT", "CONFIG", "METRICS", "load_checkpoint", "save_checkpoint", "write_whole"]

CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.json", "metrics.jsonl"
VERSION = 2
CONTENT: dict[str, Any] = {
    "version": int, "config": dict, "in_shape": tuple, "num_classes": int,
    "steps_per_epoch": int, "model": dict, "method": dict, "oscillation": (dict, type(None)),
    "order": torch.Tensor, "random": torch.Tensor, "random_cuda": (torch.Tensor, type(None)),
    "evaluations": int, "history": list}
"""Keys of a checkpoint and the types of their values."""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place.

    Readers, and whoever comes after a power cut, see the old file or the new one. A run has one
    process: a draft that a killed one left is written over.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """The lines of every epoch: what an interrupted epoch may have left behind goes."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in history)
    write_whole(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint of these values, all tensors or plain."""
    whole = {"version": VERSION, **content}
    assert set(whole) == set(CONTENT)
    write_whole(path, lambda file: torch.save(whole, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU; nothing in the file is executed.

    Raises:
        ValueError: there is none, it is damaged, or not one of this version; the message names the
            file and the rule.
    """
    def require(condition: bool, what: str, rule: str, got: object) -> None:
        if not condition:
            raise ValueError(f"blaq.load_checkpoint: {path}: {what} must {rule}, got {got}")

    require(path.is_file(), "file", "exist", "no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself checks no checksum
        require(damaged is None, "file", "be undamaged", f"a wrong checksum in {damaged}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        require(False, "file", "be a whole checkpoint", " ".join(str(error).split())[:100])
    require(isinstance(content, dict), "content", "be a dict", type(content).__name__)
    version = content.get("version")
    require(version == VERSION, "version", f"be {VERSION}", version)
    for key, kind in CONTENT.items():
        require(isinstance(content.get(key, require), kind), key, "be in the file, of its type",
                type(content[key]).__name__ if key in content else "nothing")
    return content

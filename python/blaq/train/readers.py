"""Readers of image files in their original formats: idx, CIFAR binary, SVHN .mat.

Each returns uint8 images ``[n, channels, height, width]`` and int64 labels ``[n]``, torch tensors.
What a file says is checked against its size and its partner: a truncated, contradictory or missing
file is a ValueError that names the file, the rule and the value.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._extras import import_extra

__all__ = ["read_cifar", "read_idx", "read_idx_pair", "read_svhn"]

IDX_UBYTE = 0x08


def _require(condition: bool, path: Path, what: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"blaq.data: {path}: {what} must {rule}, got {got}")


def _content(path: Path) -> bytes:
    """The file's bytes, inflated if its name ends in .gz."""
    _require(path.is_file(), path, "file", "exist", "no such file")
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"blaq.data: {path}: file must be whole gzip, got: {error}") from None


def read_idx(path: Path, dims: int) -> np.ndarray:
    """One idx file of unsigned bytes with this many dimensions; ``.gz`` is inflated."""
    content = _content(path)
    header = 4 + 4 * dims
    _require(len(content) >= header, path, "header", f"have {header} bytes", len(content))
    magic = int.from_bytes(content[:4], "big")
    expected = IDX_UBYTE << 8 | dims
    _require(magic == expected, path, "magic number", f"be {expected:#010x}", f"{magic:#010x}")
    shape = np.frombuffer(content, ">u4", dims, 4).astype(object)  # Python integers cannot overflow
    size = header + int(np.prod(shape))
    _require(len(content) == size, path, "file", f"have {size} bytes for dimensions {list(shape)}",
             len(content))
    return np.frombuffer(content, np.uint8, offset=header).reshape([int(n) for n in shape])


def read_idx_pair(images: Path, labels: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels of an MNIST-like data set."""
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    _require(min(pixels.shape) > 0, images, "dimensions", "be positive", list(pixels.shape))
    _require(len(classes) == len(pixels), labels, "labels",
             f"be {len(pixels)}, as many as images in {images.name}", len(classes))
    _check_labels(labels, classes, num_classes)
    return torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(classes.astype(np.int64))


def _check_labels(path: Path, labels: np.ndarray, num_classes: int, first: int = 0) -> None:
    bad = ~((labels >= first) & (labels < first + num_classes))
    _require(not bad.any(), path, "labels", f"be {first} to {first + num_classes - 1}",
             labels[bad][:1].tolist())


def read_cifar(path: Path, label_ranges: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One file of the binary version: records of label bytes and 3 planes of 32×32.

    Args:
        label_ranges: number of values of each label byte, the last of which is returned: (10,) for
            CIFAR-10, (20, 100), coarse and fine, for CIFAR-100.
    """
    content = _content(path)
    width = len(label_ranges)
    record = width + 3 * 32 * 32
    _require(len(content) > 0 and len(content) % record == 0, path, "size",
             f"be a positive multiple of {record} bytes", len(content))
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    for i, count in enumerate(label_ranges):
        _check_labels(path, records[:, i], count)
    images = records[:, width:].reshape(-1, 3, 32, 32)
    return torch.from_numpy(images.copy()), torch.from_numpy(records[:, width - 1].astype(np.int64))


def read_svhn(path: Path) -> tuple[Tensor, Tensor]:
    """One file of cropped digits (format 2): ``X`` 32×32×3×n and ``y`` n×1, where 10 means 0."""
    io = import_extra("scipy.io", "train")
    _require(path.is_file(), path, "file", "exist", "no such file")
    try:
        content = io.loadmat(path, variable_names=("X", "y"))
    except (io.matlab.MatReadError, ValueError, TypeError, NotImplementedError, EOFError,
            IndexError, KeyError, OSError, OverflowError, MemoryError, zlib.error) as error:
        raise ValueError(f"blaq.data: {path}: file must be a whole MATLAB 5 file, got: {error}"
                         ) from None
    for key in ("X", "y"):
        _require(key in content, path, "file", f"have the variable {key}", "none")
    images, labels = content["X"], content["y"]
    _require(images.dtype == np.uint8, path, "X", "be uint8", images.dtype)
    shaped = images.ndim == 4 and images.shape[:3] == (32, 32, 3) and images.shape[3] > 0
    _require(shaped, path, "X", "have shape 32×32×3×n", list(images.shape))
    count = images.shape[3]
    _require(np.issubdtype(labels.dtype, np.integer) and labels.shape == (count, 1), path, "y",
             f"be {count}×1 integers, one for each image", f"{labels.dtype} {list(labels.shape)}")
    labels = labels[:, 0]
    _check_labels(path, labels, 10, first=1)
    images = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) % 10)

"""Data sets by name, as uint8 images in memory, and the mini-batches drawn from them.

``digits`` comes with scikit-learn; the others are read from local copies in their original formats.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._extras import import_extra
from .images import read_folder
from .readers import read_cifar, read_idx_pair, read_svhn

__all__ = ["DATA", "Data", "Split", "augmented", "batches", "default_folder", "held_out",
           "load"]

CHUNK = 4096
"""Images that statistics are computed over at a time."""


@dataclass(frozen=True)
class Split:
    """Labelled images and how to normalise them.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``, 0 to ``num_classes`` - 1.
        num_classes: of the data set.
        mean, std: float32 ``[channels, 1, 1]`` of the *training* images; a pixel is 0 to 255.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images to float32 of zero mean and unit variance over the training set, in the
        memory format channels_last: LeNet-5 trains 1.6 times as fast with it on a CPU."""
        normal = (images.float() - self.mean) / self.std
        n, channels, height, width = normal.shape
        if channels == 1:  # torch calls one channel contiguous in both formats, and keeps the other
            return normal.as_strided(normal.shape, (height * width, 1, width, 1))
        return normal.contiguous(memory_format=torch.channels_last)

    def to(self, device: torch.device | str) -> Split:
        """The same, on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device),
                       mean=self.mean.to(device), std=self.std.to(device))


class Data(NamedTuple):
    """A data set: what to train on and what to measure accuracy on."""

    train: Split
    test: Split


Pair = tuple[Tensor, Tensor]
Reader = Callable[[Path], tuple[Pair, Pair, int]]


def default_folder(name: str) -> Path | None:
    """Where :func:`load` looks for a data set: ``$BLAQ_DATA/name``; None if that is not set."""
    root = os.environ.get("BLAQ_DATA")
    return Path(root) / name if root else None


def load(name: str, folder: str | Path | None = None) -> Data:
    """Read a data set.

    Args:
        name: one of ``DATA``.
        folder: that holds the original files; None: :func:`default_folder`. ``digits`` needs none.

    Raises:
        ValueError: unknown name, no folder known, or a file is missing, truncated or contradictory.
        ModuleNotFoundError: an optional package is missing; the message says what to install.
    """
    if name not in DATA:
        raise ValueError(f"blaq.data: data must be one of {', '.join(DATA)}, got {name!r}")
    path = Path(folder) if folder else default_folder(name)
    if path is None and name != "digits":
        raise ValueError(f"blaq.data: a folder must be given for {name}, got none; try --data-dir, "
                         f"or set BLAQ_DATA to the folder that holds {name}/")
    if path is not None and name != "digits" and not path.is_dir():
        raise ValueError(f"blaq.data: {path}: folder of {name} must exist, got no such folder")
    (images, labels), (test_images, test_labels), num_classes = DATA[name](path or Path())
    mean, std = _statistics(images)
    if test_images.shape[1:] != images.shape[1:]:
        raise ValueError(f"blaq.data: {path}: test images must have the shape of training images, "
                         f"{list(images.shape[1:])}, got {list(test_images.shape[1:])}")
    return Data(Split(images, labels, num_classes, mean, std),
                Split(test_images, test_labels, num_classes, mean, std))


def held_out(split: Split, count: int) -> tuple[Split, Split]:
    """All but ``count`` images, and these: the same for every run, in their own order.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not 0 < count < len(split):
        raise ValueError(f"blaq.data: validation must leave some of the {len(split)} training "
                         f"images, got {count}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    parts = (order[count:].sort().values, order[:count].sort().values)
    rest, held = (replace(split, images=split.images[part], labels=split.labels[part])
                  for part in parts)
    return rest, held


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from exact integer sums."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in images.split(CHUNK):
        wide = chunk.transpose(0, 1).flatten(1).to(torch.int32)
        total += wide.sum(1)
        squares += (wide * wide).sum(1)
    count = images.numel() // images.shape[1]
    mean = total.double() / count
    std = (squares.double() / count - mean * mean).clamp_min(0.0).sqrt()
    std = torch.where(std > 0, std, 1.0)  # a constant channel carries nothing: any divisor will do
    return mean.float().reshape(-1, 1, 1), std.float().reshape(-1, 1, 1)


def _digits(_: Path) -> tuple[Pair, Pair, int]:
    """1,797 handwritten 8×8 digits (UCI), enlarged bilinearly to 28×28; 360 are for testing."""
    digits = import_extra("sklearn.datasets", "train").load_digits()
    split = import_extra("sklearn.model_selection", "train").train_test_split
    images = torch.from_numpy(digits.images).float()[:, None]  # 0 to 16
    images = F.interpolate(images, size=28, mode="bilinear", align_corners=False)
    images = (images * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    train, test = split(range(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test]), 10


def _mnist(folder: Path) -> tuple[Pair, Pair, int]:
    def pair(prefix: str) -> Pair:
        files = [folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"]
        images, labels = (path if path.exists() else path.with_name(path.name + ".gz")
                          for path in files)
        return read_idx_pair(images, labels, 10)

    return pair("train"), pair("t10k"), 10


def _cifar10(folder: Path) -> tuple[Pair, Pair, int]:
    folder = _inner(folder, "cifar-10-batches-bin")
    train = [read_cifar(folder / f"data_batch_{i}.bin", (10,)) for i in range(1, 6)]
    return _joined(train), read_cifar(folder / "test_batch.bin", (10,)), 10


def _cifar100(folder: Path) -> tuple[Pair, Pair, int]:
    folder = _inner(folder, "cifar-100-binary")
    ranges = (20, 100)
    return read_cifar(folder / "train.bin", ranges), read_cifar(folder / "test.bin", ranges), 100


def _svhn(folder: Path) -> tuple[Pair, Pair, int]:
    return read_svhn(folder / "train_32x32.mat"), read_svhn(folder / "test_32x32.mat"), 10


def _svhn_extra(folder: Path) -> tuple[Pair, Pair, int]:
    """With the 531,131 easier images of ``extra``, as the paper's predecessors train."""
    train = [read_svhn(folder / f"{name}_32x32.mat") for name in ("train", "extra")]
    return _joined(train), read_svhn(folder / "test_32x32.mat"), 10


def _inner(folder: Path, name: str) -> Path:
    """The folder that the original archive unpacks to, if it stands inside ``folder``."""
    return folder / name if (folder / name).is_dir() else folder


def _joined(pairs: list[Pair]) -> Pair:
    images, labels = zip(*pairs, strict=True)
    return torch.cat(images), torch.cat(labels)


DATA: dict[str, Reader] = {
    "digits": _digits, "mnist": _mnist, "cifar10": _cifar10, "cifar100": _cifar100, "svhn": _svhn,
    "svhn-extra": _svhn_extra, "images": read_folder}
"""Reader of each data set."""


def batches(split: Split, batch_size: int, generator: torch.Generator, *,
            augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled mini-batches: normalised images and labels.

    The images left over when ``batch_size`` does not divide their number wait for the next epoch's
    shuffle, so every batch is full (one of a single image would end batch norm). A set smaller than
    ``batch_size`` is one batch.

    Args:
        generator: on the CPU; all randomness comes from it, so its state at the start decides the
            epoch.
        augment: random horizontal flip and crop, see :func:`augmented`.
    """
    order = torch.randperm(len(split), generator=generator)
    count = max(1, len(split) // batch_size)
    for indices in order[:count * batch_size].split(batch_size):
        chosen = indices.to(split.images.device)
        images = split.images[chosen]
        if augment:
            images = augmented(images, generator)
        yield split.normalise(images), split.labels[chosen]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability ½ and shifted by up to an eighth of its side.

    What comes in at the border is black: for 32×32, the usual crop from 4 pixels of padding.
    """
    n, channels, height, width = images.shape
    pad_y, pad_x = height // 8, width // 8
    draw = torch.rand(3, n, 1, generator=generator)
    rows = (draw[0] * (2 * pad_y + 1)).long() + torch.arange(height)
    cols = torch.arange(width).expand(n, width)
    cols = torch.where(draw[2] < 0.5, cols.flip(1), cols) + (draw[1] * (2 * pad_x + 1)).long()
    rows, cols = rows.to(images.device), cols.to(images.device)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    which = torch.arange(n, device=images.device)[:, None, None, None]
    planes = torch.arange(channels, device=images.device)[:, None, None]
    return padded[which, planes, rows[:, None, :, None], cols[:, None, None, :]]

"""A folder of images, one folder for each class: ``train/`` and ``test/`` (or ``val/``) inside it.

The listing is torchvision's ``ImageFolder`` (an extra). Images become RGB, their shorter side is
brought to ``SIDE`` and the middle is cut out, and all are kept in memory as uint8.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._extras import import_extra

__all__ = ["read_folder"]

SIDE = 224
"""Height and width of the images: ImageNet's."""


def read_folder(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Training and test images of a folder, and the number of classes.

    Raises:
        ValueError: ``train/`` or ``test/`` is missing, has no images, their classes differ, or an
            image cannot be read; the message names it.
        ModuleNotFoundError: torchvision is not installed.
    """
    listing = import_extra("torchvision.datasets", "vision").ImageFolder
    test = "test" if (folder / "test").is_dir() else "val"
    parts = []
    for name in ("train", test):
        path = folder / name
        if not path.is_dir():
            raise ValueError(f"blaq.data: {path}: folder must exist, got no such folder")
        try:
            parts.append(listing(path))
        except FileNotFoundError as error:  # torchvision's word for a class without images
            raise ValueError(f"blaq.data: {path}: folder must have images in each class's folder, "
                             f"got: {error}") from None
    if parts[0].classes != parts[1].classes:
        differing = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(f"blaq.data: {folder}: train and {test} must have the same classes, got "
                         f"{differing[0]!r} in one only")
    train, held_out = ((_pixels([Path(p) for p, _ in part.samples]), torch.tensor(part.targets))
                       for part in parts)
    return train, held_out, len(parts[0].classes)


def _pixels(paths: list[Path]) -> Tensor:
    images = torch.empty(len(paths), 3, SIDE, SIDE, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = torch.from_numpy(_read_image(paths[i])).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        list(pool.map(read, range(len(paths))))
    return images


def _read_image(path: Path) -> np.ndarray:
    """One image, uint8 ``[SIDE, SIDE, 3]``."""
    from PIL import Image, ImageOps  # torchvision brings it

    try:
        with Image.open(path) as file:
            image = ImageOps.fit(file.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"blaq.data: {path}: file must be a whole image, got: {error}") from None
    return np.array(image)

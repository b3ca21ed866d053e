"""Many tensors in one: how the step ops take a state of all their weights at once.

The states of a list lie one after another in a tensor of one dimension, each from a multiple of
``ALIGNMENT`` elements, the last filled up too: a cache line of float32, so that threads that write
neighbours meet in none, and a GPU's 128-bit loads fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from .shapes import scale_shape

__all__ = ["ALIGNMENT", "STATES", "is_flat", "join", "joined", "length", "separate", "split",
           "state_shapes"]

ALIGNMENT = 16  # kFlatAlignment
STATES = ("latents", "exp_avgs", "exp_avg_sqs", "scales")


def _room(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def length(shapes: Iterable[Sequence[int]]) -> int:
    """Elements of the flat tensor of these shapes."""
    return sum(_room(math.prod(shape)) for shape in shapes)


def split(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of ``flat`` ``[length(shapes)]``, contiguous, one of each shape."""
    counts = [math.prod(shape) for shape in shapes]
    starts = itertools.accumulate(map(_room, counts), initial=0)
    return [flat[start:start + count].view(shape)
            for start, count, shape in zip(starts, counts, shapes, strict=False)]


def join(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one dtype and device, as views of a flat one."""
    shapes = [x.shape for x in tensors]
    copies = split(tensors[0].new_zeros(length(shapes)), shapes)
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x)
    return copies


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The flat tensor that these are the views of, all and in this order; None where they are not,
    or are less than two: a list of one is that tensor."""
    if len(tensors) < 2:
        return None
    first = tensors[0]
    storage = first.untyped_storage()
    total = length(x.shape for x in tensors)
    if storage.nbytes() != total * first.element_size():
        return None
    start = 0
    for x in tensors:
        if (x.untyped_storage().data_ptr() != storage.data_ptr() or x.storage_offset() != start
                or x.dtype != first.dtype or not x.is_contiguous()):
            return None
        start += _room(x.numel())
    return first.new_empty(0).set_(storage, 0, (total,))


def is_flat(states: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether a list of states is one tensor, that of all ``params``."""
    return len(states) == 1 < len(params)


def state_shapes(name: str, params: Sequence[Tensor], group_size: int) -> list[Sequence[int]]:
    """Shapes of one of the ``STATES``, a weight each."""
    return [scale_shape(p.shape, group_size) if name == "scales" else p.shape for p in params]


def separate(params: Sequence[Tensor], group_size: int,
             *states: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The lists of ``STATES``, those that are flat as views for each weight."""
    return [split(tensors[0], state_shapes(name, params, group_size))
            if is_flat(tensors, params) else tensors
            for name, tensors in zip(STATES, states, strict=True)]

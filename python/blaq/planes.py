"""Where a packed layer has its codes: in bit planes, as files do, beside the copy in the order that its
kernels read; or, after ``drop_planes``, in that copy alone."""

from __future__ import annotations

import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blaq_kernels.reference import matrix_shape

from .decoded import version

__all__ = ["Planes", "drop_planes", "restore_planes"]

log = logging.getLogger("blaq")


class Planes(nn.Module):
    """A module with a buffer ``qweight``, ``[bits, N, ceil(K/8)]``, or ``[bits, N, 0]`` where its repacked
    copy stands for it."""

    qweight: Tensor
    weight_shape: tuple[int, ...]
    levels: tuple[float, ...]
    bits: int
    group_size: int
    dtype: torch.dtype
    mapped: Tensor | None
    _repacked: tuple[Tensor, int, Tensor | None] | None = None  # of which qweight, which version, and it

    @property
    def lacks_planes(self) -> bool:
        """Whether ``qweight`` is empty, for :func:`blaq.drop_planes` dropped its planes."""
        qweight = self.qweight
        return qweight.shape[2] == 0 and matrix_shape(self.weight_shape)[1] > 0

    def planes(self) -> Tensor:
        """``qweight``; dropped planes are made anew, the same for all who hold them at a time."""
        qweight = self.qweight
        if not self.lacks_planes:
            return qweight
        made: Tensor | None = getattr(qweight, "made", lambda: None)()
        if made is None or version(made):  # whoever has it may have written to it
            with torch.inference_mode(False), torch.no_grad():
                made = torch.ops.blaq.unrepack.default(self._copy(), self.bits,
                                                       *matrix_shape(self.weight_shape))
            qweight.made = weakref.ref(made)  # type: ignore[attr-defined]
        return made

    def keep_planes(self) -> None:
        """Make ``qweight`` whole, if it is not."""
        if self.lacks_planes:
            self.qweight, copy = self.planes(), self._copy()
            self._repacked = self.qweight, version(self.qweight), copy

    def _copy(self) -> Tensor | None:
        return None if self._repacked is None else self._repacked[2]

    def repacked(self) -> Tensor | None:
        """The copy, made if it is not there."""
        raise NotImplementedError

    def _wants_repacked(self, qweight: Tensor) -> bool:
        raise NotImplementedError

    def _reads_planes(self) -> bool:
        """Whether kernels read them in calls as the layer is made for: those that compute in float do."""
        if not self.qweight.is_cpu or not self._wants_repacked(self.qweight):
            return True
        # The rounded weights are then integers times one number: packed_matrix in csrc/cpu/packed_matmul.cpp.
        powers = all(level == 0 or math.frexp(level)[0] == 0.5 for level in self.levels)
        plain = (self.group_size == 0 or self.dtype is torch.float32 or len(self.levels) == 1
                 or (self.dtype is torch.bfloat16 and powers))
        return not plain or (self.group_size > 0 and self.group_size % 32 != 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {**self._buffers, "qweight": self.planes()},
                "_repacked": None, "mapped": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lacks_planes:
            destination[f"{prefix}qweight"] = self.planes()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.keep_planes()
        super()._load_from_state_dict(*args)


def drop_planes(model: nn.Module) -> nn.Module:
    """Free the bit planes of packed layers, which keep their codes in the order of this processor's kernels
    alone: half the memory. In place; the model is returned.

    Such a layer's ``qweight`` is empty, ``[bits, N, 0]``. The model computes what it did, with
    ``torch.compile`` too. What needs the planes has them made from the copy, exactly: ``layer.weight``,
    ``state_dict``, :func:`blaq.save`, :func:`blaq.unpack`, a deep copy, a gradient, rows with NaN, inputs
    that fast kernels do not take. They come back for good when the model is moved or cast, loads a state, or
    computes without these kernels: ``exact``, or another CPU capability. :func:`restore_planes` brings them
    back on request, for ``torch.export`` too.

    Layers keep their planes where kernels read those: on GPUs and processors without 8-bit kernels, with
    accuracy ``exact``, groups that are no multiple of 32, convolutions of few channels or products, 16-bit
    weights that are no multiples of one number, binary layers; and where another module that keeps them
    shares them. Not while another thread computes.

    >>> from blaq import PackedLinear, summary
    >>> layer = drop_planes(PackedLinear(256, 64, levels=(1.0,), bias=False))
    >>> summary(layer).bytes_now + summary(layer).bytes_repacked
    2052
    """
    sharing: dict[int, list[Planes]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, Planes) and not module.lacks_planes:
            sharing[id(module.qweight)].append(module)
    freed = 0
    for layers in sharing.values():
        if not any(layer._reads_planes() for layer in layers):
            freed += layers[0].qweight.nbytes
            _drop(layers)
    log.info("blaq.drop_planes: freed %d bytes", freed)
    return model


def restore_planes(model: nn.Module) -> nn.Module:
    """Undo :func:`drop_planes`, in place; the model is returned."""
    for module in model.modules():
        if isinstance(module, Planes):
            module.keep_planes()
    return model


def _drop(layers: Sequence[Planes]) -> None:
    """The planes that these layers share."""
    copies = [layer.repacked() for layer in layers]
    with torch.inference_mode(False):
        empty = layers[0].qweight.new_empty((*layers[0].qweight.shape[:2], 0))
    for layer, copy in zip(layers, copies, strict=True):
        layer.qweight, layer.mapped = empty, None
        layer._repacked = empty, version(empty), copy

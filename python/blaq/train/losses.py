"""What a run minimises: losses of logits ``[n, classes]`` and labels, mean or sum over images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "squared_hinge"]


def squared_hinge(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """``max(0, 1 - t y)²``, targets t of +1 for the right class and -1 for the others, mean over
    the classes: the loss of BinaryConnect and LAB."""
    targets = 2.0 * F.one_hot(labels, logits.shape[1]).to(logits.dtype) - 1.0
    each = (1.0 - targets * logits).clamp_min(0.0).square().mean(1)
    return each.sum() if reduction == "sum" else each.mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": F.cross_entropy, "squared-hinge": squared_hinge}

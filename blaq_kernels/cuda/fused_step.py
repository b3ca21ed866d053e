"""torch.ops.blaq.fused_step: stage 2 of BLAQ (AAAI 2024), Eqs. 9, 10, 8, 7, for a list of
weights."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import step_ops
from . import call
from .fused import ENGINE

__all__ = ["fused_step"]


def fused_step(otherwise: Callable[..., None], params: Sequence[Tensor], *rest: Any) -> None:
    """``step_ops.fused_step`` where a scale of the list spans a long group, else ``otherwise``;
    positional arguments, as the dispatcher passes them."""
    if call.serves(params, rest[call.GROUP_SIZE["fused_step"] - 1]):
        step_ops.fused_step(ENGINE, params, *rest)
    else:
        otherwise(params, *rest)

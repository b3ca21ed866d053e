"""torch.ops.blaq.fused_trial: stage 1 of BLAQ (AAAI 2024), Eqs. 6 and 5, for a list of weights."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import step_ops
from . import call
from .fused import ENGINE

__all__ = ["fused_trial"]


def fused_trial(otherwise: Callable[..., None], params: Sequence[Tensor], *rest: Any) -> None:
    """``step_ops.fused_trial`` where a scale of the list spans a long group, else ``otherwise``;
    positional arguments, as the dispatcher passes them."""
    if call.serves(params, rest[call.GROUP_SIZE["fused_trial"] - 1]):
        step_ops.fused_trial(ENGINE, params, *rest)
    else:
        otherwise(params, *rest)

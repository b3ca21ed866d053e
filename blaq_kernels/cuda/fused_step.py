"""torch.ops.blaq.fused_step: stage 2 of BLAQ (AAAI 2024) for a list of weights, Eqs. 9, 10, 8,
7."""

from functools import partial

from .. import step_ops
from .fused import ENGINE

fused_step = partial(step_ops.fused_step, ENGINE)

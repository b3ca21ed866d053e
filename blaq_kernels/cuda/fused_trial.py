"""torch.ops.blaq.fused_trial: stage 1 of BLAQ (AAAI 2024) for a list of weights, Eqs. 6 and 5."""

from functools import partial

from .. import step_ops
from .fused import ENGINE

fused_trial = partial(step_ops.fused_trial, ENGINE)

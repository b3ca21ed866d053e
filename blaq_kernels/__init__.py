"""Ops of BLAQ: loss-aware training with 1- to 4-bit weights and inference from packed ones.

Importing this package defines ``torch.ops.blaq``. It imports torch only and knows no optimizer and
no module: those are in ``blaq``.
"""

from . import autograd, dispatch, schemas
from .dispatch import (
    cpu_capabilities,
    cpu_capability,
    has_int8,
    int8_kernels,
    reads_repacked,
    serving,
    set_cpu_capability,
)

__all__ = ["cpu_capabilities", "cpu_capability", "has_int8", "int8_kernels",
           "reads_repacked", "serving", "set_cpu_capability"]

__version__ = "0.1.0"

dispatch.requested_backend()  # a bad value ends here, before anything is registered
schemas.define()
dispatch.register()
autograd.register()

"""CUDA C++ kernels of the training ops, for groups too long for a Triton program: the op ``name``
is the function ``name`` of the module ``name``. ``csrc/cuda/step_kernel.h`` says how they run.

Groups of at most 8192 weights stay with Triton's kernels, which hold them in registers.
"""

from __future__ import annotations

OPS = ("solve", "fused_trial", "fused_step")

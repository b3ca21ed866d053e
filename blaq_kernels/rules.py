"""What every argument rule of ``torch.ops.blaq`` is made of: its words, its dtypes, and rules that ops
share. ``training_rules.py`` and ``packed_rules.py`` have the ops'.

They serve fakes, the reference and Triton; ``csrc/checks.h`` and its like have the same for C++, and
``tests/test_errors.py`` holds the two to the same words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import scale_shape

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*PARAM_DTYPES, torch.float64)
METHODS = ("alternating", "exact")
ACCURACIES = ("exact", "high", "fast")


def require(condition: bool, op: str, argument: str, rule: str, value: object) -> None:
    """Raise ``blaq.<op>: <argument> must <rule>, got <value>`` unless the condition holds."""
    if not condition:
        raise ValueError(f"blaq.{op}: {argument} must {rule}, got {value}")


def check_dtype(op: str, name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
    require(x.dtype in allowed, op, name, f"be {names}", str(x.dtype).removeprefix("torch."))


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    require(x.is_contiguous(), op, name, "be contiguous", f"strides {list(x.stride())}")


def check_same_shape(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(x.shape == other.shape, op, name, f"have the shape of {other_name} {list(other.shape)}",
            list(x.shape))


def check_same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(x.device == other.device, op, name, f"be on {other_name}'s device {other.device}",
            x.device)


def check_like(op: str, name: str, x: Tensor, other_name: str, other: Tensor,
          dtypes: Sequence[torch.dtype]) -> None:
    check_dtype(op, name, x, dtypes)
    check_same_shape(op, name, x, other_name, other)
    check_same_device(op, name, x, other_name, other)
    check_contiguous(op, name, x)


def check_group_size(op: str, group_size: int) -> None:
    require(group_size >= -1, op, "group_size", "be 0, -1 or positive", group_size)


def check_scale(op: str, name: str, scale: Tensor, weight_shape: Sequence[int], group_size: int,
           dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    check_dtype(op, name, scale, dtypes)
    expected = scale_shape(weight_shape, group_size)
    require(tuple(scale.shape) == expected, op, name, f"have shape {list(expected)}",
            list(scale.shape))
    require(scale.device == device, op, name, f"be on device {device}", scale.device)
    check_contiguous(op, name, scale)


def is_real(x: Tensor) -> bool:
    """Whether the tensor has memory to look at: neither a fake nor on the meta device."""
    return not isinstance(x, torch._subclasses.FakeTensor) and x.device.type != "meta"

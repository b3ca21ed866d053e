"""Cases of 1-bit inputs and weights: binary ops against torch's layers on the same signs in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blaq_kernels.reference import dequantize, signs

from .case import BLAQ, Case, Table, Variant
from .packed import LINEAR_BFLOAT16, LINEAR_FLOAT32, make_weight

__all__ = ["TABLES"]

_ops = torch.ops.blaq


def _variants(calls: dict[str, Callable[[], Tensor]], exact: Tensor, nbytes: int) -> list[Variant]:
    """Variants with their error; the least traffic is of the first."""
    with torch.no_grad():
        errors = [float((call().double() - exact).norm() / exact.norm()) for call in calls.values()]
    return [Variant(name, torch.inference_mode()(call), nbytes if name == BLAQ else 0, error)
            for (name, call), error in zip(calls.items(), errors, strict=True)]


def _repack(case: Case, full: bool) -> list[Variant]:
    n, k = case.size
    _, qweight, _ = make_weight(replace(case, bits=1), n, k)
    call = _ops.binary_repack.default
    return [Variant(BLAQ, lambda: call(qweight, k, 1, 1), 2 * qweight.nbytes),
            Variant("qweight.clone()", qweight.clone, 2 * qweight.nbytes)]


def _linear(case: Case, full: bool) -> list[Variant]:
    m, n, k = case.size
    codes, qweight, scale = make_weight(replace(case, bits=1), n, k)
    weight = dequantize(codes, scale, (1.0,), case.group_size)
    x, bias = torch.randn(m, k), torch.randn(n)
    exact = F.linear(signs(x).double(), weight.double(), bias.double())
    own, own_bias = x.to(case.torch_dtype), bias.to(case.torch_dtype)
    repacked = _ops.binary_repack.default(qweight, k, 1, 1)

    def binary(repacked: Tensor | None) -> Callable[[], Tensor]:
        return lambda: _ops.binary_linear.default(own, qweight, scale, own_bias, case.group_size,
                                                  repacked)

    wide = signs(x), weight, bias
    narrow = [t.bfloat16() for t in wide]
    calls = {BLAQ: binary(repacked), "blaq, repacked by the call": binary(None),
             LINEAR_FLOAT32: lambda: F.linear(*wide), LINEAR_BFLOAT16: lambda: F.linear(*narrow)}
    return _variants(calls, exact, qweight.nbytes + m * (k + n) * own.element_size())


def _linear_operations(case: Case) -> int:
    m, n, k = case.size
    return 2 * m * n * k


_AXES: dict[str, Any] = {"dtype": ("float32",)}

TABLES = {table.op: table for table in (
    Table("binary_repack", ("N", "K"), ((1024, 1024), (4096, 4096)), _repack),
    Table("binary_linear", ("M", "N", "K"), tuple((m, 4096, 4096) for m in (1, 16, 256)), _linear,
          _linear_operations, _AXES),
)}

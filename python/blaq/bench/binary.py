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
from .packed import LINEAR_BFLOAT16, LINEAR_FLOAT32, copies, make_weight

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
    return [Variant(BLAQ, lambda: call(qweight, k, 1, 1), 2 * qweight.nbytes), *copies(qweight)]


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


def _conv2d(case: Case, full: bool) -> list[Variant]:
    batch, channels, side, out = case.size
    k = channels * 9
    codes, qweight, scale = make_weight(replace(case, bits=1), out, k)
    weight = dequantize(codes, scale, (1.0,), case.group_size).reshape(out, channels, 3, 3)
    x, bias = torch.randn(batch, channels, side, side), torch.randn(out)
    exact = F.conv2d(signs(x).double(), weight.double(), bias.double(), padding=1)
    own, own_bias = x.to(case.torch_dtype), bias.to(case.torch_dtype)
    repacked = _ops.binary_repack.default(qweight, k, 9, 1)

    def binary(input: Tensor, repacked: Tensor | None) -> Callable[[], Tensor]:
        return lambda: _ops.binary_conv2d.default(input, qweight, scale, own_bias, case.group_size,
                                                  (3, 3), (1, 1), (1, 1), (1, 1), 1, repacked)

    def torch_conv(layout: torch.memory_format) -> Callable[[], Tensor]:
        wide = signs(x).to(memory_format=layout), weight.to(memory_format=layout), bias
        return lambda: F.conv2d(*wide, padding=1)

    last = torch.channels_last
    calls = {BLAQ: binary(own, repacked), "blaq, repacked by the call": binary(own, None),
             "blaq, channels_last": binary(own.to(memory_format=last), repacked),
             "F.conv2d float32": torch_conv(torch.contiguous_format),
             "F.conv2d float32, channels_last": torch_conv(last)}
    return _variants(calls, exact, qweight.nbytes + (x.numel() + exact.numel()) * own.element_size())


def _conv2d_operations(case: Case) -> int:
    batch, channels, side, out = case.size
    return 2 * batch * side * side * out * channels * 9


def _linear_operations(case: Case) -> int:
    m, n, k = case.size
    return 2 * m * n * k


_AXES: dict[str, Any] = {"dtype": ("float32",)}

TABLES = {table.op: table for table in (
    Table("binary_repack", ("N", "K"), ((1024, 1024), (4096, 4096)), _repack),
    Table("binary_linear", ("M", "N", "K"), tuple((m, 4096, 4096) for m in (1, 16, 256)), _linear,
          _linear_operations, _AXES),
    # The 3x3 convolutions of ResNet-18 at 224 pixels, stride 1, padding 1.
    Table("binary_conv2d", ("BATCH", "CHANNELS", "SIDE", "OUT"),
          ((1, 64, 56, 64), (1, 128, 28, 128), (1, 256, 14, 256), (1, 512, 7, 512)), _conv2d,
          _conv2d_operations, _AXES),
)}

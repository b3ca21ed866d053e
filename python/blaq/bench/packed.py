"""Cases of inference: packing against numpy, packed layers against torch's own layers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blaq_kernels
from blaq_kernels.reference import dequantize

from .case import BLAQ, Case, Table, Variant
from .peers import BLOCK, PEERS

__all__ = ["LINEAR_BFLOAT16", "LINEAR_FLOAT32", "TABLES", "copies", "make_weight", "relative_error",
           "torch_linears"]

LINEAR_FLOAT32 = "F.linear float32"
LINEAR_BFLOAT16 = "F.linear bfloat16"
_ops = torch.ops.blaq


def make_weight(case: Case, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[n, k]``, their bit planes and scale, of normal weights."""
    latent = torch.randn(n, k)
    codes, scale = _ops.solve(latent, torch.ones_like(latent), None, case.levels,
                              case.group_size, 5, "alternating")
    return codes, _ops.pack(codes, case.bits), scale


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.to(torch.float64) - exact).norm() / exact.norm())


def _repack(case: Case, full: bool) -> list[Variant]:
    n, k = case.size
    _, qweight, _ = make_weight(case, n, k)
    op = _ops.repack.default
    return [Variant(BLAQ, lambda: op(qweight), 2 * qweight.nbytes), *copies(qweight)]


def copies(qweight: Tensor) -> list[Variant]:
    """As many bytes: only read, by a sum; copied; from a file that the system's page cache holds."""
    words = qweight.flatten()[:qweight.numel() // 8 * 8].view(torch.int64)
    file = tempfile.TemporaryFile(buffering=0)
    file.write(qweight.numpy().tobytes())
    target = np.empty(qweight.nbytes, np.uint8)

    def read() -> None:
        file.seek(0)
        file.readinto(target)

    return [Variant("read", words.sum, qweight.nbytes),
            Variant("qweight.clone()", qweight.clone, 2 * qweight.nbytes),
            Variant("read from a cached file", read, 2 * qweight.nbytes)]


def _unrepack(case: Case, full: bool) -> list[Variant]:
    n, k = case.size
    _, qweight, _ = make_weight(case, n, k)
    repacked, op = _ops.repack.default(qweight), _ops.unrepack.default
    return [Variant(BLAQ, lambda: op(repacked, case.bits, n, k), 2 * qweight.nbytes), *copies(qweight)]


def _conv_repack(case: Case, full: bool) -> list[Variant]:
    channels, out = case.size
    _, qweight, _ = make_weight(case, out, channels * 9)
    op = _ops.conv_repack.default
    return [Variant(BLAQ, lambda: op(qweight, channels * 9, 9, 1), 2 * qweight.nbytes),
            *copies(qweight)]


def _pack(case: Case, full: bool) -> list[Variant]:
    codes, qweight, _ = make_weight(case, *case.size)
    array, bits, nbytes = codes.numpy(), case.bits or 1, codes.nbytes + qweight.nbytes

    def numpy() -> np.ndarray:
        planes = [array & (1 << b) for b in range(bits)] if bits > 1 else [array]
        return np.stack([np.packbits(plane, axis=1, bitorder="little") for plane in planes])

    return [Variant(BLAQ, lambda: _ops.pack.default(codes, bits), nbytes),
            Variant("numpy.packbits", numpy)]


def _unpack(case: Case, full: bool) -> list[Variant]:
    n, k = case.size
    _, qweight, scale = make_weight(case, n, k)
    arguments = (qweight, scale, case.levels, case.group_size, k, case.torch_dtype)
    nbytes = qweight.nbytes + _ops.unpack.default(*arguments).nbytes
    variants = [Variant(BLAQ, lambda: _ops.unpack.default(*arguments), nbytes)]
    if case.group_size == 0 and case.dtype == "float32":
        planes = qweight.numpy()
        values = np.array([sign * level for sign in (1, -1) for level in case.levels],
                          np.float32) * scale.numpy()

        def numpy() -> np.ndarray:
            codes = np.unpackbits(planes[0], axis=1, count=k, bitorder="little")
            for b in range(1, len(planes)):
                codes |= np.unpackbits(planes[b], axis=1, count=k, bitorder="little") << b
            return np.take(values, codes)

        variants.append(Variant("numpy.unpackbits, take", numpy))
    return variants


def _fake_quantize(case: Case, full: bool) -> list[Variant]:
    latent = torch.randn(case.size)
    _, scale = _ops.solve(latent, torch.ones_like(latent), None, case.levels, case.group_size, 5,
                          "alternating")
    latent = latent.to(case.torch_dtype)
    nbytes, half = 2 * latent.nbytes, 2 ** ((case.bits or 1) - 1)

    variants = [Variant(BLAQ, lambda: _ops.fake_quantize.default(latent, scale, case.levels,
                                                                 case.group_size), nbytes)]
    if case.group_size == 0:
        value = float(scale)
        variants.append(Variant(
            "torch.fake_quantize_per_tensor_affine",
            lambda: torch.fake_quantize_per_tensor_affine(latent, value, 0, -half, half - 1),
            nbytes))
    elif case.group_size == -1:
        flat, zero = scale.flatten(), torch.zeros(len(scale), dtype=torch.int32)
        variants.append(Variant(
            "torch.fake_quantize_per_channel_affine",
            lambda: torch.fake_quantize_per_channel_affine(latent, flat, zero, 0, -half, half - 1),
            nbytes))
    return variants


def torch_linears(weight: Tensor, bias: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's ways to multiply by this weight, all through public names."""
    n, k = weight.shape
    layer = nn.Linear(k, n).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    narrow = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    calls: dict[str, Callable[[], Tensor]] = {
        LINEAR_FLOAT32: lambda: F.linear(x, weight, bias),
        LINEAR_BFLOAT16: lambda: F.linear(*narrow)}
    with warnings.catch_warnings():  # torch warns of both as old; it has no newer public ones
        warnings.simplefilter("ignore")
        if torch.backends.mkldnn.is_available():
            from torch.utils import mkldnn

            wide, half = mkldnn.to_mkldnn(layer), mkldnn.to_mkldnn(layer, torch.bfloat16)
            calls["mkldnn float32, prepacked"] = lambda: wide(x)
            calls["mkldnn bfloat16, prepacked"] = lambda: half(narrow[0])
        engines = torch.backends.quantized.supported_engines
        if hasattr(torch.ao, "quantization") and "x86" in engines:
            int8 = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
            calls["int8, dynamic"] = lambda: int8(x)
    return calls


def _on(capability: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        before = blaq_kernels.cpu_capability()
        blaq_kernels.set_cpu_capability(capability)
        try:
            return call()
        finally:
            blaq_kernels.set_cpu_capability(before)

    return run


def _lesser_kernels() -> dict[str, str]:
    """The capability of each set of 8-bit kernels that this processor can run, but for those in use."""
    own, before, found = blaq_kernels.int8_kernels(), blaq_kernels.cpu_capability(), {}
    for capability in blaq_kernels.cpu_capabilities():
        blaq_kernels.set_cpu_capability(capability)
        found.setdefault(blaq_kernels.int8_kernels(), capability)
    if before != "none":
        blaq_kernels.set_cpu_capability(before)
    return {kernels: name for kernels, name in found.items() if kernels not in ("", own)}


def _packed_linear(case: Case, full: bool) -> list[Variant]:
    m, n, k = case.size
    codes, qweight, scale = make_weight(case, n, k)
    weight = dequantize(codes, scale, case.levels, case.group_size)
    x, bias = torch.randn(m, k), torch.randn(n)
    exact = F.linear(x.double(), weight.double(), bias.double())
    own = x.to(case.torch_dtype), bias.to(case.torch_dtype)
    repacked = _ops.repack.default(qweight)

    def packed(accuracy: str) -> Callable[[], Tensor]:
        return lambda: _ops.packed_linear.default(own[0], qweight, scale, own[1], case.levels,
                                                  case.group_size, repacked, accuracy)

    calls = {BLAQ: packed("high"), "blaq, fast": packed("fast"), "blaq, exact": packed("exact")}
    for kernels, capability in _lesser_kernels().items():
        calls |= {f"blaq, high, {kernels}": _on(capability, packed("high")),
                  f"blaq, fast, {kernels}": _on(capability, packed("fast"))}
    calls |= torch_linears(weight, bias, x)
    weight_bytes = {BLAQ: qweight.nbytes + scale.nbytes, LINEAR_FLOAT32: weight.nbytes,
                    LINEAR_BFLOAT16: weight.nbytes // 2}
    with torch.no_grad():
        results = {name: call() for name, call in calls.items()}
    variants = [Variant(name, torch.inference_mode()(call),
                        _traffic(weight_bytes.get(name), results[name], k),
                        relative_error(results[name], exact)) for name, call in calls.items()]
    for name, build in PEERS.items() if k % BLOCK == 0 else ():
        call, other = build(x, bias)
        variants.append(Variant(name, call, error=relative_error(
            call(), F.linear(x.double(), other.double(), bias.double()))))
    return variants


def _traffic(weight_bytes: int | None, result: Tensor, k: int) -> int:
    if weight_bytes is None:
        return 0
    m, n = result.shape
    return weight_bytes + m * (k + n) * result.element_size()


def _packed_conv2d(case: Case, full: bool) -> list[Variant]:
    batch, channels, side, out = case.size
    codes, qweight, scale = make_weight(case, out, channels * 9)
    weight = dequantize(codes, scale, case.levels, case.group_size)
    weight = weight.reshape(out, channels, 3, 3)
    x, bias = torch.randn(batch, channels, side, side), torch.randn(out)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    last = torch.channels_last
    own, own_bias = x.to(case.torch_dtype), bias.to(case.torch_dtype)

    repacked = (_ops.conv_repack.default(qweight, channels * 9, 9, 1) if case.group_size <= 0
                else _ops.repack.default(qweight))

    def packed(input: Tensor, accuracy: str = "high") -> Callable[[], Tensor]:
        return lambda: _ops.packed_conv2d.default(
            input, qweight, scale, own_bias, case.levels, case.group_size, (3, 3), (1, 1), (1, 1),
            (1, 1), 1, repacked, accuracy)

    def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
        return lambda: F.conv2d(x, weight, bias, padding=1)

    x_last, weight_last = x.to(memory_format=last), weight.to(memory_format=last)
    calls = {BLAQ: packed(own), "blaq, channels_last": packed(own.to(memory_format=last)),
             "blaq, fast": packed(own, "fast"),
             "blaq, fast, channels_last": packed(own.to(memory_format=last), "fast"),
             "blaq, exact": packed(own, "exact"),
             "F.conv2d float32": torch_conv(x, weight, bias),
             "F.conv2d float32, channels_last": torch_conv(x_last, weight_last, bias),
             "F.conv2d bfloat16, channels_last": torch_conv(
                 x_last.bfloat16(), weight_last.bfloat16(), bias.bfloat16())}
    activations = (x.numel() + exact.numel()) * own.element_size()
    nbytes = qweight.nbytes + scale.nbytes + activations
    with torch.no_grad():
        return [Variant(name, torch.inference_mode()(call), nbytes if name == BLAQ else 0,
                        relative_error(call(), exact))
                for name, call in calls.items()]


def _linear_operations(case: Case) -> int:
    m, n, k = case.size
    return 2 * m * n * k


def _conv2d_operations(case: Case) -> int:
    batch, channels, side, out = case.size
    return 2 * batch * side * side * out * channels * 9


_WEIGHT = {"bits": (1, 2, 4), "group_size": (0,)}
_MATRIX: dict[str, Any] = {"dims": ("N", "K"), "sizes": ((1024, 1024), (4096, 4096))}

TABLES = {table.op: table for table in (
    Table("fake_quantize", build=_fake_quantize, axes={"dtype": ("float32",), **_WEIGHT},
          **_MATRIX),
    Table("pack", build=_pack, axes={"bits": (1, 2, 4)}, **_MATRIX),
    Table("unpack", build=_unpack, axes={"dtype": ("float32",), **_WEIGHT}, **_MATRIX),
    Table("repack", build=_repack, axes={"bits": (1, 2, 4)}, **_MATRIX),
    Table("unrepack", build=_unrepack, axes={"bits": (1, 2, 4)}, **_MATRIX),
    Table("packed_linear", ("M", "N", "K"),
          tuple((m, 4096, 4096) for m in (1, 4, 16, 64, 256)), _packed_linear, _linear_operations,
          {"dtype": ("float32",), **_WEIGHT}),
    Table("conv_repack", ("CHANNELS", "OUT"), ((64, 64), (512, 512)), _conv_repack,
          axes={"bits": (1, 2, 4)}),
    # The 3x3 convolutions of ResNet-18 at 224 pixels, stride 1, padding 1.
    Table("packed_conv2d", ("BATCH", "CHANNELS", "SIDE", "OUT"),
          tuple((batch, channels, side, channels) for batch in (1, 16)
                for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
          _packed_conv2d, _conv2d_operations, {"dtype": ("float32",), **_WEIGHT}),
)}

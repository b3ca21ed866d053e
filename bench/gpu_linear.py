"""packed_linear against torch's own product of the unpacked weight, and against peers that are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from gpu_timing import Variant, copies
from torch import Tensor

import blaq_kernels
from blaq_kernels import cuda
from blaq_kernels.codebook import levels_of
from blaq_kernels.cuda.packed_linear import INT8_MAJORS, MAX_ROWS

BATCHES = (1, 16, 64, 256, 1024, 4096)
SQUARE = ((8192, 8192),)
LLAMA = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336))
PEERS = ("bitsandbytes", "torchao", "gemlite")

Case = tuple[str, int, int, int, int, torch.dtype]


def cases() -> Iterator[Case]:
    """Name, M, N, K, bits, dtype; the most telling first, since time may end."""
    for shapes, dtype, widths in ((SQUARE, torch.bfloat16, (1, 2, 4)),
                                  (LLAMA, torch.bfloat16, (1, 4)), (SQUARE, torch.float16, (1, 2, 4))):
        for n, k in shapes:
            for m in BATCHES:
                for bits in widths:
                    name = f"{n}x{k} M={m} W{bits} {str(dtype).removeprefix('torch.')}"
                    yield name, m, n, k, bits, dtype


def random_weight(n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    """Planes of random bits and a scale for each row. The bits that fill up a row are none: K % 8 is 0."""
    qweight = torch.randint(0, 256, (bits, n, k // 8), dtype=torch.uint8, device="cuda")
    return qweight, torch.rand(n, 1, device="cuda") * 0.05 + 0.01


def build(case: Case) -> tuple[dict[str, Variant], dict[str, object]]:
    """The variants of a case; the error of ours, norm over norm, against float64; what served it."""
    _, m, n, k, bits, dtype = case
    levels = levels_of("pow2", bits)
    op, size = torch.ops.blaq.packed_linear.default, torch.empty(0, dtype=dtype).element_size()
    x = torch.randn(m, k, device="cuda").to(dtype)
    activations = m * (k + n) * size
    operations = 2.0 * m * n * k
    packed_bytes = bits * n * k // 8 + 4 * n
    weights = [random_weight(n, k, bits) for _ in range(copies(packed_bytes))]
    own = [lambda w=w: op(x, w[0], w[1], None, levels, -1) for w in weights]
    dense = [torch.ops.blaq.unpack.default(*weights[0], levels, -1, k, dtype)]
    dense += [dense[0].clone() for _ in range(copies(dense[0].nbytes, 8) - 1)]
    torch_calls = [lambda w=w: F.linear(x, w) for w in dense]
    rows = slice(0, min(m, 16))
    exact = x[rows].double() @ dense[0].double().t()
    error = ((own[0]()[rows].double() - exact).norm() / exact.norm()).item()
    variants = {"blaq": Variant(own, packed_bytes + activations, operations),
                "torch": Variant(torch_calls, dense[0].nbytes + activations, operations)}
    if m <= MAX_ROWS and not cuda.unavailable() and cuda.covers(x.device):
        variants["blaq CUDA C++"] = Variant(cuda_calls(x, weights, levels), packed_bytes + activations,
                                            operations)
    extra: dict[str, object] = {"error": error, "kernel": kernel_of(m, n, k, levels, x)}
    if m > MAX_ROWS and not cuda.unavailable() and serves_int8(x.device):
        calls = int8_calls(x, weights, levels)
        variants["blaq CUDA C++, 8 bits"] = Variant(calls, packed_bytes + activations, operations)
        error = ((calls[0]()[rows].double() - exact).norm() / exact.norm()).item()
        extra["error in 8 bits"] = error
    if bits == 4:
        for name in PEERS:
            if call := peer(name, x, dense[0]):
                variants[name] = Variant([call], captured=False)
    return variants, extra


def cuda_calls(x: Tensor, weights: list[tuple[Tensor, Tensor]],
               levels: Sequence[float]) -> list[Callable[[], Tensor]]:
    """The product by the kernels of csrc/cuda, whatever serves ``torch.ops.blaq`` here."""
    cuda.load()
    op = torch.ops.blaq_cuda.packed_linear.default
    repacked = [torch.ops.blaq_cuda.repack.default(qweight) for qweight, _ in weights]
    return [lambda w=w, r=r: op(x, w[0], w[1], None, levels, -1, r)
            for w, r in zip(weights, repacked, strict=True)]


def serves_int8(device: torch.device) -> bool:
    return cuda.covers(device) and cuda.major(device) in INT8_MAJORS


def int8_calls(x: Tensor, weights: list[tuple[Tensor, Tensor]],
               levels: Sequence[float]) -> list[Callable[[], Tensor]]:
    """The product with accuracy ``fast``: inputs rounded, and multiplied by tensor cores."""
    cuda.load()
    op = torch.ops.blaq_cuda.packed_int8.default
    return [lambda w=w: op(x, w[0], w[1], None, levels, -1, None, "fast") for w in weights]


def kernel_of(m: int, n: int, k: int, levels: Sequence[float], x: Tensor) -> str:
    """Which way a product with a scale for each row goes, in words."""
    if blaq_kernels.serving("cuda")["packed_linear"] != "Triton":
        return "reference"
    from blaq_kernels.triton import decode, linear_plans

    plan = linear_plans.plan_for(m, n, k, -1, x.dtype, decode.kind_of(levels) != decode.TABLE,
                                 linear_plans.target_of(x))
    if plan is None:
        return "unpack, then torch"
    return f"Triton {plan.rows}x{plan.cols}x{8 * plan.bytes}, {plan.splits} parts of K"


def peer(name: str, x: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """A 4-bit product by another library, with its own kind of weight; None where it is not installed
    or does not take this. Same work, other numbers. It is timed eagerly and on warm data."""
    try:
        library = importlib.import_module(name)
        n, k = weight.shape
        if name == "bitsandbytes":
            layer = library.nn.Linear4bit(k, n, bias=False, compute_dtype=x.dtype)
            layer.weight.data = weight.clone()
            layer = layer.cuda()
        elif name == "torchao":
            quantization = importlib.import_module("torchao.quantization")
            layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=x.dtype)
            quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(group_size=128))
        else:
            helper = importlib.import_module("gemlite.helper")
            layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=x.dtype)
            layer = helper.A16W4_HQQ_INT(device="cuda", dtype=x.dtype).from_linear(layer)
        with torch.no_grad():
            layer(x)
        return lambda: layer(x)
    except Exception as error:  # of a library that is not ours: what it cannot do is not our failure
        if not isinstance(error, ModuleNotFoundError):
            print(f"{name}: {type(error).__name__}: {error}")
        return None

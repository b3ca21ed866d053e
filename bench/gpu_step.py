"""The fused steps against torch's fused AdamW, and against the compiled reference; where one scale
serves a tensor, Triton's against those in CUDA C++ that ``BLAQ_BACKEND=cuda`` chooses."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from gpu_timing import Variant
from torch import Tensor, nn

from blaq_kernels import cuda, reference, step_ops
from blaq_kernels.codebook import levels_of
from blaq_kernels.dispatch import requested_backend

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "max_iter": 5,
         "method": "alternating"}
MILLION = 1_000_000
Shapes = Sequence[tuple[int, ...]]
BLOCK = 4096  # inputs of a row of the large matrices


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's 161 parameters."""
    shapes: list[tuple[int, ...]] = []

    def conv(out: int, channels: int, side: int) -> None:
        shapes.extend([(out, channels, side, side), (out,), (out,)])  # and its batch norm

    conv(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(width, channels, 1)
            conv(width, width, 3)
            conv(4 * width, width, 1)
            if block == 0:
                conv(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def matrix(parameters: int) -> list[tuple[int, ...]]:
    """One matrix of about this many parameters."""
    return [(parameters // BLOCK, BLOCK)]


SIZES = {"10M": matrix(10 * MILLION), "ResNet-50": resnet50(), "100M": matrix(100 * MILLION),
         "1B": matrix(1000 * MILLION)}


def state(shapes: Shapes, group_size: int) -> dict[str, list[Tensor]]:
    """Lists as training leaves them, in float32."""
    def normal(shape: tuple[int, ...], size: float) -> Tensor:
        return torch.randn(shape, device="cuda").mul_(size)

    lists = {"latents": [normal(s, 0.3) for s in shapes],
             **{name: [normal(s, 1e-2) for s in shapes] for name in ("params", "grads", "trial_grads")},
             "exp_avgs": [normal(s, 1e-3) for s in shapes],
             "exp_avg_sqs": [normal(s, 1e-2).square_() for s in shapes]}
    lists["scales"] = [torch.full(reference.scale_shape(s, group_size), 0.2, device="cuda")
                       for s in shapes]
    return lists


def _calls(trial: Callable[..., None], step: Callable[..., None], lists: dict[str, list[Tensor]],
           bits: int, group_size: int) -> dict[str, Callable[[], None]]:
    tail = {**HYPER, "levels": levels_of("pow2", bits), "group_size": group_size,
            "lr": torch.tensor(1e-3, device="cuda"), "step": torch.tensor(100.0, device="cuda")}
    without = {name: tensors for name, tensors in lists.items() if name != "trial_grads"}
    return {"fused_trial": partial(trial, **without, **tail),
            "fused_step": partial(step, **lists, **tail, backtrack=torch.tensor(0.6, device="cuda")),
            "fused_step, LAQ": partial(step, **without, trial_grads=[], **tail,
                                       backtrack=torch.tensor(1.0, device="cuda"))}


def build(shapes: Shapes, bits: int, group_size: int) -> dict[str, Variant]:
    """Least traffic of a parameter, in bytes: the trial reads a gradient, a latent weight and two
    moments and writes a parameter; the step reads another gradient and writes all that it read but
    gradients. One scale for a whole tensor needs a second reading of the latent weight."""
    count = sum(math.prod(s) for s in shapes)
    more = 4 if group_size == 0 and bits > 1 else 0
    ops = torch.ops.blaq
    lists = state(shapes, group_size)
    calls = _calls(ops.fused_trial.default, ops.fused_step.default, lists, bits, group_size)
    each = {"fused_trial": 20 + more, "fused_step": 36 + more, "fused_step, LAQ": 32 + more}
    if group_size == 0 and not cuda.unavailable() and requested_backend() != "cuda":
        cuda.load()
        engine = importlib.import_module("blaq_kernels.cuda.fused").ENGINE
        own = _calls(partial(step_ops.fused_trial, engine), partial(step_ops.fused_step, engine), lists,
                     bits, group_size)
        calls |= {f"{name}, CUDA C++": call for name, call in own.items()}
    return {name: Variant([call], count * each[name.removesuffix(", CUDA C++")])
            for name, call in calls.items()}


def adamw(shapes: Shapes) -> dict[str, Variant]:
    params = [nn.Parameter(torch.randn(s, device="cuda")) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True, capturable=True)
    count = sum(param.numel() for param in params)
    return {"AdamW(fused=True)": Variant([optimizer.step], 28 * count)}


def compiled(shapes: Shapes, bits: int, group_size: int) -> dict[str, Variant]:
    """The reference under torch.compile; it reads scalars on the host, so no graph holds it."""
    calls = _calls(torch.compile(reference.fused_trial), torch.compile(reference.fused_step),
                   state(shapes, group_size), bits, group_size)
    return {f"{name}, reference compiled": Variant([calls[name]], captured=False)
            for name in ("fused_trial", "fused_step")}

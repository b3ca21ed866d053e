"""torch.ops.blaq.packed_linear: input @ weightᵀ + bias, the weight read from its bit planes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..packed_rules import check_packed_linear
from ..reference import scale_shape
from . import launch
from .contract_case import Case
from .decode import POWERS, TABLE, is_exact, kind_of
from .launch import Launch
from .linear_plans import BLACKWELL, DECODE, FEW, HOPPER, OTHERS, Plan, plan_for, target_of
from .packed_matmul import (
    CHECKED,
    ROW,
    SUM_BLOCK,
    TILE,
    WEIGHT,
    interleave_kernel,
    packed_matmul_kernel,
    sum_splits_kernel,
)
from .unpack import unpack_weight
from .workspace import splits_of


def packed_linear(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                  levels: Sequence[float], group_size: int, repacked: Tensor | None = None,
                  accuracy: str = "high") -> Tensor:
    """``input @ weight.T + bias`` with ``weight = round(level × scale)`` to the input's dtype.

    Args:
        input: ``[..., K]`` float32, bfloat16, float16 or float64, any layout.
        qweight: uint8 ``[bits, N, ceil(K/8)]``, contiguous (docs/format.md).
        scale: float32 (float64 for float64 input) ``[1]``, ``[N, 1]`` or ``[N, ceil(K/g)]``.
        bias: ``[N]`` of the input's dtype, or None.
        repacked, accuracy: for CPU kernels; every GPU kernel is exact.

    Returns:
        ``[..., N]`` of the input's dtype: sums in float32, rounded once.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
    """
    # All that the rules and the plan look at: the same facts need no second look, which would take
    # longer than the launch.
    key = (input.shape, input.stride(), input.dtype, input.device, qweight.shape, qweight.dtype,
           qweight.device, qweight.is_contiguous(), scale.shape, scale.dtype, scale.device,
           scale.is_contiguous(), None if bias is None else _facts(bias), tuple(levels), group_size,
           accuracy, None if repacked is None else _facts(repacked))
    call = _calls.get(key)
    if call is None:
        check_packed_linear(input, qweight, scale, bias, levels, group_size, repacked, accuracy)
        launch.check_device("packed_linear", "input", input)
        if len(_calls) >= MOST_PLANS:
            _calls.clear()
        call = _calls[key] = _prepare(input, qweight, scale, bias, tuple(levels), group_size)
    with launch.on_device_of(input):
        if call.product is None:
            if not call.decodes:
                return input.new_empty(call.shape)
            weight = unpack_weight(qweight, scale, levels, group_size, input.shape[-1], input.dtype)
            return torch.nn.functional.linear(input, weight, bias)
        out = input.new_empty(call.shape)
        x = input if call.rows is None else input.reshape(call.rows).contiguous()
        call.product(x, qweight, scale, bias, out)
    return out


class _Call(NamedTuple):
    """What is kept of a call whose arguments have passed the rules.

    Attributes:
        shape: of the output.
        rows: ``[m, k]`` that inputs are copied to; None where their rows lie evenly as they are.
        product: None where the weight is decoded, or where there is no output.
    """

    shape: tuple[int, ...]
    rows: tuple[int, int] | None
    product: Product | None
    decodes: bool


MOST_PLANS = 4096
_calls: dict[object, _Call] = {}


def _facts(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.dtype, x.device, x.is_contiguous()


def _prepare(input: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
             levels: tuple[float, ...], group_size: int) -> _Call:
    m, k, n = math.prod(input.shape[:-1]), input.shape[-1], qweight.shape[1]
    shape = (*input.shape[:-1], n)
    plan = plan_for(m, n, k, group_size, input.dtype, kind_of(levels) != TABLE, target_of(input))
    if plan is None or m * n == 0:
        return _Call(shape, None, None, decodes=m * n > 0)
    x = _even(input.reshape(m, k))
    rows = None if x.data_ptr() == input.data_ptr() else (m, k)
    return _Call(shape, rows, product_of(x, qweight, scale, bias, levels, group_size, plan), False)


def _even(x: Tensor) -> Tensor:
    return x.contiguous() if x.stride(1) != 1 and x.shape[1] > 1 else x


@functools.cache
def scale_mode(levels: tuple[float, ...], group_size: int, dtype: torch.dtype, plan: Plan) -> str:
    """When the scales come in."""
    exact = is_exact(levels, dtype)
    if group_size > 0:
        by_tile = exact and plan.sums_by_tile and group_size % (8 * plan.bytes) == 0
        return TILE if by_tile else WEIGHT
    if exact:
        return ROW
    return CHECKED if kind_of(levels) == POWERS else WEIGHT


def matmul(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
           levels: tuple[float, ...], group_size: int, out: Tensor, plan: Plan) -> None:
    """``x`` ``[m, k]`` times the weight, into ``out`` ``[m, n]``, contiguous."""
    x = _even(x)
    product_of(x, qweight, scale, bias, levels, group_size, plan)(x, qweight, scale, bias, out)


def product_of(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
               levels: tuple[float, ...], group_size: int, plan: Plan) -> Product:
    """The launches for arguments of these types."""
    m, k = x.shape
    return _launches(m, qweight.shape, k, x.stride(0), x.dtype, x.device, scale.dtype, bias is None,
                     levels, group_size, plan)


class Product(NamedTuple):
    """What lays inputs ``[m, k]`` out, multiplies, and adds the parts where k is split.

    Attributes:
        add: None where the programs that multiply add their parts up.
        laid_out: shape of the inputs as ``interleave`` leaves them.
        parts, tickets: how many.
    """

    interleave: Launch | None
    multiply: Launch
    add: Launch | None
    laid_out: tuple[int, int]
    parts: int
    tickets: int

    def __call__(self, x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None,
                 out: Tensor) -> None:
        if self.interleave:
            source, x = x, x.new_empty(self.laid_out)
            self.interleave(source, x)
        if self.add:
            parts = out.new_empty(self.parts, dtype=torch.float32)
            self.multiply(x, qweight, scale, None, out, parts, None)
            self.add(parts, bias, out)
        else:
            parts, tickets = splits_of(out.device, self.parts, self.tickets) if self.parts else NONE
            self.multiply(x, qweight, scale, bias, out, parts, tickets)


NONE = None, None


def tiled_bytes(plan: Plan, k: int) -> int:
    """Bytes of a row in whole tiles."""
    return -(-k // (8 * plan.bytes)) * plan.bytes


@functools.lru_cache(MOST_PLANS)
def _launches(m: int, planes: torch.Size, k: int, x_stride: int, dtype: torch.dtype,
              device: torch.device, scale_dtype: torch.dtype, plain: bool, levels: tuple[float, ...],
              group_size: int, plan: Plan) -> Product:
    """Some arguments decide nothing here but what Triton compiles: device, scale_dtype and
    ``plain``, without bias."""
    bits, n, row_bytes = planes
    tile = 8 * plan.bytes
    width = 8 * tiled_bytes(plan, k)
    tiles = width // tile
    interleave = add = None
    if plan.interleaved:  # every tile of k in the order in which bit positions meet it
        rows = 16
        interleave = Launch(interleave_kernel, (triton.cdiv(m, rows), tiles, 1), m, k, x_stride, width,
                            plan.bytes, rows, num_warps=4)
        x_stride = width
    kind = kind_of(levels)
    grouped = 0 if group_size <= 0 else 1 if group_size % 8 == 0 else 2
    down, across = triton.cdiv(n, plan.rows), triton.cdiv(m, plan.cols)
    multiply = Launch(
        packed_matmul_kernel, (down, across, plan.splits),
        m, n, k, row_bytes, n * row_bytes, x_stride,
        0 if group_size == 0 else scale_shape((n, k), group_size)[1], max(group_size, 1), tiles,
        triton.cdiv(tiles, plan.splits), kind, levels if kind == TABLE else (), bits,
        scale_mode(levels, group_size, dtype, plan), 2.0 ** (1 - 2 ** (bits - 1)), grouped,
        plan.interleaved, k % tile == 0, plan.cols, plan.rows, plan.bytes,
        1 if grouped == 2 else plan.stages,  # scales of every bit in flight would fill shared memory
        num_warps=plan.warps)
    split = plan.splits > 1
    if split and m > FEW:
        add = Launch(sum_splits_kernel, (triton.cdiv(m * n, SUM_BLOCK), 1, 1), n, 1, m * n, plan.splits,
                     SUM_BLOCK, num_warps=4)
    return Product(interleave, multiply, add, (m, width), plan.splits * m * n if split else 0,
                   down * across)


def contract() -> list[Case]:
    trips = 16
    types = dict.fromkeys(("m", "n", "k", "row_bytes", "plane_stride", "x_stride", "scale_stride",
                           "group_size", "tiles", "tiles_per_split"), "i32")

    def case(most: int, plan: Plan, architectures: tuple[int, ...], dtype: str, bits: int, mode: str,
             budget: float, split: bool) -> Case:
        split = split and plan.cols <= 128
        adds_up = split and most <= FEW
        pointers = {"x": f"*{dtype}", "planes": "*u8", "scale": "*fp32", "bias": f"*{dtype}",
                    "out": f"*{dtype}"}
        parts = ({"parts": "*fp32"} if split else {}) | ({"tickets": "*i32"} if adds_up else {})
        return Case(
            f"packed_linear {'decode' if plan is DECODE else f'm<={most}'} {dtype} W{bits} {mode}"
            f"{', k in parts' if split else ''}", packed_matmul_kernel,
            {"parts": None, "tickets": None} | types | pointers | parts,
            {"KIND": POWERS, "LEVELS": (), "BITS": bits, "SCALE": mode,
             "LOWEST": 2.0 ** (1 - 2 ** (bits - 1)), "GROUPED": int(mode == TILE),
             "INTERLEAVED": plan.interleaved, "EVEN": True, "BM": plan.cols, "BN": plan.rows,
             "BYTES": plan.bytes, "STAGES": plan.stages},
            plan.rows * 8 * plan.bytes * trips, plan.warps, budget, (trips,), wide_loads=True,
            tensor_cores=True, ticket=adds_up, architectures=architectures,
            divisible=(*pointers, *parts, "n", "k", "row_bytes", "plane_stride", "x_stride"))

    plans = [(DECODE.cols, DECODE, (80, 90, 100, 120)), *((*one, (90,)) for one in HOPPER),
             *((*one, (80, 120)) for one in OTHERS), *((*one, (100,)) for one in BLACKWELL)]
    # On sm_100 the sum of parts is counted with the rest: all programs end at one place.
    main = (("bf16", 1, ROW, 6.0, False), ("bf16", 4, ROW, 10.0, True), ("fp16", 2, WEIGHT, 9.0, False))
    more = (("bf16", 1, ROW, 7.0, True), ("bf16", 2, ROW, 7.0, True), ("bf16", 4, TILE, 10.0, True),
            ("fp16", 2, ROW, 8.0, True))
    return [case(*plan, *rest) for plan in plans
            for rest in (main + more if plan[1] is DECODE else main)]

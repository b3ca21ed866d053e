"""binary_linear's CUDA kernels in host emulation, against the reference: sums of signs are integers."""

import numpy as np
import pytest
import torch
from cuda_emulation import ORDERS, guarded, library, needs_compiler

from blaq_kernels import reference

pytestmark = needs_compiler
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WAYS = {"and": 0, "xor": 1, "warpgroups": 2}
SHAPES = ((1, 16, 64), (3, 5, 1), (8, 40, 300), (9, 17, 70), (33, 24, 1000), (65, 130, 513), (130, 20, 256))


def array(tensor, offset=0):
    """The bytes of a tensor, ending at a page that nobody may touch."""
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return guarded(plain.contiguous().numpy(), offset)


def product(x, qweight, scale, bias, group_size, way="and", offset=0):
    (m, k), n = x.shape, qweight.shape[1]
    weight = array(reference.binary_repack(qweight, k, 1, 1))
    words = -(-k // 256) * 4 if way == "warpgroups" else -(-k // 64)
    bits = guarded(np.zeros((m, words), np.uint64))
    out = array(torch.full((m, n), float("nan"), dtype=x.dtype))
    library("binary_linear").product(
        TYPES.index(x.dtype), WAYS[way], array(x, offset), bits, weight, array(scale),
        None if bias is None else array(bias), out, m, n, k, group_size)
    return torch.from_numpy(out.copy()).view(x.dtype)


def case(m, n, k, dtype, group_size=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    x.view(-1)[::7] = 0.0
    x.view(-1)[3::11] = -0.0
    x.view(-1)[5::13] = float("nan")
    qweight = torch.randint(0, 256, (1, n, -(-k // 8)), generator=generator, dtype=torch.uint8)
    if k % 8:
        qweight[..., -1] &= (1 << k % 8) - 1
    groups = {0: (1,), -1: (n, 1)}.get(group_size, (n, -(-k // max(group_size, 1))))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rand(groups, generator=generator).to(sums) + 0.5
    return x, qweight, scale, torch.randn(n, generator=generator).to(dtype)


def check(actual, x, qweight, scale, bias, group_size):
    """Within rounding: of the sum of some scaled integers, and of what is stored."""
    rounded = scale.to(x.dtype).double()
    expected = reference.binary_linear(x.double(), qweight, rounded,
                                       None if bias is None else bias.double(), group_size)
    bound = torch.finfo(x.dtype).eps * expected.abs() + 1e-6 * x.shape[1] ** 0.5
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", (*SHAPES, (140, 150, 2100)))
def test_product_is_the_references(shape, way):
    for dtype in TYPES if shape in SHAPES else (torch.bfloat16,):
        for group_size in (0, -1):
            arguments = case(*shape, dtype, group_size)
            check(product(*arguments, group_size, way), *arguments, group_size)


@pytest.mark.parametrize("way", ("and", "xor"))
@pytest.mark.parametrize("group_size", (64, 128, 192, 320))
def test_every_group_has_its_scale(group_size, way):
    for m, n, k in ((2, 19, 700), (20, 33, 384), (70, 8, 64)):
        arguments = case(m, n, k, torch.float32, group_size)
        check(product(*arguments, group_size, way), *arguments, group_size)


@pytest.mark.parametrize("way", WAYS)
def test_no_bias_no_inputs_and_no_outputs(way):
    x, qweight, scale, bias = case(3, 10, 100, torch.float32)
    check(product(x, qweight, scale, None, 0, way), x, qweight, scale, None, 0)
    empty = torch.zeros(2, 0), torch.zeros(1, 4, 0, dtype=torch.uint8), torch.ones(1)
    assert product(*empty, torch.arange(4.0), 0, way).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2
    assert product(torch.zeros(0, 8), torch.zeros(1, 4, 1, dtype=torch.uint8), torch.ones(1), None, 0,
                   way).shape == (0, 4)


@pytest.mark.parametrize("dtype", TYPES)
def test_misaligned_inputs_are_read_one_by_one(dtype):
    arguments = case(5, 12, 264, dtype)
    check(product(*arguments, 0, offset=arguments[0].element_size()), *arguments, 0)


@pytest.mark.parametrize("way", WAYS)
def test_no_order_of_threads_changes_a_result(way):
    arguments = case(40, 50, 900, torch.bfloat16, -1)
    results = []
    for order in ORDERS:
        library("binary_linear").order(order)
        results.append(product(*arguments, -1, way))
    library("binary_linear").order(0)
    assert all(torch.equal(results[0], result) for result in results)

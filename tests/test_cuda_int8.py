"""What surrounds packed_linear's int8 product on CUDA, in host emulation; numpy multiplies."""

import numpy as np
import pytest
import torch
from cuda_emulation import guarded, library, needs_compiler

from blaq_kernels import reference
from blaq_kernels.codebook import levels_of

pytestmark = needs_compiler
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def array(tensor):
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return guarded(plain.contiguous().numpy())


def integers(levels, bits):
    """Levels of codes as int8, and their unit: numpy's own way to csrc/cpu/level_table.h."""
    both = np.concatenate([np.array(levels), -np.array(levels)])  # the sign is the highest bit
    factor = next((f for f in range(128, 0, -1) if np.all(both * f == np.rint(both * f))), 127)
    table = np.zeros(16, np.int8)
    table[:2**bits] = np.clip(np.rint(both * factor), -128, 127)
    return table, 1 / 127.5 if factor == 128 else 1 / factor


def product(x, qweight, scale, bias, levels):
    (m, k), (bits, n, row_bytes) = x.shape, qweight.shape
    padded_k, padded_n = -(-k // 16) * 16, -(-n // 8) * 8
    native, kind = library("packed_int8"), TYPES.index(x.dtype)
    rows, units = guarded(np.zeros((m, padded_k), np.int8)), guarded(np.zeros(m, np.float32))
    native.rows(kind, array(x), m, k, padded_k, rows, units)
    table, level_unit = integers(levels, bits)
    weight = guarded(np.full((padded_n, padded_k), 55, np.int8))
    native.decode(array(qweight), bits, n, row_bytes, k, table, weight, padded_n, padded_k)
    sums = guarded(rows.astype(np.int32) @ weight.astype(np.int32).T)
    out = array(torch.full((m, n), float("nan"), dtype=x.dtype))
    native.scaled(kind, sums, padded_n, units, level_unit, array(scale), int(scale.numel() > 1),
                  None if bias is None else array(bias), out, m, n)
    return torch.from_numpy(out.copy()).view(x.dtype), weight


def case(m, n, k, bits, dtype, per_row, codebook="pow2"):
    generator = torch.Generator().manual_seed(m + n + k)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    levels = levels_of(codebook, bits)
    scale = torch.rand((n, 1) if per_row else (1,), generator=generator) + 0.5
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    return codes, x.to(dtype), reference.pack(codes, bits), scale, bias.to(dtype), levels


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", (1, 2, 3, 4))
def test_error_is_that_of_8_bits(bits, dtype):
    for m, n, k, per_row in ((2, 40, 1000, False), (17, 9, 513, True), (1, 31, 160, True)):
        _, x, qweight, scale, bias, levels = case(m, n, k, bits, dtype, per_row)
        actual, _ = product(x, qweight, scale, bias, levels)
        expected = reference.packed_linear(x.double(), qweight, scale.to(dtype).double(), bias.double(),
                                           levels, -1 if per_row else 0)
        assert (actual.double() - expected).norm() <= 1.2e-2 * expected.norm()


@pytest.mark.parametrize("codebook", ("pow2", "linear", "uniform", "pow2_zero"))
def test_every_code_becomes_its_level(codebook):
    for bits in (2, 3, 4):
        codes, x, qweight, scale, bias, levels = case(2, 11, 77, bits, torch.float32, False, codebook)
        count = len(levels)
        codes = codes % (2 * count) if codebook != "pow2" else codes  # some books leave codes unused
        codes = torch.where(codes >= count, codes - count + 2 ** (bits - 1), codes).to(torch.uint8)
        _, weight = product(x, reference.pack(codes, bits), scale, bias, levels)
        signed = np.array([*levels, *[0] * (2 ** (bits - 1) - count),
                           *(-level for level in levels)])[codes.numpy()]
        _, unit = integers(levels, bits)
        assert np.abs(weight[:11, :77] * unit - signed).max() <= 1.01 / 127.5
        assert not weight[11:].any() and not weight[:, 77:].any()


def test_rows_that_are_not_finite_are_nan_and_no_other_row_is():
    _, x, qweight, scale, bias, levels = case(6, 10, 50, 2, torch.float32, False)
    clean, _ = product(x, qweight, scale, bias, levels)
    x[1, 3], x[4, 49], x[2] = float("nan"), float("-inf"), 0.0
    actual, _ = product(x, qweight, scale, bias, levels)
    assert actual[[1, 4]].isnan().all()
    assert torch.equal(actual[2], bias)
    assert torch.equal(actual[[0, 3, 5]], clean[[0, 3, 5]])


def test_no_rows_and_no_bias():
    _, x, qweight, scale, _, levels = case(0, 10, 50, 1, torch.float16, False)
    assert product(x, qweight, scale, None, levels)[0].shape == (0, 10)

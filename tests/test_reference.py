"""The reference against float64 brute force and against numbers worked by hand."""

import itertools

import pytest
import torch

from blaq_kernels import reference as ref
from blaq_kernels.codebook import bits_of, check_levels, levels_of

CODEBOOKS = [("binary", 1), ("pow2", 2), ("pow2", 3), ("pow2", 4), ("ternary", 2), ("linear", 3),
             ("linear", 4), ("pow2_zero", 3), ("pow2_zero", 4), ("uniform", 2)]
GROUPS = [0, -1, 5]


@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_codebook_is_valid_and_fits_its_bits(name, bits):
    levels = levels_of(name, bits)
    check_levels("test", levels)
    assert bits_of(levels) == bits


def test_codebooks_by_hand():
    assert levels_of("pow2", 2) == (0.5, 1.0)
    assert levels_of("linear", 3) == (0.0, 1 / 3, 2 / 3, 1.0)
    assert levels_of("pow2_zero", 3) == (0.0, 0.25, 0.5, 1.0)
    assert levels_of("uniform", 2) == (1 / 3, 1.0)


@pytest.mark.parametrize("levels", [(), (0.5,), (1.0, 0.5), (-1.0, 1.0), (float("nan"), 1.0),
                                    (0.5, 0.5, 1.0)])
def test_bad_levels_are_named(levels):
    with pytest.raises(ValueError, match=r"blaq\.test: levels must .*got"):
        check_levels("test", levels)


@pytest.mark.parametrize("name,bits", [("binary", 2), ("ternary", 1), ("linear", 1), ("nope", 2),
                                       ("pow2", 5), ("pow2", 0)])
def test_bad_codebooks_are_named(name, bits):
    with pytest.raises(ValueError, match=r"blaq\.levels_of: (bits|name) must"):
        levels_of(name, bits)


def test_nearest_level_ties_go_up_and_zero_is_positive():
    w = torch.tensor([0.0, -0.0, 0.75, -0.75, 0.7499999, 3.0])
    codes = ref.quantize_codes(w, torch.ones(1), (0.5, 1.0), 0)
    assert codes.tolist() == [0, 0, 1, 3, 0, 1]
    ternary = ref.quantize_codes(torch.tensor([-0.2, -0.5]), torch.ones(1), (0.0, 1.0), 0)
    assert ternary.tolist() == [0, 3]  # a zero has one code


@pytest.mark.parametrize("group_size", GROUPS)
def test_one_bit_is_closed_form_and_ignores_max_iter(group_size):
    torch.manual_seed(0)
    w, d = torch.randn(3, 11), torch.rand(3, 11) + 0.1
    codes, scale = ref.solve(w, d, None, (1.0,), group_size, 1, "alternating")
    again = ref.solve(w, d, torch.full_like(scale, 9.0), (1.0,), group_size, 50, "alternating")
    assert torch.equal(scale, again[1]) and torch.equal(codes, again[0])
    if group_size == 0:
        torch.testing.assert_close(scale, ((d * w.abs()).sum() / d.sum())[None])


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("name,bits", CODEBOOKS[1:])
def test_alternation_never_raises_the_objective(name, bits, group_size):
    torch.manual_seed(1)
    levels = levels_of(name, bits)
    w, d = torch.randn(4, 23), torch.rand(4, 23) + 0.01
    previous = None
    for max_iter in range(1, 12):
        codes, scale = ref.solve(w, d, None, levels, group_size, max_iter, "alternating")
        energy = ref.objective(w, d, codes, scale, levels, group_size)
        if previous is not None:
            assert (energy <= previous * (1 + 1e-6)).all()
        previous = energy


@pytest.mark.parametrize("name,bits", [("pow2", 2), ("ternary", 2), ("pow2", 3), ("pow2_zero", 3)])
def test_exact_equals_brute_force(name, bits):
    levels = levels_of(name, bits)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(5, generator=generator, dtype=torch.float64)
        d = torch.rand(5, generator=generator, dtype=torch.float64) + 0.01
        best = float("inf")
        for beta in itertools.product(levels, repeat=5):
            beta = torch.tensor(beta, dtype=torch.float64)
            if beta.any():
                alpha = (d * beta * w.abs()).sum() / (d * beta * beta).sum()
                best = min(best, 0.5 * (d * (w.abs() - alpha * beta).square()).sum().item())
        codes, scale = ref.solve(w, d, None, levels, 0, 0, "exact")
        assert ref.objective(w, d, codes, scale, levels, 0).item() <= best * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("method", ["alternating", "exact"])
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_zero_group_has_a_tiny_positive_scale(name, bits, method):
    levels = levels_of(name, bits)
    codes, scale = ref.solve(torch.zeros(2, 4), torch.ones(2, 4), None, levels, -1, 5, method)
    assert (scale > 0).all() and (scale < 1e-20).all() and (codes == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("name,bits", CODEBOOKS)
def test_packing_is_lossless(name, bits, group_size, dtype):
    torch.manual_seed(2)
    levels = levels_of(name, bits)
    w = torch.randn(5, 13)
    codes, scale = ref.solve(w, torch.ones_like(w), None, levels, group_size, 5, "alternating")
    param = ref.dequantize(codes, scale, levels, group_size).to(dtype)
    qweight = ref.pack(codes, bits)
    assert qweight.shape == (bits, 5, 2)
    assert torch.equal(ref.unpack_codes(qweight, 13), codes)
    unpacked = ref.unpack(qweight, scale, levels, group_size, 13, dtype)
    assert torch.equal(unpacked.view(torch.uint8), param.view(torch.uint8))


def test_pack_layout_by_hand():
    codes = torch.tensor([[1, 0, 3, 0, 0, 0, 0, 2, 1]], dtype=torch.uint8)
    assert ref.pack(codes, 2).tolist() == [[[0b00000101, 1]], [[0b10000100, 0]]]

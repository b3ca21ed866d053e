"""packed_linear in 8-bit arithmetic: its error, its layout, and what it leaves to the exact kernels."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import blaq
import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

ops = torch.ops.blaq
BUDGET = {"exact": 1e-6, "high": 4e-4, "fast": 1e-2}
CODEBOOKS = [("binary", 1), ("ternary", 2), ("pow2", 2), ("pow2", 3), ("linear", 3), ("pow2", 4),
             ("linear", 4), ("uniform", 4)]


def variants():
    """The capabilities of this processor that have 8-bit kernels, one for each set of kernels."""
    before, found = blaq_kernels.cpu_capability(), {}
    for name in blaq_kernels.cpu_capabilities():
        blaq_kernels.set_cpu_capability(name)
        if blaq_kernels.has_int8():
            found.setdefault(blaq_kernels.int8_kernels(), name)
    if before != "none":
        blaq_kernels.set_cpu_capability(before)
    return list(found.values())


@pytest.fixture(params=variants())
def variant(request):
    before = blaq_kernels.cpu_capability()
    blaq_kernels.set_cpu_capability(request.param)
    yield request.param
    blaq_kernels.set_cpu_capability(before)


@pytest.fixture(params=blaq_kernels.cpu_capabilities() or ["none"])
def any_capability(request):
    before = blaq_kernels.cpu_capability()
    blaq_kernels.set_cpu_capability(request.param)
    yield
    blaq_kernels.set_cpu_capability(before)


needs_int8 = pytest.mark.usefixtures("variant")


@pytest.fixture(autouse=True)
def restored():
    threads, accuracy = torch.get_num_threads(), blaq.get_accuracy()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    blaq.set_accuracy(accuracy)


def make(book, n, k, group_size):
    levels = levels_of(*book)
    codes = torch.randint(len(levels), (n, k), dtype=torch.uint8)
    sign = torch.randint(2, (n, k), dtype=torch.uint8) << (blaq.bits_of(levels) - 1)
    if levels[0] == 0:
        sign[codes == 0] = 0
    qweight = ops.pack(codes | sign, blaq.bits_of(levels))
    scale = torch.rand(ref.scale_shape((n, k), group_size)) + 0.5
    return levels, qweight, scale


def relative_error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1, 1), (33, 70), (64, 4096), (5, 640)])
def test_repack_equals_the_reference(any_capability, bits, n, k):
    qweight = ops.pack(torch.randint(2**bits, (n, k), dtype=torch.uint8), bits)
    expected = ref.repack(qweight)
    assert torch.equal(ops.repack(qweight), expected)


@pytest.mark.parametrize("n, k", [(1, 1), (5, 13), (16, 64), (37, 301)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unrepack_inverts_repack(bits, n, k):
    torch.manual_seed(n)
    qweight = ref.pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    repacked = ops.repack(qweight)
    assert torch.equal(ops.unrepack(repacked, bits, n, k), qweight)
    assert torch.equal(ref.unrepack(repacked, bits, n, k), qweight)


@needs_int8
@pytest.mark.parametrize("accuracy", BUDGET)
@pytest.mark.parametrize("group_size", [0, -1, 32, 96, 512])
@pytest.mark.parametrize("book", CODEBOOKS, ids=str)
def test_error_is_within_the_budget(book, group_size, accuracy):
    for m, n, k in ((37, 70, 1100), (64, 16, 2048), (53, 200, 300)):
        levels, qweight, scale = make(book, n, k, group_size)
        x, bias = torch.randn(m, k), torch.randn(n)
        weight = ref.unpack(qweight, scale.double(), levels, group_size, k, torch.float64)
        actual = ops.packed_linear(x, qweight, scale, bias, levels, group_size, ops.repack(qweight),
                                   accuracy)
        assert relative_error(actual, x.double() @ weight.T + bias.double()) <= BUDGET[accuracy]


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("book", CODEBOOKS, ids=str)
def test_sixteen_bit_inputs_multiply_the_rounded_weight(book, dtype):
    epsilon = torch.finfo(dtype).eps / 2  # the result is rounded once
    for group_size, factor in ((-1, 1), (0, 1), (0, 0.01), (0, 37)):
        levels, qweight, scale = make(book, 96, 512, group_size)
        scale *= factor
        x = torch.randn(4, 512).to(dtype)
        weight = ref.unpack(qweight, scale, levels, group_size, 512, dtype).double()
        for accuracy in ("high", "fast"):
            actual = ops.packed_linear(x, qweight, scale, None, levels, group_size,
                                       ops.repack(qweight), accuracy)
            assert actual.dtype == dtype
            assert relative_error(actual, x.double() @ weight.T) <= BUDGET[accuracy] + epsilon


@needs_int8
@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("book", [("binary", 1), ("pow2", 2), ("pow2", 4)], ids=str)
def test_a_result_does_not_depend_on_threads_or_on_the_batch(book, accuracy):
    levels, qweight, scale = make(book, 300, 1000, 0)
    x, repacked = torch.randn(70, 1000), ops.repack(qweight)
    expected = ops.packed_linear(x, qweight, scale, None, levels, 0, repacked, accuracy)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (slice(0, 70), slice(3, 4), slice(5, 8), slice(10, 27)):
            actual = ops.packed_linear(x[rows], qweight, scale, None, levels, 0, repacked, accuracy)
            assert torch.equal(actual, expected[rows])


@needs_int8
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_a_row_that_is_no_number_does_not_touch_the_others(bits, accuracy):
    levels, qweight, scale = make(("pow2", bits), 40, 320, 0)
    x = torch.randn(6, 320)
    clean = ops.packed_linear(x, qweight, scale, None, levels, 0, ops.repack(qweight), accuracy)
    x[1, 7], x[3, 300], x[4] = torch.nan, torch.inf, 0
    x[5] *= 1e-36  # its unit would be subnormal
    weight = ref.unpack(qweight, scale, levels, 0, 320, torch.float32)
    actual = ops.packed_linear(x, qweight, scale, None, levels, 0, ops.repack(qweight), accuracy)
    expected = torch.nn.functional.linear(x, weight)
    assert actual[1].isnan().all()
    assert torch.equal(actual[3], expected[3])  # ±inf
    assert torch.equal(actual[4], torch.zeros(40))
    torch.testing.assert_close(actual[5], expected[5], rtol=1e-3, atol=1e-40)
    assert torch.equal(actual[[0, 2]], clean[[0, 2]])


@needs_int8
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_outliers_cost_little_where_units_are_shared_by_few(bits):
    levels, qweight, scale = make(("pow2", bits), 128, 2048, 0)
    x = torch.randn(4, 2048)
    x[:, 5] *= 100
    weight = ref.unpack(qweight, scale.double(), levels, 0, 2048, torch.float64)
    exact = x.double() @ weight.T
    for accuracy, budget in (("high", 4e-4), ("fast", 4e-2)):
        actual = ops.packed_linear(x, qweight, scale, None, levels, 0, ops.repack(qweight), accuracy)
        assert relative_error(actual, exact) <= budget


@needs_int8
def test_a_codebook_that_8_bits_do_not_hold_is_exact_where_high_is_asked():
    levels, n, k = (0.1234567, 0.3456789, 0.5678901, 1.0), 32, 256
    qweight = ops.pack(torch.randint(8, (n, k), dtype=torch.uint8), 3)
    scale, x = torch.ones(1), torch.randn(5, k)
    high, exact = (ops.packed_linear(x, qweight, scale, None, levels, 0, ops.repack(qweight), accuracy)
                   for accuracy in ("high", "exact"))
    assert torch.equal(high, exact)


@needs_int8
def test_a_code_without_a_level_is_nan():
    levels, k = (0.25, 0.5, 1.0), 64  # three of the four that 3 bits have
    codes = torch.randint(3, (20, k), dtype=torch.uint8)
    codes[7, 9] = 3
    qweight, x = ops.pack(codes, 3), torch.randn(2, k)
    for accuracy in BUDGET:
        y = ops.packed_linear(x, qweight, torch.ones(1), None, levels, 0, ops.repack(qweight), accuracy)
        assert y[:, 7].isnan().all() and int(y.isnan().sum()) == 2


def test_gradients_pass_by_the_repacked_weight():
    levels, qweight, scale = make(("pow2", 2), 8, 64, -1)
    x = torch.randn(3, 64, requires_grad=True)
    ops.packed_linear(x, qweight, scale, None, levels, -1, ops.repack(qweight), "fast").sum().backward()
    weight = ref.unpack(qweight, scale, levels, -1, 64, torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64))


@pytest.mark.parametrize(("change", "message"), [
    ({"accuracy": "best"}, r"packed_linear: accuracy must be 'exact', 'high' or 'fast', got 'best'"),
    ({"repacked": torch.zeros(7, dtype=torch.uint8)}, r"packed_linear: repacked must have shape \[64\]"),
    ({"repacked": torch.zeros(64)}, r"packed_linear: repacked must be uint8"),
])
def test_bad_input(change, message):
    levels, qweight, scale = make(("binary", 1), 8, 16, 0)
    arguments = {"repacked": None, "accuracy": "high", **change}
    with pytest.raises(ValueError, match=message):
        ops.packed_linear(torch.randn(2, 16), qweight, scale, None, levels, 0, **arguments)
    with pytest.raises(ValueError, match=message):
        blaq.functional.packed_linear(torch.randn(2, 16), qweight, scale, None, levels, 0, **arguments)


@pytest.mark.parametrize(("qweight", "message"), [
    (torch.zeros(1, 4, dtype=torch.uint8), r"repack: qweight must have shape"),
    (torch.zeros(5, 4, 2, dtype=torch.uint8), r"repack: qweight must have shape"),
    (torch.zeros(1, 4, 2), r"repack: qweight must be uint8"),
])
def test_repack_of_bad_input(qweight, message):
    with pytest.raises(ValueError, match=message):
        ops.repack(qweight)


def packed_layer(bits=1):
    layer = nn.Linear(96, 40)
    levels = levels_of("pow2", bits)
    with torch.no_grad():
        layer.weight.copy_(ops.fake_quantize(layer.weight, torch.tensor([0.05]), levels, 0))
    return blaq.pack(nn.Sequential(layer), bits=bits)[0]


def test_accuracy_of_a_layer_and_of_all():
    layer = packed_layer()
    assert layer.accuracy == blaq.get_accuracy() == "high"
    blaq.set_accuracy("fast")
    assert layer.accuracy == "fast"
    layer.accuracy = "exact"
    assert layer.accuracy == "exact" and packed_layer().accuracy == "fast"
    layer.accuracy = None
    assert layer.accuracy == "fast"
    with pytest.raises(ValueError, match="set_accuracy: accuracy must be one of exact, high, fast"):
        blaq.set_accuracy("good")
    with pytest.raises(ValueError, match="PackedLinear: accuracy must be one of"):
        layer.accuracy = "good"


@needs_int8
def test_a_layer_repacks_once_and_again_when_its_codes_change():
    layer, x = packed_layer(), torch.randn(3, 96)
    first = layer(x)
    kept = layer.repacked()
    assert layer.repacked() is kept
    assert "_repacked" not in layer.state_dict() and "repacked" not in "".join(layer.state_dict())
    other = packed_layer()
    layer.load_state_dict(other.state_dict())
    assert layer.repacked() is not kept
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)
    assert not torch.equal(layer(x), first)
    layer.accuracy = "exact"
    assert layer.repacked() is None


@needs_int8
def test_copies_do_not_carry_the_repacked_weight():
    layer, x = packed_layer(), torch.randn(3, 96)
    expected = layer(x)
    assert len(pickle.dumps(layer)) < 2 * len(pickle.dumps(packed_layer()))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)


@needs_int8
def test_first_calls_from_many_threads():
    layer, x = packed_layer(2), torch.randn(3, 96)
    expected = copy.deepcopy(layer)(x)
    results = [None] * 8

    def run(i):
        results[i] = layer(x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)

"""CUDA C++ kernels on a GPU, through torch.ops and BLAQ_BACKEND=cuda, against float64."""

import math

import pytest
import torch

import blaq
import blaq_kernels
from blaq_kernels import fragments
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

if not torch.cuda.is_available():
    WHY = "no CUDA device"
elif blaq_kernels.dispatch.requested_backend() != "cuda":
    WHY = "BLAQ_BACKEND is not cuda"
elif not blaq_kernels.reads_repacked(torch.device("cuda:0")):
    WHY = "no code for this device"
else:
    WHY = ""
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)

DTYPES = (torch.float16, torch.bfloat16)
BOOKS = [levels_of("pow2", bits) for bits in (1, 2, 3, 4)] + [levels_of("uniform", 3)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weight(n, k, levels, group_size):
    bits = ref.bits_of(levels)
    codes = torch.randint(0, len(levels), (n, k), dtype=torch.uint8, device="cuda")
    codes |= torch.randint(0, 2, (n, k), dtype=torch.uint8, device="cuda") << (bits - 1)
    scale = torch.rand(ref.scale_shape((n, k), group_size), device="cuda") + 0.1
    qweight = ref.pack(codes, bits)
    return qweight, scale, torch.ops.blaq.repack(qweight)


def assert_right(actual, x, qweight, scale, bias, levels, group_size):
    dense = ref.unpack(qweight, scale, levels, group_size, x.shape[-1], x.dtype).double()
    exact = torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
    step = torch.finfo(x.dtype).eps
    assert (actual.double() - exact).norm() <= step * exact.norm() and actual.dtype == x.dtype


@pytest.mark.parametrize("bits", (1, 2, 3, 4))
def test_repacking_is_what_plain_pytorch_makes(bits):
    for n, row_bytes in ((1, 1), (37, 67), (300, 128)):
        qweight = torch.randint(0, 256, (bits, n, row_bytes), dtype=torch.uint8, device="cuda")
        assert torch.equal(torch.ops.blaq.repack(qweight), fragments.repack(qweight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, -1, 64, 128, 24])
@pytest.mark.parametrize("levels", BOOKS, ids=len)
def test_products(levels, group_size, dtype):
    for m, n, k in ((1, 256, 1024), (5, 70, 333), (12, 130, 512), (30, 48, 200), (64, 300, 640),
                    (1, 4096, 4096), (65, 40, 128)):
        qweight, scale, repacked = weight(n, k, levels, group_size)
        x, bias = (torch.randn(*s, device="cuda").to(dtype) for s in ((m, k), (n,)))
        actual = torch.ops.blaq.packed_linear(x, qweight, scale, bias, levels, group_size, repacked)
        assert_right(actual, x, qweight, scale, bias, levels, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_any_layout(dtype):
    levels = levels_of("pow2", 2)
    qweight, scale, repacked = weight(40, 128, levels, -1)
    storage = torch.randn(129, 300, device="cuda").to(dtype)
    for x in (storage[:5, 1:129], storage[1:, :6].t(), storage[0, 3:131], storage[:2, :128]):
        actual = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1, repacked)
        assert_right(actual, x, qweight, scale, None, levels, -1)


def test_tiny_scales_round_each_weight():
    levels = levels_of("pow2", 4)
    qweight, scale, repacked = weight(40, 128, levels, -1)
    scale *= 2.0**-16
    x = torch.randn(3, 128, device="cuda", dtype=torch.float16) * 256
    actual = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1, repacked)
    assert_right(actual, x, qweight, scale, None, levels, -1)


needs_int8 = pytest.mark.skipif(not WHY and torch.cuda.get_device_capability()[0] == 10,
                                reason="Triton serves accuracy fast on compute capability 10")


def assert_fast(x, qweight, scale, bias, levels, group_size):
    """By integers, not by what is more exact; and the same bits again."""
    op = torch.ops.blaq.packed_linear.default
    actual, again = (op(x, qweight, scale, bias, levels, group_size, None, "fast")
                     for _ in range(2))
    assert torch.equal(actual, again)
    dense = ref.unpack(qweight, scale, levels, group_size, x.shape[1], x.dtype).double()
    expected = torch.nn.functional.linear(x.double(), dense, bias.double())
    assert 1e-3 < (actual.double() - expected).norm() / expected.norm() <= 1e-2


@needs_int8
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
@pytest.mark.parametrize("group_size", [0, -1, 128, 256])
@pytest.mark.parametrize("levels", BOOKS, ids=len)
def test_many_rows_in_8_bits(levels, group_size, dtype):
    for m, n, k in ((65, 40, 128), (129, 257, 600), (300, 390, 1000), (100, 512, 3000)):
        qweight, scale, _ = weight(n, k, levels, group_size)
        storage, bias = (torch.randn(*s, device="cuda").to(dtype) for s in ((m, k + 1), (n,)))
        for x in (storage[:, :k].contiguous(), storage[:, 1:]):
            assert_fast(x, qweight, scale, bias, levels, group_size)
        x = storage[:, :k].contiguous()
        x[1, -1] = math.inf
        actual = torch.ops.blaq.packed_linear(x, qweight, scale, bias, levels, group_size, None,
                                              "fast")
        assert actual[1].isnan().all() and actual[torch.arange(m) != 1].isfinite().all()


@needs_int8
@pytest.mark.parametrize("levels", BOOKS, ids=len)
def test_more_tiles_than_blocks(levels):
    qweight, scale, _ = weight(4096, 4096, levels, -1)
    x = torch.randn(4100, 4096, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    assert_fast(x, qweight, scale, bias, levels, -1)


def test_a_graph_of_a_chain_of_layers_and_another_stream():
    """Each kernel begins before the one that makes its input has ended."""
    levels, layers = levels_of("pow2", 1), []
    for _ in range(8):
        qweight, scale, repacked = weight(512, 512, levels, -1)
        layers.append((qweight, scale / 20, repacked))
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)

    def chain():
        y = x
        for qweight, scale, repacked in layers:
            y = torch.ops.blaq.packed_linear(y, qweight, scale, None, levels, -1, repacked)
        return y

    expected = x
    for qweight, scale, _ in layers:
        expected = ref.packed_linear(expected, qweight, scale, None, levels, -1)
    eager = chain()
    torch.testing.assert_close(eager, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    captured.fill_(math.nan)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = chain()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager) and torch.equal(other, eager)


def test_a_layer_repacks_once_and_never_saves():
    layer = blaq.PackedLinear(256, 64, levels=levels_of("pow2", 2), device="cuda", dtype=torch.bfloat16)
    layer.qweight.random_(0, 256)
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    first = layer.repacked()
    assert first is layer.repacked() and all("repacked" not in key for key in layer.state_dict())
    with torch.no_grad():
        actual = layer(x)
    assert_right(actual, x, layer.qweight, layer.scale, layer.bias, layer.levels, layer.group_size)
    layer.qweight.random_(0, 256)
    assert layer.repacked() is not first

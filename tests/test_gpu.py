"""Every op on CUDA tensors, through torch.ops, against the reference in float64; graphs; no waiting."""

import math

import pytest
import torch

import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOOKS = [levels_of("pow2", 1), levels_of("pow2", 2), levels_of("pow2", 4), levels_of("uniform", 3)]
GROUPS = [0, -1, 128]
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "max_iter": 5,
         "method": "alternating"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def no_waiting():
    """An error where an op waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def packed_weight(n, k, levels, group_size):
    bits = ref.bits_of(levels)
    codes = torch.randint(0, len(levels), (n, k), dtype=torch.uint8, device="cuda")
    codes |= torch.randint(0, 2, (n, k), dtype=torch.uint8, device="cuda") << (bits - 1)
    scale = torch.rand(ref.scale_shape((n, k), group_size), device="cuda") + 0.1
    return ref.pack(codes, bits), scale


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_within_budget(actual, low_precision, exact):
    budget = 2 * error(low_precision, exact) + torch.finfo(actual.dtype).eps / 2
    assert actual.dtype == low_precision.dtype and error(actual, exact) <= budget


def test_triton_serves_cuda_tensors():
    if (backend := blaq_kernels.dispatch.requested_backend()) in ("reference", "cuda"):
        pytest.skip(f"BLAQ_BACKEND={backend}")
    serving = blaq_kernels.serving("cuda")
    none = {name for name, who in serving.items() if who != "Triton"}
    assert none == {"repack", "conv_repack", "unrepack", "binary_repack", "binary_linear", "binary_conv2d"}


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("levels", BOOKS, ids=len)
def test_packing(levels, group_size):
    n, k, bits = 65, 515, ref.bits_of(levels)
    qweight, scale = packed_weight(n, k, levels, group_size)
    codes = ref.unpack_codes(qweight, k)
    assert torch.equal(torch.ops.blaq.pack(codes, bits), qweight)
    for dtype in DTYPES:
        args = (qweight, scale, levels, group_size, k, dtype)
        assert torch.equal(torch.ops.blaq.unpack(*args), ref.unpack(*args))
        latent = torch.randn(n, k, device="cuda").to(dtype)
        args = (latent, scale, levels, group_size)
        assert torch.equal(torch.ops.blaq.fake_quantize(*args), ref.fake_quantize(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("levels", BOOKS, ids=len)
def test_packed_linear(levels, group_size, dtype):
    for m, n, k in ((1, 256, 1024), (5, 70, 333), (40, 130, 512), (200, 300, 640), (2000, 128, 256)):
        qweight, scale = packed_weight(n, k, levels, group_size)
        x, bias = (torch.randn(*s, device="cuda").to(dtype) for s in ((m, k), (n,)))
        args = (x, qweight, scale, bias, levels, group_size)
        weight = ref.unpack(qweight, scale, levels, group_size, k, dtype)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert_within_budget(torch.ops.blaq.packed_linear(*args), ref.packed_linear(*args), exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", BOOKS, ids=len)
def test_packed_conv2d(levels, dtype, layout):
    for channels, out, kernel, stride, groups in ((16, 32, 3, 1, 1), (24, 40, 3, 2, 2), (8, 8, 3, 1, 8),
                                                  (64, 64, 1, 1, 1)):
        k = channels // groups * kernel**2
        qweight, scale = packed_weight(out, k, levels, -1)
        x = torch.randn(2, channels, 14, 13, device="cuda").to(dtype, memory_format=layout)
        args = (x, qweight, scale, None, levels, -1, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2,
                (1, 1), groups)
        weight = ref.unpack(qweight, scale, levels, -1, k, dtype).view(out, -1, kernel, kernel)
        exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, kernel // 2, 1,
                                           groups)
        assert_within_budget(torch.ops.blaq.packed_conv2d(*args), ref.packed_conv2d(*args), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise(dtype):
    a, b, c = (torch.rand(3, 1001, device="cuda").to(dtype) + 0.5 for _ in range(3))
    for name, args in (("scaled_update", (a, b, c)), ("blend", (a, b, 0.6))):
        actual, low = getattr(torch.ops.blaq, name)(*args), getattr(ref, name)(*args)
        exact = getattr(ref, name)(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
        assert_within_budget(actual, low, exact)


@pytest.mark.parametrize("method", ["alternating", "exact"])
@pytest.mark.parametrize("group_size", [0, -1, 32])
def test_solve(group_size, method):
    levels = levels_of("pow2", 2)
    latent, curvature = torch.randn(40, 300, device="cuda"), torch.rand(40, 300, device="cuda") + 0.1
    args = (latent, curvature, None, levels, group_size, 10, method)
    (codes, scale), expected = torch.ops.blaq.solve(*args), ref.solve(*args)
    actual, best = (ref.objective(latent, curvature, *found, levels, group_size)
                    for found in ((codes, scale), expected))
    assert (actual <= best * 1.001).all()
    assert torch.equal(codes, ref.quantize_codes(latent, scale, levels, group_size))


def step_arguments(group_size, device="cuda"):
    shapes, levels = [(64, 300), (7,), (32, 16, 3, 3)], levels_of("pow2", 2)
    lists = {"latents": [torch.randn(s) * 0.3 for s in shapes],
             **{name: [torch.randn(s) * 1e-2 for s in shapes]
                for name in ("params", "grads", "trial_grads", "exp_avgs")},
             "exp_avg_sqs": [torch.rand(s) * 1e-4 for s in shapes],
             "scales": [torch.full(ref.scale_shape(s, group_size), 0.3) for s in shapes]}
    lists = {name: [x.to(device) for x in tensors] for name, tensors in lists.items()}
    scalars = {name: torch.tensor(value, device=device)
               for name, value in (("lr", 1e-2), ("step", 3.0), ("backtrack", 0.6))}
    return {**lists, **scalars, **HYPER, "levels": levels, "group_size": group_size}


@pytest.mark.parametrize("group_size", [0, -1, 32])
def test_fused_step(group_size):
    actual = step_arguments(group_size)
    torch.manual_seed(0)
    expected = step_arguments(group_size)
    torch.ops.blaq.fused_step(**actual)
    ref.fused_step(**expected)
    for name in ("latents", "exp_avgs", "exp_avg_sqs", "scales"):
        for a, b in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_graph_follows_the_learning_rate(no_waiting):
    """A captured step replays as eager steps do, also after the schedule has moved."""
    captured = step_arguments(-1)
    torch.manual_seed(0)
    eager = step_arguments(-1)
    saved = {name: [x.clone() for x in captured[name]] for name in
             ("params", "latents", "exp_avgs", "exp_avg_sqs", "scales")}
    torch.cuda.set_sync_debug_mode("default")  # capture itself waits
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.blaq.fused_step(**captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.blaq.fused_step(**captured)
    for name, tensors in saved.items():
        for x, before in zip(captured[name], tensors, strict=True):
            x.copy_(before)
    torch.cuda.set_sync_debug_mode("error")
    for rate in (1e-2, 3e-3):
        for arguments in (captured, eager):
            arguments["lr"].fill_(rate)
            arguments["step"].add_(1.0)
        graph.replay()
        torch.ops.blaq.fused_step(**eager)
    torch.cuda.set_sync_debug_mode("default")
    for name in saved:
        for a, b in zip(captured[name], eager[name], strict=True):
            assert torch.equal(a, b), name


def test_packed_ops_do_not_wait(no_waiting):
    levels = levels_of("pow2", 2)
    torch.cuda.set_sync_debug_mode("default")
    qweight, scale = packed_weight(64, 256, levels, -1)
    inputs = [torch.randn(m, 256, device="cuda", dtype=torch.bfloat16) for m in (1, 40, 2000)]
    torch.cuda.set_sync_debug_mode("error")
    for x in inputs:
        torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1)
    torch.ops.blaq.unpack(qweight, scale, levels, -1, 256, torch.bfloat16)
    torch.ops.blaq.fake_quantize(torch.empty(64, 256, device="cuda"), scale, levels, -1)


def test_packed_linear_in_a_graph_and_on_another_stream():
    levels = levels_of("pow2", 4)
    qweight, scale = packed_weight(512, 2048, levels, -1)
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    expected = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1)
    captured.fill_(math.nan)
    graph.replay()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        other = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1)
    torch.cuda.synchronize()
    assert torch.equal(captured, expected) and torch.equal(other, expected)


def test_parts_of_k_are_added_alike_whichever_program_ends_last():
    """On two streams, each with parts and tickets of its own, and among products of other sizes."""
    op, levels = torch.ops.blaq.packed_linear, levels_of("pow2", 1)
    streams = [torch.cuda.Stream() for _ in range(2)]
    cases = []
    for m, n, k in ((1, 200, 8192), (16, 4096, 4096), (40, 300, 8192)):
        qweight, scale = packed_weight(n, k, levels, -1)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        cases.append(((x, qweight, scale, None, levels, -1), op(x, qweight, scale, None, levels, -1)))
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                results += [(op(*args), expected) for args, expected in cases]
    torch.cuda.synchronize()
    assert all(torch.equal(actual, expected) for actual, expected in results)
    for args, expected in cases:
        x, qweight, scale, _, levels, group_size = args
        weight = ref.unpack(qweight, scale, levels, group_size, x.shape[-1], torch.float64)
        assert error(expected, x.double() @ weight.t()) < 2 * torch.finfo(x.dtype).eps


def test_packed_linear_in_the_graphs_of_torch_compile():
    """Whose pool must hold nothing that outlives a call: what is kept for k in parts lies elsewhere."""
    levels = levels_of("pow2", 2)
    qweight, scale = packed_weight(160, 8192, levels, -1)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def product(x):
        return torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1) + 1

    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 8192, device="cuda", dtype=torch.bfloat16)
            actual = product(x).clone()
            expected = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1) + 1
            assert torch.equal(actual, expected)


def test_gradients_of_packed_linear():
    levels = levels_of("pow2", 2)
    qweight, scale = packed_weight(33, 70, levels, -1)
    x = torch.randn(3, 70, device="cuda", requires_grad=True)
    scale.requires_grad_()
    torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1).sum().backward()
    weight = ref.unpack(qweight, scale.detach(), levels, -1, 70, torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 70))
    assert scale.grad.shape == (33, 1) and scale.grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_a_device_that_is_not_current():
    levels = levels_of("pow2", 2)
    qweight, scale = packed_weight(64, 256, levels, -1)
    x = torch.randn(3, 256, device="cuda")
    expected = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1)
    moved = (t.to("cuda:1") for t in (x, qweight, scale))
    x, qweight, scale = moved
    actual = torch.ops.blaq.packed_linear(x, qweight, scale, None, levels, -1)
    assert actual.device.index == 1 and torch.equal(actual.cpu(), expected.cpu())


def test_tensors_on_different_devices_are_refused():
    levels = levels_of("pow2", 2)
    qweight, scale = packed_weight(64, 256, levels, -1)
    with pytest.raises(ValueError, match="input must be on qweight's device cuda:0, got cpu"):
        torch.ops.blaq.packed_linear(torch.randn(3, 256), qweight, scale, None, levels, -1)

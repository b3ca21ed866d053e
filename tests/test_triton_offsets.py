"""More than 2^31 elements: offsets into memory that is mapped and hardly touched, of one program each."""

import numpy as np
import pytest
import torch
from quantized import same_bits
from test_triton_packed import packed_weight, random_codes, tensor

from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

pytest.importorskip("triton")
import triton.language as tl

from blaq_kernels.triton import launch
from blaq_kernels.triton import packed_linear as linear
from blaq_kernels.triton.blend import BLOCK, blend_kernel
from blaq_kernels.triton.fake_quantize import fake_quantize_kernel, tile_of
from blaq_kernels.triton.linear_plans import ConvPlan, Plan
from blaq_kernels.triton.pack import BYTES, ROWS, pack_kernel
from blaq_kernels.triton.packed_conv2d import convolve, packed_conv2d
from blaq_kernels.triton.scaled_update import scaled_update_kernel
from blaq_kernels.triton.unpack import unpack_kernel

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")
FAR = 2**31
LONG = 2**26  # elements of a row, of which 33 end beyond FAR
LEVELS = levels_of("pow2", 2)


def mapped(count, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(np.empty(count * size, dtype=np.uint8)).view(dtype)


@pytest.fixture
def program(monkeypatch):
    """Makes a launch of one program that of another."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def choose(index):
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (index, 0, 0)))

    return choose


def test_elementwise(program):
    x, y, out = (mapped(FAR + 5, torch.float16) for _ in range(3))
    x[FAR:], y[FAR:] = torch.arange(5) * 4 - 8, torch.arange(5) * 4 + 4  # exact
    program(FAR // BLOCK)
    blend_kernel[(1,)](x, y, out, FAR + 5, 0.25, 0.75, tl.float32, BLOCK)
    assert torch.equal(out[FAR:], ref.blend(x[FAR:], y[FAR:], 0.25))
    scaled_update_kernel[(1,)](x, x, y, out, FAR + 5, tl.float32, BLOCK)
    torch.testing.assert_close(out[FAR:], ref.scaled_update(x[FAR:], x[FAR:], y[FAR:]))


def test_fake_quantize_and_pack(program):
    rows, cols = tile_of(LONG)
    across = LONG // cols
    latent, out = mapped(33 * LONG, torch.float16), mapped(33 * LONG, torch.float16)
    part, scale = tensor(1, cols, dtype=torch.float16), torch.tensor([0.5])
    latent[FAR:FAR + cols] = part
    program(across * (32 // rows))
    fake_quantize_kernel[(1,)](latent, scale, out, 33, LONG, 1, 0, across, tuple(LEVELS),
                               tuple(ref.midpoints(LEVELS)), False, rows, cols)
    assert torch.equal(out[FAR:FAR + cols], ref.fake_quantize(part, scale, LEVELS, 0)[0])

    codes, planes = mapped(33 * LONG, torch.uint8), mapped(2 * 33 * LONG // 8, torch.uint8)
    codes[FAR:FAR + 8 * BYTES] = part = random_codes((8 * BYTES,), LEVELS)
    across = LONG // (8 * BYTES)
    program(across * (32 // ROWS))
    pack_kernel[(1,)](codes, planes, 33, LONG, LONG // 8, 33 * LONG // 8, across, 2, ROWS, BYTES)
    assert torch.equal(planes.view(2, 33, -1)[:, 32, :BYTES], ref.pack(part[None], 2)[:, 0])


@pytest.mark.parametrize("bits,row_bytes", [(2, 2**26), (4, 2**25)])
def test_planes(bits, row_bytes):
    """The last plane starts beyond 2^31 bytes: by a stride that is longer, or by three that are not."""
    levels, n, k = levels_of("pow2", bits), 33, 64
    planes = ref.pack(random_codes((n, k), levels), bits)
    buffer = mapped(bits * n * row_bytes, torch.uint8)
    buffer.view(bits, n, row_bytes)[:, :, :k // 8] = planes
    out, scale = torch.empty(n, k), torch.ones(1)
    unpack_kernel[(5,)](buffer, scale, out, n, k, row_bytes, n * row_bytes, 0, 1, 1, "powers", (), bits,
                        False, 8, 64)
    assert same_bits(out, ref.unpack(planes, scale, levels, 0, k, torch.float32))


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_linear(interleaved):
    """Rows of inputs and of the weight that begin beyond 2^31."""
    m, n, k = 33, 33, 64
    qweight, scale = packed_weight(n, k, LEVELS, -1)
    x, planes = mapped(m * LONG, torch.bfloat16).view(m, LONG), mapped(2 * n * LONG, torch.uint8)
    x[:, :k] = tensor(m, k)
    planes.view(2, n, LONG)[:, :, :k // 8] = qweight
    plan = Plan(cols=16, rows=64, bytes=16, warps=4, stages=1, interleaved=interleaved)
    product = linear._launches(m, torch.Size((2, n, LONG)), k, LONG, x.dtype, x.device, scale.dtype,
                               True, LEVELS, -1, plan)
    out = torch.empty(m, n, dtype=x.dtype)
    product(x, planes, scale, None, out)
    torch.testing.assert_close(out, ref.packed_linear(x[:, :k], qweight, scale, None, LEVELS, -1),
                               rtol=2**-7, atol=0.05)


def test_packed_conv2d():
    """Images that begin beyond 2^31; rows so far apart that taps would go to torch's convolution."""
    qweight, scale = packed_weight(20, 9, LEVELS, -1)
    rest = (qweight, scale, None, LEVELS, -1, (3, 3), (1, 1), (0, 0), (1, 1), 1)
    memory = mapped(FAR + 64, torch.bfloat16)
    for strides, size in (((FAR, 1, 3, 1), (2, 1, 3, 3)), ((0, 1, FAR // 2, 1), (1, 1, 3, 3))):
        x = memory.as_strided(size, strides).copy_(tensor(*size))
        expected = ref.packed_conv2d(x.contiguous(), *rest)
        actual = packed_conv2d(x, *rest)
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0.05)
    x = memory.as_strided((2, 1, 3, 3), (FAR, 1, 3, 1))
    out = torch.empty(2, 20, 1, 1, dtype=x.dtype)
    convolve(x, *rest, out, ConvPlan(cols=16, rows=32, bytes=16, warps=4, stages=1))
    torch.testing.assert_close(out, ref.packed_conv2d(x.contiguous(), *rest), rtol=2**-7, atol=0.05)

"""packed_conv2d in 8-bit arithmetic: its error, its layout, and what it leaves to the exact kernels."""

import pytest
import torch
from torch.nn.functional import conv2d

import blaq
import blaq_kernels
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

ops = torch.ops.blaq
BUDGET = {"exact": 1e-6, "high": 4e-4, "fast": 1e-2}
CODEBOOKS = [("binary", 1), ("ternary", 2), ("pow2", 2), ("uniform", 2), ("pow2", 3), ("linear", 3),
             ("pow2", 4), ("linear", 4)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# batch, channels, height, width, out, kernel, stride, padding, dilation, groups
CONVS = [
    (2, 64, 9, 7, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 40, 8, 8, 32, (3, 3), (2, 1), (1, 0), (1, 2), 2),
    (2, 300, 5, 6, 64, (1, 1), (2, 2), (0, 0), (1, 1), 1),  # two units a pixel, and unused pixels
    (1, 32, 12, 1, 17, (5, 1), (1, 1), (2, 0), (1, 1), 1),  # a tile of places spans many lines
    (3, 33, 3, 3, 16, (3, 3), (3, 3), (2, 2), (3, 3), 1),
    (1, 16, 20, 17, 128, (2, 3), (1, 2), (0, 3), (2, 1), 1),
]
needs_int8 = pytest.mark.skipif(not blaq_kernels.has_int8(),
                                reason="this processor has no AVX-512 with VBMI and VNNI")


@pytest.fixture(autouse=True)
def one_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Convolution:
    """A random convolution, its float64 result, and the op."""

    def __init__(self, book, conv, group_size=0, dtype=torch.float32, layout=LAYOUTS[0]):
        batch, channels, height, width, self.out, self.kernel, *self.tail = conv
        self.levels, self.group_size, self.groups = levels_of(*book), group_size, self.tail[-1]
        self.taps = self.kernel[0] * self.kernel[1]
        self.k = channels // self.groups * self.taps
        bits = blaq.bits_of(self.levels)
        codes = torch.randint(len(self.levels), (self.out, self.k), dtype=torch.uint8)
        sign = torch.randint(2, codes.shape, dtype=torch.uint8) << (bits - 1)
        if self.levels[0] == 0:
            sign[codes == 0] = 0
        self.qweight = ops.pack(codes | sign, bits)
        self.scale = torch.rand(ref.scale_shape(codes.shape, group_size)) + 0.5
        self.x = torch.randn(batch, channels, height, width).to(dtype, memory_format=layout)
        self.bias = torch.randn(self.out).to(dtype)
        self.repacked = (ops.repack(self.qweight) if group_size > 0 else
                         ops.conv_repack(self.qweight, self.k, self.taps, self.groups))

    def weight(self, dtype=torch.float64):
        scale = self.scale.double() if dtype == torch.float64 else self.scale
        flat = ref.unpack(self.qweight, scale, self.levels, self.group_size, self.k, dtype)
        return flat.reshape(self.out, -1, *self.kernel)

    def exact(self):
        own = torch.float64 if self.x.dtype == torch.float32 else self.x.dtype
        return conv2d(self.x.double(), self.weight(own).double(), self.bias.double(), *self.tail)

    def __call__(self, accuracy, x=None, repacked=True, **options):
        return ops.packed_conv2d(self.x if x is None else x, self.qweight, self.scale, self.bias,
                                 self.levels, self.group_size, self.kernel, *self.tail,
                                 self.repacked if repacked else None, accuracy, **options)


def relative_error(actual, exact):
    return float((actual.detach().double() - exact).norm() / exact.norm())


@pytest.fixture(params=blaq_kernels.cpu_capabilities() or ["none"])
def any_capability(request):
    before = blaq_kernels.cpu_capability()
    blaq_kernels.set_cpu_capability(request.param)
    yield
    blaq_kernels.set_cpu_capability(before)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "channels", "taps", "groups"), [
    (16, 32, 1, 1), (1, 1, 1, 1), (70, 65, 9, 1), (64, 16, 6, 2), (9, 3, 25, 3), (32, 0, 1, 1),
    (17, 200, 4, 1), (32, 128, 9, 1), (16, 64, 12, 1), (4, 70, 128, 2)])
def test_conv_repack_equals_the_reference(any_capability, n, channels, taps, groups, bits):
    torch.manual_seed(n)
    k = channels * taps
    qweight = ref.pack(torch.randint(2**bits, (n, k), dtype=torch.uint8), bits)
    if k % 8:
        qweight[..., -1] |= 0x80  # bits past the last weight are no one's
    expected = ref.conv_repack(qweight, k, taps, groups)
    actual = ops.conv_repack(qweight, k, taps, groups)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("n, channels, taps, groups", [(6, 2, 9, 2), (16, 32, 1, 1), (70, 45, 4, 2)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unrepack_inverts_conv_repack(bits, n, channels, taps, groups):
    torch.manual_seed(n)
    k = channels * taps
    qweight = ref.pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    repacked = ops.conv_repack(qweight, k, taps, groups)
    assert torch.equal(ops.unrepack(repacked, bits, n, k), qweight)
    assert torch.equal(ref.unrepack(repacked, bits, n, k), qweight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("group_size", [0, -1, 32])
@pytest.mark.parametrize("book", CODEBOOKS, ids=str)
def test_error_is_within_the_budget(book, group_size, layout):
    for conv in CONVS:
        convolution = Convolution(book, conv, group_size, layout=layout)
        exact = convolution.exact()
        for accuracy, budget in BUDGET.items():
            actual = convolution(accuracy)
            assert relative_error(actual, exact) <= budget, (conv, accuracy)
            assert actual.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("book", [("binary", 1), ("pow2", 2), ("pow2", 4)], ids=str)
def test_sixteen_bit_inputs_meet_the_rounded_weight(book, dtype, layout):
    epsilon = torch.finfo(dtype).eps / 2  # the result is rounded once
    for conv, group_size in zip(CONVS[:4], (-1, 0, -1, 0), strict=True):
        convolution = Convolution(book, conv, group_size, dtype, layout)
        convolution.scale *= 37
        exact = convolution.exact()
        for accuracy in ("high", "fast"):
            actual = convolution(accuracy)
            assert actual.dtype == dtype
            assert relative_error(actual, exact) <= BUDGET[accuracy] + epsilon


@needs_int8
@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("book", [("binary", 1), ("pow2", 2), ("pow2", 4)], ids=str)
def test_a_result_depends_on_nothing_but_the_pixels_under_the_kernel(book, accuracy):
    for conv in (CONVS[0], CONVS[1], CONVS[3]):
        convolution = Convolution(book, (7, *conv[1:]))
        x, expected = convolution.x, convolution(accuracy)
        assert not torch.equal(expected, convolution("exact"))
        odd = torch.randn(7, *x.shape[2:], x.shape[1] + 3)[..., 3:].permute(0, 3, 1, 2).copy_(x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for layout in (x, x.contiguous(memory_format=torch.channels_last), odd):
                assert torch.equal(convolution(accuracy, layout), expected)
            assert torch.equal(convolution(accuracy, x[2:3]), expected[2:3])


@needs_int8
def test_padding_adds_exactly_nothing():
    conv = (1, 64, 4, 4, 32, (3, 3), (1, 1), (5, 5), (1, 1), 1)
    for book in CODEBOOKS:
        convolution = Convolution(book, conv)
        for accuracy in BUDGET:
            y = convolution(accuracy)
            assert torch.equal(y[0, :, 0], convolution.bias[:, None].expand(32, 12))
            assert torch.equal(y[0, :, -1], y[0, :, 0])


@needs_int8
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("book", [("binary", 1), ("pow2", 2), ("pow2", 4)], ids=str)
def test_a_pixel_that_is_no_number_reaches_the_kernel_around_it(book, accuracy, layout):
    conv = (2, 64, 9, 12, 32, (3, 3), (1, 1), (1, 1), (1, 1), 2)
    convolution = Convolution(book, conv, layout=layout)
    clean, x = convolution(accuracy), convolution.x.clone()
    x[0, 5, 2, 2], x[0, 40, 7, 9], x[1, 63, 0, 0] = torch.nan, torch.inf, -torch.inf
    x[1, :, 5:8, 5:8] *= 1e-36  # their unit would be subnormal
    actual, expected = convolution(accuracy, x), conv2d(
        x, convolution.weight(torch.float32), convolution.bias, *convolution.tail)
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(actual), special(expected))
    touched = torch.zeros(2, 1, 9, 12)
    touched[0, 0, 2, 2] = touched[0, 0, 7, 9] = touched[1, 0, 0, 0] = 1
    touched[1, 0, 5:8, 5:8] = 1
    reached = (conv2d(touched, torch.ones(1, 1, 3, 3), padding=1) > 0).expand_as(actual)
    assert torch.equal(actual[~reached], clean[~reached])
    finite = expected.isfinite()
    assert relative_error(actual[finite], expected[finite].double()) <= BUDGET[accuracy]


@needs_int8
def test_channels_far_above_others_cost_only_their_pixels():
    convolution = Convolution(("binary", 1), (1, 512, 6, 6, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1))
    clean, x = convolution("fast"), convolution.x.clone()
    x[0, :, 3, 3] *= 1e4
    actual = convolution("fast", x)
    assert torch.equal(actual[..., :3, :], clean[..., :3, :])
    x[:, 5] *= 100  # half of the units know nothing of it
    exact = conv2d(x.double(), convolution.weight(), convolution.bias.double())
    assert relative_error(convolution("fast", x), exact) <= 4e-2


@pytest.mark.parametrize("accuracy", BUDGET)
def test_relu_is_the_last_step(accuracy):
    for conv in (*CONVS[:3], (2, 6, 11, 5, 6, (5, 3), (2, 2), (2, 2), (2, 1), 6)):
        convolution = Convolution(("binary", 1), conv, -1)
        for repacked in (True, False):
            plain = convolution(accuracy, repacked=repacked)
            plain[0, 0, 0, 0] = 0
            rectified = convolution(accuracy, repacked=repacked, relu=True)
            rectified[0, 0, 0, 0] = 0
            assert torch.equal(rectified, plain.relu())
            assert rectified.is_contiguous(memory_format=LAYOUTS[0])


def test_relu_keeps_what_is_no_number():
    convolution = Convolution(("binary", 1), CONVS[0])
    convolution.x[0, 0, 4, 4] = torch.nan
    for accuracy in BUDGET:
        y = convolution(accuracy, relu=True)
        assert y[0, :, 3:6, 3:6].isnan().all() and int(y.isnan().sum()) == 9 * 70


def test_a_layer_repacks_by_its_grouping():
    for group_size in (0, -1, 36):
        layer = torch.nn.Conv2d(32, 32, 3, padding=1)
        with torch.no_grad():
            scale = torch.full(ref.scale_shape(layer.weight.shape, group_size), 0.05)
            layer.weight.copy_(ops.fake_quantize(layer.weight, scale, (1.0,), group_size))
        packed = blaq.pack(torch.nn.Sequential(layer), bits=1, group_size=group_size)[0]
        x = torch.randn(1, 32, 6, 6)
        exact = conv2d(x.double(), packed.weight.double(), packed.bias.detach().double(), padding=1)
        for accuracy, budget in BUDGET.items():
            packed.accuracy = accuracy
            assert relative_error(packed(x), exact) <= budget
        if packed.repacked() is not None:
            assert packed.repacked().dim() == (1 if group_size > 0 else 5)

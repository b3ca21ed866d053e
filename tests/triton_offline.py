"""Calls every training op with Triton's own compiler for a GPU that is not here: what a first call
there would compile, from the arguments that the op really passes. Nothing is launched."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
compiled = {}


def compile_only(self, *args, grid, warmup, **kwargs):
    backend = make_backend(TARGET)
    bind = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attrs = self._pack_args(backend, kwargs, bound, specialization,
                                                           options)
    key = f"{self.__name__} {signature} {constants} {attrs} {options}"
    if key not in compiled:
        compiled[key] = triton.compile(ASTSource(self, signature, constants, attrs),
                                       target=TARGET, options=options.__dict__)
        assert compiled[key].metadata.shared <= 227 << 10, key  # of a multiprocessor's memory


JITFunction.run = compile_only

import blaq_kernels  # noqa: E402
from blaq_kernels.triton import launch  # noqa: E402
from blaq_kernels.triton.blend import blend  # noqa: E402
from blaq_kernels.triton.fake_quantize import fake_quantize  # noqa: E402
from blaq_kernels.triton.fused_step import fused_step  # noqa: E402
from blaq_kernels.triton.fused_trial import fused_trial  # noqa: E402
from blaq_kernels.triton.pack import pack  # noqa: E402
from blaq_kernels.triton.packed_conv2d import packed_conv2d  # noqa: E402
from blaq_kernels.triton.packed_linear import packed_linear  # noqa: E402
from blaq_kernels.triton.scaled_update import scaled_update  # noqa: E402
from blaq_kernels.triton.solve import solve  # noqa: E402
from blaq_kernels.triton.unpack import unpack  # noqa: E402

launch.interpreted = lambda: True  # tensors of the CPU will do: only their types count


def steps(shapes, levels, group_size, method, dtype, found_inf=None, clip=0.0):
    def new(dtype):
        return [torch.zeros(s, dtype=dtype) for s in shapes]

    scales = [torch.ones(blaq_kernels.reference.scale_shape(s, group_size)) for s in shapes]
    state = [new(torch.float32) for _ in range(3)]
    end = (0.9, 0.999, 1e-8, 0.01, clip, levels, group_size, 3, method, found_inf, found_inf)
    lr, step = torch.tensor(0.1), torch.tensor(1.0, dtype=torch.float64)
    params, grads, trial = new(dtype), new(dtype), new(dtype)
    fused_trial(params, grads, *state, scales, lr, step, *end)
    flips = torch.zeros(len(shapes), dtype=torch.int64)
    fused_step(params, grads, trial, *state, scales, lr, step, torch.tensor(0.6), *end, flips)
    fused_step(params, grads, [], *state, scales, lr, step, torch.tensor(1.0), *end)


pow2, zero = [0.125, 0.25, 0.5, 1.0], [0.0, 1.0]
steps([(4, 64), (7, 33), (3, 600)], pow2, -1, "alternating", torch.bfloat16, torch.zeros(()), 0.5)
steps([(4, 64), (7, 33)], zero, 16, "exact", torch.float16)
steps([(100, 100), (9,)], [1.0], 0, "alternating", torch.float32, torch.zeros(()))
steps([(100, 100)], pow2, 0, "alternating", torch.bfloat16, torch.zeros(()), 0.5)
steps([(100, 100)], zero, 0, "exact", torch.float32)
for shape in ((5, 40), (100, 100)):
    w = torch.rand(shape)
    for method in ("alternating", "exact"):
        solve(w, w, None, pow2, 0, 3, method)
        solve(w, w, torch.ones(1), zero, 0, 3, method)
for dtype in (torch.float32, torch.float64):
    x = torch.rand(10, dtype=dtype)
    scaled_update(x, x, x)
    blend(x, x, 0.5)


def packed(m, n, k, levels, group_size, dtype):
    bits = blaq_kernels.reference.bits_of(levels)
    qweight = pack(torch.zeros(n, k, dtype=torch.uint8), bits)
    scale = torch.ones(blaq_kernels.reference.scale_shape((n, k), group_size))
    unpack(qweight, scale, levels, group_size, k, dtype)
    fake_quantize(torch.zeros(n, k, dtype=dtype), scale, levels, group_size)
    packed_linear(torch.zeros(m, k, dtype=dtype), qweight, scale, torch.zeros(n, dtype=dtype), levels,
                  group_size)
    if k % 9 == 0:
        packed_conv2d(torch.zeros(1, k // 9, 7, 7, dtype=dtype), qweight, scale, None, levels,
                      group_size, (3, 3), (1, 1), (1, 1), (1, 1), 1)


packed(1, 1, 1, [1.0], 0, torch.bfloat16)
packed(3, 37, 203, pow2, -1, torch.float32)
packed(1, 256, 576, pow2, 0, torch.float16)
for m in (40, 200, 1000):
    packed(m, 256, 2048, pow2, -1, torch.bfloat16)
    packed(m, 256, 2048, [0.2, 0.6, 1.0], 32, torch.bfloat16)
packed(200, 256, 2052, zero, 5, torch.float16)
packed(1, 256, 2048, pow2, 128, torch.bfloat16)
assert any("blend_kernel" in key and "'a': 'fp64'" in key for key in compiled)
names = sorted({key.split()[0] for key in compiled})
print(len(compiled), *names)

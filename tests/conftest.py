"""Without a GPU, Triton kernels run in Triton's interpreter, which must be asked for before Triton is
imported: by whichever test comes first."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _mend_interpreter():
    """Three faults of Triton 3.6's interpreter: a loop's bounds fail with NumPy 2.4, which turns no
    array of one element into an integer; float32 is cut to bfloat16, where GPUs round; a product of
    bfloat16 multiplies their bits as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounding_cast(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        wide = torch.from_numpy(np.ascontiguousarray(source.data))
        return handle(wide.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def widening_dot(self, a, b, c, *rest):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, c, *rest)

    interpreter._patch_lang_tensor = patched
    builder.cast_impl = rounding_cast
    builder.create_dot = widening_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _mend_interpreter()


def pytest_collection_modifyitems(items):
    """``BLAQ_TEST_SHARD=i/n`` keeps every n-th test from the i-th: n processes share a run."""
    if shard := os.environ.get("BLAQ_TEST_SHARD"):
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]

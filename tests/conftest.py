"""Without a GPU, Triton kernels run in Triton's interpreter, which must be asked for before Triton is
imported: by whichever test comes first."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_bfloat16():
    """To nearest even, as GPUs do it: the interpreter alone truncates."""
    from blaq_kernels import triton as kernels

    if kernels.unavailable() or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder, cast = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            narrow = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(narrow.reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, target)

    builder.cast_impl = rounded
    yield
    builder.cast_impl = cast

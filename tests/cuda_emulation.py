"""Builds tests/cuda/<name>.cpp: CUDA kernels for the host emulation of csrc/cuda/emulate.h, by g++.

``library("name").function(...)`` calls a ``BLAQ_TEST_EXPORT const char*`` function with numpy arrays
(their address), integers and floats (double); an error text that it returns raises :class:`Fault`.
"""

import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++20", "-O0", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique",
         "-ffp-contract=off", "-Wno-unknown-pragmas",  # unroll is nvcc's
         "-U_FORTIFY_SOURCE")  # it would forbid to jump between stacks
ORDERS = (0, 1, 7)  # of a block's threads: ascending, descending, shuffled

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Fault(Exception):
    """A kernel broke a rule that the emulation watches."""


class Library:
    def __init__(self, path):
        self._native = ctypes.CDLL(path)

    def __getattr__(self, name):
        function = getattr(self._native, name)
        function.restype = ctypes.c_char_p

        def call(*args):
            message = function(*map(_argument, args))
            if message:
                raise Fault(message.decode())

        return call


def _argument(x):
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, np.ndarray):
        assert x.flags.c_contiguous
        return ctypes.c_void_p(x.ctypes.data)
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)


@functools.cache
def library(name):
    """Compiled once a session."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, f"{name}.so")
        done = subprocess.run(["g++", *FLAGS, f"-I{ROOT / 'csrc'}", ROOT / f"tests/cuda/{name}.cpp",
                               "-o", out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return Library(out)


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(array, offset=0):
    """A copy that ends at a page which nobody may touch, 16-byte aligned plus ``offset`` bytes. What is
    left up to that page, less than 16 bytes, and what is before are 0xff."""
    array = np.ascontiguousarray(array)
    page = mmap.PAGESIZE
    pages = -(-(array.nbytes + 32) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    whole = np.frombuffer(memory, np.uint8)
    whole[:pages * page] = 0xff
    if _libc.mprotect(ctypes.c_void_p(whole.ctypes.data + pages * page), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = (pages * page - array.nbytes - offset) // 16 * 16 + offset
    view = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    view[...] = array
    return view

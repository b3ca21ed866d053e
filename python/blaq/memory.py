"""Pages of memory that a file backs."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

__all__ = ["page_out"]

MADV_PAGEOUT = 21  # linux/mman.h, since Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Give the system the pages that hold a contiguous CPU tensor. Its values stay: pages that
    equal their file are read from there at the next access, changed ones are written to swap first.
    Does nothing on systems other than Linux, or where it declines."""
    if sys.platform != "linux" or not tensor.numel():
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)

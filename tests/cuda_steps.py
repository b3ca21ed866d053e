"""The training kernels of csrc/cuda: those of a GPU that is here, or the emulation's on tensors of
the CPU."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_emulation import Fault, library

from blaq_kernels import step_lists
from blaq_kernels.cuda import call, plan

ON_GPU = torch.cuda.is_available()


def emulated(order=0):
    """Kernels whose threads run in this order (cuda_emulation.ORDERS)."""
    native = library("step")._native
    names = []
    for name in ("call_integers", "call_numbers", "table_columns"):
        getattr(native, name).restype = ctypes.c_char_p
        names.append(getattr(native, name)().decode())
    native.run_call.restype = ctypes.c_char_p

    def run(integers, numbers):
        integers, numbers = np.array(integers, np.int64), np.array(numbers, np.float64)
        message = native.run_call(ctypes.c_void_p(integers.ctypes.data),
                                  ctypes.c_void_p(numbers.ctypes.data), ctypes.c_uint32(order))
        if message:
            raise Fault(message.decode())

    return call.Native.of(*names, run, emulated=True)


def forget():
    """Lists that are known keep how they were planned."""
    plan.parts.cache_clear()
    step_lists._known.clear()


@pytest.fixture
def kernels(monkeypatch):
    """The kernels at hand. ``kernels(order)`` has the emulation run threads in another order."""
    def use(order=0):
        forget()
        if not ON_GPU:
            monkeypatch.setattr(call, "_native", emulated(order))

    use()
    yield use
    forget()


@pytest.fixture
def all_long(monkeypatch):
    """No group is Triton's."""
    monkeypatch.setattr(plan, "LONG_FROM", 1)


@pytest.fixture(params=["whole", "cut"])
def cut(request, monkeypatch, all_long):
    """Groups of one block, and groups of several parts in several runs."""
    if request.param == "cut":
        for name, value in (("WHOLE_MOST", 0), ("PART_LEAST", plan.TILE), ("PARTS", 1 << 30)):
            monkeypatch.setattr(plan, name, value)
        for module in (plan, call):
            monkeypatch.setattr(module, "RUN", 2)
    return request.param == "cut"

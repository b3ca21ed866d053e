"""The training kernels of csrc/cuda: those of a GPU that is here, or the emulation's on tensors of
the CPU."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_emulation import library

from blaq_kernels import cuda, step_lists
from blaq_kernels.cuda import call, plan

ON_GPU = torch.cuda.is_available()


def fields():
    """Names of a call's integers and numbers, and of the table's columns, as the kernels have them."""
    native = library("step")._native
    found = []
    for name in ("call_integers", "call_numbers", "table_columns"):
        getattr(native, name).restype = ctypes.c_char_p
        found.append(tuple(getattr(native, name)().decode().split()))
    return found


def emulated(order=0):
    """Runs a call's kernels, threads in this order (cuda_emulation.ORDERS)."""
    kernels = library("step")

    def run(integers, numbers):
        kernels.run_call(np.array(integers, np.int64), np.array(numbers, np.float64), order)

    return run


def forget():
    """Lists that are known keep how they were planned."""
    plan.parts.cache_clear()
    step_lists._known.clear()


@pytest.fixture
def kernels(monkeypatch):
    """The kernels at hand. ``kernels(order)`` has the emulation run threads in another order."""
    def use(order=0):
        forget()
        if ON_GPU:
            cuda.load()
        else:
            monkeypatch.setattr(call, "emulation", emulated(order))

    if ON_GPU and cuda.unavailable():
        pytest.skip(cuda.unavailable())
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

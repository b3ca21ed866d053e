"""What host code of GPU kernels asks of a device: whether it is the current one, its stream, its
scalars."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_HERE = nullcontext()
_CPU = torch.device("cpu")  # compared, since a device makes its type's name anew whenever it is asked


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current: kernels are launched on the current device and stream."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as a number."""
    return 0 if device == _CPU else torch._C._cuda_getCurrentRawStream(device.index)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes what the current stream of the current device is given."""
    return device != _CPU and torch.cuda.is_current_stream_capturing()


def kept_empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that stays from call to call of the current stream.

    Whoever warms up for a graph (torch.compile, ``torch.cuda.use_mem_pool``) has what a thread
    allocates come from the graph's pool, where nothing may outlive the call: so a thread of its own
    allocates."""
    if device == _CPU:
        return torch.empty(count, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device)

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(count, dtype=dtype, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


def on_same_device(x: Tensor, device: torch.device) -> Tensor:
    """A 0-dim tensor as kernels read it. One on the CPU is written to the device without waiting for
    it: a captured graph replays that value, so what a graph is to follow belongs on the device."""
    if x.device == device:
        return x
    return torch.full((), x.item(), dtype=x.dtype, device=device)


def aligned(*tensors: Tensor) -> bool:
    """Whether every tensor begins where a 128-bit load may."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)

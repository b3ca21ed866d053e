"""The second evaluation of a step sees what the first saw: same dropout masks, same buffers.

``BLAQ.step(closure)`` does this itself. A loop that calls ``trial_step`` and ``step`` writes::

    random_state = blaq.RandomState()                # before the forward pass
    loss_of(model(x), y).backward()
    opt.trial_step()                                 # the model now holds its trial weights
    with blaq.trial_pass(model, random_state):
        loss_of(model(x), y).backward()
    opt.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blaq_kernels.rules import require

__all__ = ["RandomState", "evaluate", "modules_with_buffers", "trial_pass"]


class RandomState:
    """State of torch's generators (CPU, and CUDA where it is in use) at the time of the call."""

    def __init__(self) -> None:
        self.cpu: Tensor = torch.get_rng_state()
        self.cuda: list[Tensor] = []
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.cuda = torch.cuda.get_rng_state_all()

    def restore(self) -> None:
        """Make the generators draw again what they drew from here on."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def modules_with_buffers(model: nn.Module) -> list[nn.Module]:
    """The modules that own a buffer: what an evaluation may change besides gradients."""
    return [m for m in model.modules() if any(b is not None for b in m._buffers.values())]


@contextmanager
def trial_pass(modules: nn.Module | Iterable[nn.Module],
               random_state: RandomState | None = None) -> Iterator[None]:
    """Evaluate at the trial weights without leaving a trace (algorithm.md, stage 1, step 5).

    On leaving, also by an exception, every buffer (batch norm's running statistics and its count)
    and every generator is as on entering. Inside, batch norm normalises by the batch as ever.
    Buffers are copied and put back rather than frozen: this holds for any module, compiled or not.

    Args:
        modules: the model, or the modules whose buffers are kept.
        random_state: taken before the first evaluation; replayed inside. None: nothing is replayed.
    """
    if isinstance(modules, nn.Module):
        modules = modules_with_buffers(modules)
    saved = [(module, name, buffer, buffer.clone()) for module in modules
             for name, buffer in module._buffers.items() if buffer is not None]
    entered = RandomState()
    if random_state is not None:
        random_state.restore()
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                buffer.copy_(value)
                if module._buffers[name] is not buffer:  # the pass replaced it
                    module._buffers[name] = buffer
        entered.restore()


def evaluate(closure: Callable[[], Any]) -> Any:
    """Run a closure with gradients on; its loss must be a scalar."""
    with torch.enable_grad():
        loss = closure()
    scalar = isinstance(loss, Tensor) and loss.numel() == 1 or isinstance(loss, int | float)
    require(scalar, "BLAQ.step", "closure", "return the loss, a scalar",
            f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss))
    return loss

"""SAQ, sharpness-aware quantization (Liu et al., 2021, arXiv 2111.12273), on LSQ's quantizer.

Two evaluations a step: the gradient g at the quantized weights; then, at ``ŵ + ε`` with
``ε = ρ g/‖g‖``, the gradient that the step takes, straight through to the latent weights. The norm
is over the quantized weights and the parameters that are not quantized, all of which move by ε;
step sizes do not. The second evaluation replays the random state and leaves batch norm's statistics
alone.

Not implemented: other base quantizers; its combination with mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..trial import RandomState, modules_with_buffers, trial_pass
from .grouped import GroupQuantizer
from .lsq import LSQ

__all__ = ["SAQ"]


def _watch(found: dict[GroupQuantizer, Tensor], quantizer: GroupQuantizer, value: Tensor) -> Tensor:
    value.register_hook(lambda grad: found.update({quantizer: grad}))
    return value


@contextmanager
def _moved(moves: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Parameters at their value and a move; on leaving, as they were to the bit."""
    before = [(param, param.detach().clone()) for param, _ in moves]
    with torch.no_grad():
        for param, move in moves:
            param.add_(move)
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in before:
                param.copy_(value)


class SAQ(LSQ):
    """LSQ by sharpness-aware minimization in the space of quantized weights."""

    OPTIONS: ClassVar = {"rho": 0.1}
    LEAST: ClassVar = {"rho": 0}

    @property
    def evaluations_per_step(self) -> int:
        return 2

    def step(self, closure: Callable[[], Tensor]) -> Any:
        return super().step(partial(self._two, closure))

    def _two(self, closure: Callable[[], Tensor]) -> Tensor:
        """Both evaluations: gradients of the second, loss of the first."""
        random_state = RandomState()
        quantizers = [q for _, q, _ in self.layers if isinstance(q, GroupQuantizer)]
        found: dict[GroupQuantizer, Tensor] = {}
        try:
            for quantizer in quantizers:
                quantizer.probe = partial(_watch, found, quantizer)
            loss = closure()
            moves = self._ascent(found)
            for quantizer in quantizers:
                move = found.get(quantizer)
                quantizer.probe = None if move is None else move.add
            with trial_pass(modules_with_buffers(self.model), random_state), _moved(moves):
                closure()
        finally:
            for quantizer in quantizers:
                quantizer.probe = None
        return loss

    @torch.no_grad()
    def _ascent(self, found: dict[GroupQuantizer, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Turn the quantized weights' gradients into ε, in place, and give the other
        parameters'."""
        quantized = {id(p) for _, q, latent in self.layers for p in (latent, *q.parameters())}
        others = [p for p in self.optimizer.param_groups[0]["params"]
                  if id(p) not in quantized and p.grad is not None]
        grads = [*found.values(), *(p.grad for p in others)]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        factor = self.options["rho"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        for quantizer in found:
            found[quantizer] = found[quantizer] * factor
        return [(p, p.grad * factor) for p in others if p.grad is not None]

"""Batch norm's statistics, estimated again for the weights that ship.

Where training computes with other weights than evaluation does, the running averages belong to the
wrong network.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .quantizer import QuantizerMethod

__all__ = ["EstimatesNorms", "RecentInputs"]


class RecentInputs:
    """The last inputs of a model in training, and what they give batch norm.

    Args:
        model: its first argument is kept, by reference; nothing is where it has no batch norm.
        count: of the inputs that are kept (Nagel et al., 2022: 50).
    """

    def __init__(self, model: nn.Module, count: int = 50) -> None:
        self.model = model
        self.inputs: deque[Tensor] = deque(maxlen=count)
        self.norms = [m for m in model.modules()
                      if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        self._hook = None
        if self.norms:
            self._hook = model.register_forward_pre_hook(self._keep)

    def _keep(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if model.training and torch.is_grad_enabled():
            self.inputs.append(args[0].detach())

    @torch.no_grad()
    def estimate_norms(self) -> None:
        """Set the running statistics to the mean over the inputs, everything but batch norm in
        evaluation mode, and forget the inputs: a resumed run has no others."""
        if not self.inputs:
            return
        was_training = [(m, m.training) for m in self.model.modules()]
        momentum = [norm.momentum for norm in self.norms]
        self.model.eval()
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
            norm.training = True
        while self.inputs:
            self.model(self.inputs.popleft())
        for norm, value in zip(self.norms, momentum, strict=True):
            norm.momentum = value
        for module, training in was_training:
            module.training = training

    def close(self) -> None:
        """Leave the model as it was found."""
        if self._hook is not None:
            self._hook.remove()


class EstimatesNorms(QuantizerMethod):
    """A method that estimates batch norm's statistics again after each epoch."""

    def prepare(self) -> Optimizer:
        self.recent = RecentInputs(self.model)
        return super().prepare()

    def epoch_ended(self, epoch: int) -> None:
        super().epoch_ended(epoch)
        self.recent.estimate_norms()

    def finalize(self) -> nn.Module:
        self.recent.close()
        return super().finalize()

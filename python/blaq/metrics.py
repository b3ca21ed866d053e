"""How restless the quantized weights are: flips, oscillations, and the paper's Table 1.

All read codes and latent weights from the optimizer's state after a step; nothing is kept in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from blaq_kernels.codebook import midpoints
from blaq_kernels.reference import from_groups, to_groups

from .optim import BLAQ
from .quantization import Quantization, quantization_of

__all__ = ["AmplitudeTracker", "OscillationTracker", "flip_ratio"]


def _quantized(optimizer: BLAQ) -> Iterator[tuple[Tensor, Tensor, Quantization]]:
    """(param, latent, quantization) of every parameter of 1 to 4 bits."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            quantization = quantization_of(param)
            if quantization is not None and quantization.flips is not None:
                yield param, optimizer.state[param]["latent"], quantization


def _rank(latent: Tensor, quantization: Quantization) -> Tensor:
    """Signed place of each weight's level, int8: larger is a larger value; -8 to 8. It counts the
    thresholds between levels that the weight has passed, by training's rule for ties: to the larger
    magnitude, and sign(0) = +1."""
    levels = quantization.levels
    w = to_groups(latent, quantization.group_size)
    alpha = quantization.scale.to(w.dtype).reshape(-1, 1)
    place = (w >= 0).to(torch.int8).mul_(2).sub_(1) * (levels[0] != 0.0)
    for mid in midpoints(levels):
        threshold = alpha * mid
        place += w >= threshold
        place -= (w <= -threshold).view(torch.int8)
    return from_groups(place, latent.shape, quantization.group_size)


def flip_ratio(optimizer: BLAQ) -> float:
    """Share of the 1- to 4-bit weights whose code the last step changed; the kernel counted them.

    0.0 before the first step, and where nothing is quantized.
    """
    counts = [(quantization.flips, param.numel())
              for param, _, quantization in _quantized(optimizer) if quantization.flips is not None]
    total = sum(numel for _, numel in counts)
    return sum(int(flips) for flips, _ in counts) / total if total else 0.0


class OscillationTracker:
    """Oscillation frequency of each weight (Nagel et al., 2022, arXiv 2203.11086, Eq. 3).

    An oscillation is a change of code opposite in direction to the weight's last change; its
    frequency is the exponential average f ← (1 - momentum) f + momentum · oscillates. Call
    :meth:`update` after every step. Memory: 6 bytes a weight.

    Args:
        optimizer: whose 1- to 4-bit weights are followed.
        momentum: of the exponential average, in (0, 1]; Nagel et al. use 0.01.
    """

    def __init__(self, optimizer: BLAQ, momentum: float = 0.01) -> None:
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"blaq.OscillationTracker: momentum must be in (0, 1], got {momentum}")
        self.optimizer, self.momentum = optimizer, momentum
        self._seen: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the step that was just made; a weight that is new counts from here on."""
        for param, latent, quantization in _quantized(self.optimizer):
            new = _rank(latent, quantization)
            if param not in self._seen:
                self._seen[param] = (new, torch.zeros_like(new), torch.zeros_like(latent))
            rank, direction, frequency = (seen.view(-1) for seen in self._seen[param])
            frequency.mul_(1.0 - self.momentum)
            at = (new.view(-1) != rank).nonzero().view(-1)  # of the weights, one in thousands
            change = (new.view(-1)[at] - rank[at]).sign()
            frequency[at] += self.momentum * (change * direction[at] < 0)
            direction[at] = change
            rank[at] = new.view(-1)[at]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What was seen, for a checkpoint: three tensors a parameter, in the optimizer's order."""
        seen = [self._seen[param] for param, _, _ in _quantized(self.optimizer)]
        names = ("rank", "direction", "frequency")
        return {name: [entry[i] for entry in seen] for i, name in enumerate(names)}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Go on from :meth:`state_dict`, with an optimizer of the same parameters.

        Raises:
            ValueError: the shapes are other parameters'; nothing was changed.
        """
        mine = self.state_dict()
        for name, tensors in mine.items():
            shapes = [list(t.shape) for t in tensors]
            got = [list(t.shape) for t in state.get(name, [])]
            if got != shapes:
                raise ValueError(f"blaq.OscillationTracker.load_state_dict: {name} must have "
                                 f"shapes {shapes}, got {got}")
        for name, tensors in mine.items():
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)

    def frequency(self) -> float:
        """Mean over all weights."""
        return self._mean(lambda f: f)

    def share_above(self, threshold: float = 0.005) -> float:
        """Share of weights that oscillate more often than ``threshold`` (Nagel et al.: 0.005)."""
        return self._mean(lambda f: f > threshold)

    def _mean(self, of: Callable[..., Tensor]) -> float:
        total = sum(f.numel() for _, _, f in self._seen.values())
        return sum(of(f).double().sum().item() for _, _, f in self._seen.values()) / max(total, 1)


class AmplitudeTracker:
    """The two columns of the paper's Table 1, over a window of steps.

    ``amplitude``: (max - min) / 2 of a latent weight over the window; ``frequency``: how often its
    code changed in the window. Both are means over all 1- to 4-bit weights. Call :meth:`update`
    after every step; :meth:`reset` begins a window. Memory: 11 bytes a weight.
    """

    def __init__(self, optimizer: BLAQ) -> None:
        self.optimizer = optimizer
        self.reset()

    def reset(self) -> None:
        """Begin a window at the weights as they are."""
        self.steps = -1
        self._seen: dict[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the step that was just made; a weight that is new counts from here on."""
        self.steps += 1
        for param, latent, quantization in _quantized(self.optimizer):
            new = _rank(latent, quantization)
            if param not in self._seen:
                changes = torch.zeros_like(new, dtype=torch.int16)
                self._seen[param] = (latent.clone(), latent.clone(), new, changes)
            low, high, rank, changes = self._seen[param]
            torch.minimum(low, latent, out=low)
            torch.maximum(high, latent, out=high)
            changes += new != rank
            rank.copy_(new)

    def amplitude(self) -> float:
        """Mean (max - min) / 2 of the latent weights, in their unit."""
        return self._mean(lambda low, high, changes: (high - low) / 2)

    def frequency(self) -> float:
        """Mean number of code changes of a weight in the window."""
        return self._mean(lambda low, high, changes: changes)

    def per_weight(self) -> tuple[Tensor, Tensor]:
        """Amplitude (float32) and code changes (int16) of every weight, flat, in the order of the
        optimizer's parameters."""
        seen = list(self._seen.values())
        return (torch.cat([((high - low) / 2).flatten() for low, high, _, _ in seen]),
                torch.cat([changes.flatten() for _, _, _, changes in seen]))

    def _mean(self, of: Callable[..., Tensor]) -> float:
        seen = [of(low, high, changes) for low, high, _, changes in self._seen.values()]
        total = sum(x.numel() for x in seen)
        return sum(x.double().sum().item() for x in seen) / max(total, 1)

"""Methods that quantize inside the forward pass: a module from latent weights to quantized ones.

Each quantized layer's weight becomes a parametrization (``torch.nn.utils.parametrize``): the latent
weight is what the optimizer trains, and the layer computes with what the module makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from blaq_kernels.reference import SCALE_TINY

from ..codebook import levels_for
from ..encoding import recover_scale
from ..functional import fake_quantize
from ..param_groups import QUANTIZABLE
from ..quantization import Quantization, record
from .method import Method, clip_, make_optimizer, quantized_layers

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["QuantizerMethod", "WeightQuantizer", "eight_bit", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(latent: Tensor, value: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``latent`` unchanged. Exact, where the usual
    ``latent + (value - latent).detach()`` rounds twice."""
    found: Tensor = _StraightThrough.apply(latent, value)  # type: ignore[no-untyped-call]
    return found


class WeightQuantizer(nn.Module):
    """Latent weight to quantized weight, with the method's own backward.

    Parameters that a subclass registers are trained by the same optimizer, without weight decay;
    its buffers are in the checkpoint. In evaluation mode ``forward`` must return what ships, and
    must draw nothing.

    Args:
        latent: initial weight ``[N, ...]``; not kept.
        bits: of this layer.
        config: of the run; its ``bits`` may be another layer's.
        options: the method's.
    """

    levels: tuple[float, ...] | None = None
    """Codebook that packs the quantized weight, level × scale bit for bit; None: it stays float."""
    group_size: int = 0
    """Weights that share a scale in the packed format."""
    progress: float = 0.0
    """Share of the run that is done; the method keeps it current."""

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__()

    def forward(self, latent: Tensor) -> Tensor:
        raise NotImplementedError

    def penalty(self, latent: Tensor) -> Tensor | None:
        """Scalar that is minimised beside the loss."""
        return None

    def after_step(self, latent: Tensor, curvature: Tensor | None) -> None:
        """After each step, without gradients. ``curvature``: Adam's sqrt(v̂) + eps, like
        ``latent``; None under SGD."""

    def epoch_ended(self, latent: Tensor, epoch: int) -> None:
        """After an epoch's last step, without gradients."""


def eight_bit(latent: Tensor) -> Tensor:
    """Nearest value of the uniform 8-bit grid up to the largest weight."""
    scale = latent.detach().abs().amax().clamp_min(SCALE_TINY).reshape(1)
    return fake_quantize(latent, scale, levels_for("linear", 8))


class EightBit(WeightQuantizer):
    """The uniform 8-bit grid up to the largest weight: what ``first_bits = 8`` asks of a layer."""

    def forward(self, latent: Tensor) -> Tensor:
        return eight_bit(latent)


class QuantizerMethod(Method):
    """Trains latent weights through a :class:`WeightQuantizer` in each quantized layer."""

    quantizer: ClassVar[Callable[..., WeightQuantizer]]
    """Class of the weights' quantizers, or a function of its arguments."""
    clips: ClassVar[bool] = False
    """Whether latent weights stay in [-config.clip, config.clip]."""
    quantizer_lr: ClassVar[float] = 1.0
    """Factor on the learning rate of the quantizers' own parameters."""

    def prepare(self) -> Optimizer:
        config = self.config
        self.layers: list[tuple[nn.Module, WeightQuantizer, Tensor]] = []
        first = next((m for m in self.model.modules() if isinstance(m, QUANTIZABLE)), None)
        for layer, bits in quantized_layers(self.model, config):
            weight: Any = layer.weight
            kind = EightBit if bits == 8 else self.quantizer
            quantizer = kind(weight.detach(), bits, config, self.options).to(weight.device)
            parametrize.register_parametrization(layer, "weight", quantizer)
            if config.activation_bits and self.activation is not None and layer is not first:
                layer.input_quantizer = self.activation(
                    config.activation_bits, config, self.options).to(weight.device)
                layer.register_forward_pre_hook(_quantize_input)
            self.layers.append((layer, quantizer, weight))
        return make_optimizer(self.groups(), config)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups: what is trained as ever, and the quantizers' own."""
        modules = [m for m in self.model.modules() if isinstance(m, WeightQuantizer)]
        learned = list(dict.fromkeys(p for m in modules for p in m.parameters()))
        rest = [p for p in self.model.parameters() if all(p is not q for q in learned)]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if learned:
            groups.append({"params": learned, "weight_decay": 0.0, "lr_scale": self.quantizer_lr})
        return groups

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        for module in self.model.modules():  # quantizers of inputs too
            if isinstance(module, WeightQuantizer):
                module.progress = self.progress
        return super().step(closure)

    def penalty(self) -> Tensor | None:
        terms = [quantizer.penalty(latent) for _, quantizer, latent in self.layers]
        found = [term for term in terms if term is not None]
        if not found:
            return None
        return torch.stack(found).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.clips:
            clip_([latent for _, _, latent in self.layers], self.config.clip)
        for _, quantizer, latent in self.layers:
            if type(quantizer).after_step is not WeightQuantizer.after_step:  # worth a square root
                quantizer.after_step(latent, self.curvature(latent))

    @torch.no_grad()
    def epoch_ended(self, epoch: int) -> None:
        for _, quantizer, latent in self.layers:
            quantizer.epoch_ended(latent, epoch)

    def curvature(self, latent: Tensor) -> Tensor | None:
        """Diagonal of Adam, sqrt(v̂) + eps: BLAQ's D but for the learning rate, which every solve
        cancels. None under SGD, or before the first gradient."""
        state = self.optimizer.state.get(latent, {})
        if "exp_avg_sq" not in state:
            return None
        group = self.optimizer.param_groups[0]
        corrected: Tensor = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
        return corrected.sqrt_().add_(group["eps"])

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        self.model.eval()
        for layer, quantizer, _ in self.layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            weight: Any = layer.weight
            # A packed file has no place for what quantizes inputs: such a network stays float.
            if quantizer.levels is not None and not self.config.activation_bits:
                scale = recover_scale(weight, quantizer.levels, quantizer.group_size)
                record(weight, Quantization(quantizer.levels, quantizer.group_size, scale))
        return self.model


def _quantize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Any = layer.input_quantizer
    return (quantizer(args[0]), *args[1:])

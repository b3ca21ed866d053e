"""What the training loop asks of a method, and what most methods answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from blaq_kernels.rules import require

from ..param_groups import param_groups

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["FullPrecision", "Method", "groups_of", "make_optimizer", "quantized_layers"]

Groups = list[dict[str, Any]]


class Method:
    """How a network's weights are trained, and what they are in the end.

    The loop calls ``set_lr`` and ``step`` for each batch, ``epoch_ended`` after an epoch's last,
    and measures inside ``evaluating()``. ``finalize`` ends the run. What must outlive an
    interruption is in the model's ``state_dict`` or the method's.

    A subclass says in ``prepare`` what it does to the model, and overrides what it does otherwise.

    Args:
        model: changed in place.
        config: of the run.
        steps_per_epoch: of the optimizer.
    """

    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    """What ``TrainConfig.options`` may set, with defaults, whose types are the options'."""

    LEAST: ClassVar[Mapping[str, float]] = {}
    """Least value of the options that have one."""

    activation: ClassVar[Callable[..., nn.Module] | None] = None
    """Makes a quantizer of inputs from ``activation_bits``, config and options. It stands in front
    of every quantized layer but the network's first, whose inputs are 8-bit pixels as they are."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        require(not config.activation_bits or self.activation is not None, "methods",
                "activation_bits", f"be 0 for {config.method}", config.activation_bits)
        self.model, self.config, self.steps_per_epoch = model, config, steps_per_epoch
        self.options = read_options(config.method, config.options, self.OPTIONS)
        for name, least in self.LEAST.items():
            require(self.options[name] >= least, "methods", f"option {name} of {config.method}",
                    f"be at least {least}", self.options[name])
        self.steps = 0
        self.optimizer: Optimizer = self.prepare()

    def prepare(self) -> Optimizer:
        """Make the model trainable by the method; the optimizer of all that is trained."""
        raise NotImplementedError

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done, 0 to 1: what annealed quantities follow."""
        return self.steps / (self.config.epochs * self.steps_per_epoch)

    @property
    def evaluations_per_step(self) -> int:
        """How often ``step`` runs its closure."""
        return 1

    @property
    def weight_bits(self) -> float | None:
        """Mean bits that a quantized weight takes, where training decides it."""
        return None

    @property
    def is_quantized(self) -> bool:
        """Whether ``evaluating`` shows quantized weights; False in some methods' first phases."""
        return True

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; a group may have a factor ``lr_scale`` of its own."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step. The closure clears gradients, evaluates the loss, adds :meth:`penalty`, calls
        ``backward`` and returns the loss without the penalty."""
        optimizer: Any = self.optimizer  # torch's annotation wants a closure to return a float
        loss: Tensor = optimizer.step(closure)
        self.after_step()
        self.steps += 1
        return loss

    def penalty(self) -> Tensor | None:
        """What is minimised beside the loss, a scalar."""
        return None

    def after_step(self) -> None:
        """What follows every step of the optimizer."""

    def epoch_ended(self, epoch: int) -> None:
        """What follows the last step of an epoch, counted from 1."""

    def evaluating(self) -> AbstractContextManager[object]:
        """Inside, the model in evaluation mode computes with the weights that would ship."""
        return nullcontext()

    def finalize(self) -> nn.Module:
        """The model with plain layers whose weights are those that ship, known to :func:`blaq.pack`
        where a packed format holds them. Training ends here."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: what is not in the model's ``state_dict``."""
        return {"steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on bit for bit; the model's own state has been loaded before."""
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])


class FullPrecision(Method):
    """No quantization: the baseline of every comparison."""

    def prepare(self) -> Optimizer:
        return make_optimizer([{"params": list(self.model.parameters())}], self.config)


def make_optimizer(groups: Groups, config: TrainConfig) -> Optimizer:
    """The config's optimizer for weights that the loss reaches by plain gradients."""
    if config.optimizer == "sgd":
        return SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)


def groups_of(model: nn.Module, config: TrainConfig) -> Groups:
    """Parameter groups of the widths that the config gives the model's layers."""
    first, last = (int(text) if text.isdigit() else None if text == "same" else text
                   for text in (config.first_bits, config.last_bits))
    return param_groups(model, config.bits, first=first, last=last)


def quantized_layers(model: nn.Module, config: TrainConfig) -> Iterator[tuple[nn.Module, int]]:
    """The layers whose weights the config quantizes, and their widths."""
    widths = {id(param): group["bits"] for group in groups_of(model, config)
              if group["bits"] is not None for _, param in group["params"]}
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if id(weight) in widths:
            yield module, widths[id(weight)]


def read_options(method: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options from ``name=value,…``, the rest as its defaults.

    >>> read_options("admm", "rho=0.1", {"rho": 1e-3, "prune": False})
    {'rho': 0.1, 'prune': False}
    """
    options = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        require(name in defaults, "methods", f"options of {method}",
                f"be among {', '.join(defaults)}" if defaults else "not be given", repr(name))
        kind = type(defaults[name])
        try:
            if kind is bool:
                options[name] = {"yes": True, "true": True, "no": False, "false": False}[value]
            else:
                options[name] = kind(value)
        except (KeyError, ValueError):
            rule = "be yes or no" if kind is bool else f"be of type {kind.__name__}"
            require(False, "methods", f"option {name} of {method}", rule, repr(value))
    return options


def clip_(latents: list[Tensor], bound: float) -> None:
    """Keep latent weights in [-bound, bound]; 0 is no bound."""
    if bound and latents:
        with torch.no_grad():
            torch._foreach_clamp_min_(latents, -bound)
            torch._foreach_clamp_max_(latents, bound)

"""What a training run is: every choice that decides its outcome, in one dataclass.

A config file is TOML or JSON with these fields at its top level; each is a flag of ``blaq train``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from blaq_kernels.rules import METHODS as SOLVES

from .._extras import import_extra
from ..codebook import levels_for
from ..methods import METHODS, check_method
from .data import DATA
from .losses import LOSSES
from .models import MODELS, build, initialise_as_lab

__all__ = ["FLEXIBLE", "TrainConfig", "load_config", "read_config"]

LAYER_WIDTHS = ("same", "fp", "1", "2", "3", "4", "8")
FLEXIBLE = ("epochs", "data_dir", "threads", "device")
"""Fields that may change when a run is resumed: none alters what the finished epochs mean."""


class Rule(NamedTuple):
    """What a value must do, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("be positive and finite", lambda x: 0 < x < float("inf"))
NOT_NEGATIVE = Rule("be at least 0 and finite", lambda x: 0 <= x < float("inf"))
AT_LEAST_1 = Rule("be at least 1", lambda x: x >= 1)


def _option(default: Any, help: str, choices: Collection[str] | None = None,
            rule: Rule | None = None) -> Any:
    return field(default=default, metadata=MappingProxyType(
        {"help": help, "choices": choices, "rule": rule}))


@dataclass(frozen=True)
class TrainConfig:
    """One training run. ``bits`` 0 and ``codebook`` "" become the method's own.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.

    >>> config = TrainConfig(model="lenet5", data="digits", method="laq-linear")
    >>> config.bits, config.codebook
    (3, 'linear')
    """

    model: str = _option("lenet5", "network", tuple(MODELS))
    width: float = _option(1.0, "factor on the width of every hidden layer", rule=POSITIVE)
    init: str = _option("", "safetensors file of float weights to start from")
    init_rule: str = _option("torch", "of random initial weights: each layer's own in torch, or "
                             "LAB's U(±sqrt(1.5/(fan_in + fan_out)))", ("torch", "lab"))
    output_norm: bool = _option(False, "batch norm after the last layer, as LAB's networks for the "
                                "squared hinge loss have it")
    data: str = _option("digits", "data set", tuple(DATA))
    data_dir: str = _option("", "folder of its original files; empty: $BLAQ_DATA/<data>")
    augment: bool = _option(False, "random horizontal flips and shifts by up to 1/8 of the side")
    validation: int = _option(0, "training images held out to measure on after each epoch, the "
                              "same for every seed", rule=NOT_NEGATIVE)

    method: str = _option("blaq", "fp: full precision; laq: one evaluation a step; blaq: one step "
                          "forward and backtrack, two evaluations; docs/methods.md has all",
                          METHODS)
    bits: int = _option(0, "width of a quantized weight, 1 to 4 bits; 0: the method's own",
                        rule=Rule("be 1, 2, 3 or 4", lambda x: x in (0, 1, 2, 3, 4)))
    codebook: str = _option("", "magnitudes of the weights; the method's own if not given", (
        "", "binary", "pow2", "ternary", "linear", "pow2_zero", "uniform"))
    group_size: int = _option(0, "weights that share a scale: 0 all of a layer, -1 an output row, "
                              "g > 0 each g inputs of a row",
                              rule=Rule("be 0, -1 or positive", lambda x: x >= -1))
    first_bits: str = _option("same", "width of the first layer", LAYER_WIDTHS)
    last_bits: str = _option("same", "width of the last layer", LAYER_WIDTHS)
    backtrack: float = _option(0.6, "blaq's weight of the current against the trial gradient, in "
                               "(0, 1]; laq is 1", rule=Rule("be in (0, 1]", lambda x: 0 < x <= 1))
    max_iter: int = _option(5, "most alternations of a solve for scale and codes", rule=AT_LEAST_1)
    solve: str = _option("alternating", "how scale and codes are solved for", tuple(SOLVES))
    activation_bits: int = _option(0, "width of quantized layers' inputs, where the method has it; "
                                   "0: not quantized",
                                   rule=Rule("be 0 to 8", lambda x: 0 <= x <= 8))
    options: str = _option("", "the method's own options, NAME=VALUE,…; docs/methods.md has them")

    loss: str = _option("cross-entropy", "what is minimised and measured; squared-hinge: on ±1 "
                        "targets, mean over all outputs", tuple(LOSSES))
    optimizer: str = _option("adamw", "of weights that the loss reaches by plain gradients; laq "
                             "and blaq need adamw", ("adamw", "sgd"))
    momentum: float = _option(0.9, "of sgd", rule=Rule("be in [0, 1)", lambda x: 0 <= x < 1))

    epochs: int = _option(20, "passes over the training set", rule=AT_LEAST_1)
    batch_size: int = _option(64, "images in a mini-batch", rule=AT_LEAST_1)
    lr: float = _option(3e-3, "learning rate at its highest", rule=POSITIVE)
    schedule: str = _option("cosine", "of lr after the warm-up: cosine to 0; step: x gamma after "
                            "each of the milestones; exponential: x gamma for each epoch "
                            "that is complete since the first milestone; none",
                            ("cosine", "step", "exponential", "none"))
    milestones: str = _option("", "epochs, 15,25; empty: 1/2 and 3/4 of the run for step, 0 for "
                              "exponential")
    gamma: float = _option(0.1, "factor on lr at a milestone", rule=POSITIVE)
    warmup: float = _option(0.0, "epochs in which lr rises from 0 first", rule=NOT_NEGATIVE)
    weight_decay: float = _option(0.0, "decoupled weight decay", rule=NOT_NEGATIVE)
    clip: float = _option(1.0, "latent weights stay in [-clip, clip]; 0: no bound; not for fp",
                          rule=NOT_NEGATIVE)
    max_grad_norm: float = _option(0.0, "bound on the norm of the whole gradient; 0: no bound",
                                   rule=NOT_NEGATIVE)

    seed: int = _option(0, "of initial weights and of the order of the images", rule=NOT_NEGATIVE)
    device: str = _option("cpu", "to train on: cpu, cuda or cuda:N")
    threads: int = _option(0, "CPU threads of torch; 0: torch's choice", rule=NOT_NEGATIVE)
    amp: str = _option("off", "bf16: autocast forward and backward to bfloat16", ("off", "bf16"))
    track_oscillation: bool = _option(True, "measure how often weights oscillate (a few percent of "
                                      "the time on a CPU, 6 bytes a weight)")

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _checked(entry, getattr(self, entry.name)))
        bits, codebook = check_method(self.method, self.bits, self.codebook)
        if self.quantized and codebook:
            levels_for(codebook, bits)  # raises where the codebook lacks this width
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "codebook", codebook)
        _ = self.milestone_epochs  # raises where the text is none

    @property
    def quantized(self) -> bool:
        """Whether weights are quantized to ``bits``."""
        return bool(METHODS[self.method].bits)

    @property
    def milestone_epochs(self) -> tuple[float, ...]:
        """Epochs after which the learning rate falls, ascending."""
        try:
            found = tuple(float(part) for part in self.milestones.split(",") if part)
        except ValueError:
            found = (-1.0,)
        if any(epoch < 0 for epoch in found) or list(found) != sorted(found):
            raise ValueError("blaq.TrainConfig: milestones must be ascending epochs, N,N,…, "
                             f"got {self.milestones!r}")
        if found:
            return found
        return (0.0,) if self.schedule == "exponential" else (self.epochs / 2, self.epochs * 3 / 4)

    def build(self, num_classes: int, in_shape: tuple[int, int, int]) -> nn.Module:
        """The config's network, freshly initialised from torch's generator."""
        model = build(self.model, num_classes, in_shape, width=self.width,
                      output_norm=self.output_norm)
        if self.init_rule == "lab":
            initialise_as_lab(model)
        return model

    @property
    def label(self) -> str:
        """Short name of the run: ``digits-lenet5-blaq1-s0``."""
        method = f"{self.method}{self.bits}" if self.quantized else self.method
        return f"{self.data}-{self.model}-{method}-s{self.seed}"

    def replaced(self, values: Mapping[str, Any]) -> TrainConfig:
        """A copy with these fields; ValueError for a key that is no field, naming it."""
        return replace(self, **_known(values))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config with these fields, the rest as their defaults; ValueError as ``replaced``."""
        return cls(**_known(values))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _known(values: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [entry.name for entry in fields(TrainConfig)]
    for key in values:
        if key not in names:
            raise ValueError(f"blaq.TrainConfig: keys must be among {', '.join(names)}, "
                             f"got {key!r}")
    return values


def _checked(entry: Any, value: Any) -> Any:
    """The value of a field in its own type, if it keeps the field's rule."""
    kind, choices, rule = type(entry.default), entry.metadata["choices"], entry.metadata["rule"]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and type(value) is int and choices and str(value) in choices:
        value = str(value)  # first_bits = 8 in a config file
    what = f"blaq.TrainConfig: {entry.name} must"
    if type(value) is not kind:
        raise ValueError(f"{what} be of type {kind.__name__}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"{what} be one of {', '.join(choices)}, got {value!r}")
    if rule and not rule.holds(value):
        raise ValueError(f"{what} {rule.text}, got {value!r}")
    return value


def load_config(path: str | Path) -> TrainConfig:
    """Read a config file, ``.toml`` or ``.json``.

    Raises:
        ValueError: it is neither, does not parse, has an unknown key, or a value breaks its rule;
            the message names the file.
    """
    return read_config(path)


def read_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """:func:`load_config`, with some fields given in place of the file's."""
    path = Path(path)
    parsers: dict[str, Callable[[str], Any]] = {".toml": _parse_toml, ".json": json.loads}
    if path.suffix not in parsers:
        raise ValueError(f"blaq.load_config: {path}: name must end in .toml or .json")
    try:
        values = parsers[path.suffix](path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"content must be one object, got {type(values).__name__}")
        return TrainConfig.of({**values, **overrides})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"blaq.load_config: {path}: {error}") from None


def _parse_toml(text: str) -> dict[str, Any]:
    parser = import_extra("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
    values: dict[str, Any] = parser.loads(text)
    return values

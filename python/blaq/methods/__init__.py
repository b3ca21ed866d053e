"""Every method that trains a network here, by the name that ``blaq train --method`` takes.

A method is imported when it is used; what it is defined for stands here, so that a config can be
checked without it. ``docs/methods.md`` says what each one learns and what it leaves out.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from ..train.config import TrainConfig
    from .method import Method

__all__ = ["METHODS", "Entry", "check_method", "make_method", "method_class"]

ALL = (1, 2, 3, 4)
CODEBOOKS = ("pow2", "binary", "ternary", "linear", "pow2_zero", "uniform")


class Entry(NamedTuple):
    """Where a method is, and what it is defined for.

    Attributes:
        place: module and class in this package, or the class itself.
        bits: widths of a weight, the default first; none where ``bits`` has no part.
        codebooks: that it can quantize to, the default first; none where it has its own levels.
    """

    place: str | type[Method]
    bits: tuple[int, ...] = ()
    codebooks: tuple[str, ...] = ()


METHODS = {
    "fp": Entry("method.FullPrecision"),
    "laq": Entry("loss_aware.LAQ", ALL, CODEBOOKS),
    "blaq": Entry("loss_aware.OneStepBack", ALL, CODEBOOKS),
    "blaq-one-pass": Entry("loss_aware.OnePass", ALL, CODEBOOKS),
    "lab": Entry("loss_aware.LAQ", (1,), ("binary",)),
    "lat-approximate": Entry("loss_aware.Alternating", (2,), ("ternary",)),
    "lat-exact": Entry("loss_aware.Exact", (2,), ("ternary",)),
    "laq-linear": Entry("loss_aware.LAQ", (3, 2, 4), ("linear",)),
    "laq-log": Entry("loss_aware.LAQ", (3, 2, 4), ("pow2_zero",)),
    "lat2-approximate": Entry("ternary.TwoScale", (2,)),
    "lat2-exact": Entry("ternary.TwoScaleExact", (2,)),
    "error-compensation": Entry("loss_aware.ErrorCompensation", ALL, CODEBOOKS),
    "admm": Entry("admm.ADMM", ALL, CODEBOOKS),
    "admm-pruning": Entry("admm.ADMMPruning"),
    "aq": Entry("adaptive.AQ"),
    "alq": Entry("alq.ALQ", (4, 3, 2, 1)),
    "dc": Entry("deep_compression.DeepCompression", (4, 3, 2, 1)),
    "bc": Entry("binary.BinaryConnect", (1,), ("binary",)),
    "bc-stochastic": Entry("binary.StochasticConnect", (1,), ("binary",)),
    "bwn": Entry("binary.BWN", (1,), ("binary",)),
    "twn": Entry("ternary.TWN", (2,), ("ternary",)),
    "twn-exact": Entry("ternary.ExactTWN", (2,), ("ternary",)),
    "lq-net": Entry("lq_net.LQNet", (2, 1, 3, 4)),
    "qil": Entry("qil.QIL", (2, 3, 4)),
    "dsq": Entry("dsq.DSQ", ALL),
    "dsq-learned": Entry("dsq.LearnedDSQ", ALL),
    "octav": Entry("octav.OCTAV", (4, 2, 3)),
    "trq": Entry("trq.TRQ", (2,)),
    "lr-net": Entry("lr_net.LRNet", (2, 1)),
    "paretoq": Entry("paretoq.ParetoQ", (2, 1, 3, 4)),
    "paretoq-ternary": Entry("paretoq.Ternary", (2,)),
    "lsq": Entry("lsq.LSQ", (4, 2, 3)),
    "ewgs": Entry("ewgs.EWGS", (4, 2, 3)),
    "lotion": Entry("lotion.LOTION", (4, 2, 3)),
    "noise-tempering": Entry("tempering.NoiseTempering", (4, 2, 3)),
    "saq": Entry("saq.SAQ", (4, 2, 3)),
    "lsq-dampened": Entry("oscillation.Dampened", (4, 2, 3)),
    "lsq-frozen": Entry("oscillation.Frozen", (4, 2, 3)),
}
"""Every method. The bits of a ternary one are 2: what a packed weight takes."""


def check_method(name: str, bits: int, codebook: str) -> tuple[int, str]:
    """Width and codebook of a method's weights; 0 and ``""`` ask for its defaults.

    Raises:
        ValueError: unknown name, or a width or codebook that the method has no meaning for.
    """
    if name not in METHODS:
        raise ValueError(f"blaq.methods: method must be one of {', '.join(METHODS)}, got {name!r}")
    entry = METHODS[name]
    if not entry.bits:  # as they have no part, any will do
        return bits or 1, codebook or CODEBOOKS[0]
    for what, value, allowed in (("bits", bits, entry.bits), ("codebook", codebook,
                                                              entry.codebooks)):
        if value and value not in allowed:
            rule = "be " + " or ".join(map(str, sorted(allowed))) if allowed else "not be given"
            raise ValueError(f"blaq.methods: {what} must {rule} for {name}, got {value!r}")
    return bits or entry.bits[0], codebook or "".join(entry.codebooks[:1])


def method_class(name: str) -> type[Method]:
    """The class of a method, imported."""
    place = METHODS[name].place
    if not isinstance(place, str):
        return place
    module, _, attribute = place.rpartition(".")
    found: type[Method] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found


def make_method(model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> Method:
    """Make a model ready for the config's method, and the method that trains it.

    Args:
        model: changed in place, its weights the initial ones.
        config: of the run.
        steps_per_epoch: of the optimizer.

    Raises:
        ValueError: an option or a layer's width has no meaning for the method.
    """
    return method_class(config.method)(model, config, steps_per_epoch)

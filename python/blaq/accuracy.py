"""How exactly packed layers compute: what each layer asks for, or what all do."""

from __future__ import annotations

from blaq_kernels.rules import ACCURACIES

__all__ = ["get_accuracy", "set_accuracy"]

_current = "high"


def get_accuracy() -> str:
    """The accuracy of packed layers that name none of their own."""
    return _current


def set_accuracy(accuracy: str) -> None:
    """Choose how exactly packed layers compute on a CPU that has faster, less exact kernels.

    Args:
        accuracy: relative error against float64 on Gaussian data: ``exact``, float32 arithmetic;
            ``high``, the default, at most 4e-4 (``F.linear`` in bfloat16: 3e-3); ``fast``, at most
            1e-2: inputs of 8 bits. What a kernel cannot do so, it does more exactly.

    Raises:
        ValueError: another name.
    """
    global _current
    _current = checked("set_accuracy", accuracy)


def checked(who: str, accuracy: str) -> str:
    """``accuracy``, if it is one."""
    if accuracy not in ACCURACIES:
        raise ValueError(f"blaq.{who}: accuracy must be one of {', '.join(ACCURACIES)}, "
                         f"got {accuracy!r}")
    return accuracy

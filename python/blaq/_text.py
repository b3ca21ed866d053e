"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Container, Sequence

__all__ = ["percent", "size", "table"]


def percent(share: float) -> str:
    """A share of 0 to 1: ``96.67 %``."""
    return f"{100 * share:.2f} %"


def size(count: int) -> str:
    """A number of bytes: ``210.5 KiB``."""
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, 0
    while value >= 1024:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Lines with the columns under each other; those in ``right`` are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(row[i].rjust(width) if i in right else row[i].ljust(width)
                      for i, width in enumerate(widths)).rstrip() for row in rows]

"""Codebooks: the magnitudes that a quantized weight may take.

``blaq_kernels.codebook`` defines them; this adds the 8-bit one, which no packed format knows.
"""

from __future__ import annotations

from collections.abc import Sequence

from blaq_kernels.codebook import bits_of, check_levels, levels_of

__all__ = ["bits_of", "levels_for", "levels_of"]


def levels_for(codebook: str | Sequence[float], bits: int) -> tuple[float, ...]:
    """Ascending magnitudes for a layer of this width.

    Args:
        codebook: a name that :func:`levels_of` knows, or the magnitudes themselves; no part at 8
            bits: sign and 7 bits of a uniform grid, 0, 1/127, …, 1.
        bits: 1, 2, 3, 4 or 8.

    Raises:
        ValueError: the codebook does not exist at this width.

    >>> levels_for("pow2", 2), len(levels_for("pow2", 8))
    ((0.5, 1.0), 128)
    """
    if bits == 8:
        return tuple(i / 127 for i in range(128))
    if isinstance(codebook, str):
        return levels_of(codebook, bits)
    check_levels("levels_for", codebook)
    if bits_of(codebook) != bits:
        raise ValueError(f"blaq.levels_for: codebook must have magnitudes for {bits} bits, "
                         f"got {list(codebook)}")
    return tuple(float(level) for level in codebook)

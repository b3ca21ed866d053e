"""Pruning by magnitude, and what a pruned and clustered weight takes to store."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import count

import torch
from torch import Tensor

from blaq_kernels.rules import require

__all__ = ["huffman_bits", "keep_largest", "shares", "sparse_bits"]

LARGEST_GAP = 32


def shares(method: str, option: str, text: str, layers: int) -> list[float]:
    """A share in [0, 1) for each layer, from one number or one a layer, ``0.8:0.92``.

    >>> shares("dc", "sparsity", "0.9", 2)
    [0.9, 0.9]
    """
    try:
        found = [float(part) for part in text.split(":")]
    except ValueError:
        found = []
    ok = len(found) in (1, layers) and all(0 <= share < 1 for share in found)
    require(ok, "methods", f"option {option} of {method}",
            f"be a share in [0, 1), or {layers} with : between", repr(text))
    return found if len(found) == layers else found * layers


def keep_largest(weight: Tensor, sparsity: float) -> Tensor:
    """Mask, bool, of all but the share ``sparsity`` of the weights, those of smallest magnitude."""
    kept = weight.numel() - round(sparsity * weight.numel())
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.flatten().abs().topk(kept).indices] = True
    return mask.reshape(weight.shape)


def huffman_bits(symbols: Tensor) -> int:
    """Bits of a Huffman code of these symbols, its table not counted; a lone symbol takes one each.

    >>> huffman_bits(torch.tensor([0, 0, 0, 0, 1, 1, 2]))
    10
    """
    counts = Counter(symbols.flatten().tolist())
    if len(counts) < 2:
        return symbols.numel()
    order = count()  # breaks ties, and keeps the heap from looking further
    heap = [(frequency, next(order)) for frequency in counts.values()]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:  # each merge lengthens the codes below it by a bit
        merged = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        total += merged
        heapq.heappush(heap, (merged, next(order)))
    return total


def sparse_bits(codes: Tensor, mask: Tensor) -> int:
    """Bits of Deep Compression's format: Huffman codes of the kept weights and of the gaps between
    them; a gap takes a padding zero for each 32 in it. Tables and codebook are not counted."""
    position = mask.flatten().nonzero().flatten().cpu()
    gaps = torch.diff(position, prepend=torch.tensor([-1])) - 1
    padding = gaps // LARGEST_GAP
    all_gaps = torch.cat([gaps % LARGEST_GAP, torch.full((int(padding.sum()),), LARGEST_GAP - 1)])
    kept = codes.flatten()[mask.flatten()].cpu().long()
    all_codes = torch.cat([kept, torch.full((int(padding.sum()),), -1)])
    return huffman_bits(all_gaps) + huffman_bits(all_codes)

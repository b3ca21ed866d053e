"""Deep Compression (Han, Mao, Dally, ICLR 2016, arXiv 1510.00149)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blaq_kernels.rules import require

from .quantizer import QuantizerMethod, WeightQuantizer
from .sparsity import keep_largest, shares, sparse_bits

if TYPE_CHECKING:
    from ..train.config import TrainConfig

__all__ = ["DeepCompression", "Shared", "kmeans"]


def kmeans(values: Tensor, clusters: int, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm in one dimension, from centroids spread evenly over the values' range: the
    paper's best start.

    Args:
        values: float, one dimension, not empty.
        clusters: centroids.

    Returns:
        centroids, ascending; the nearest one of each value, int64.
    """
    low, high = values.min(), values.max()
    centroids = low + (high - low) * torch.linspace(0, 1, clusters, device=values.device)
    nearest = torch.zeros_like(values, dtype=torch.int64)
    for _ in range(iterations):
        nearest = torch.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)
        count = torch.bincount(nearest, minlength=clusters)
        total = torch.zeros_like(centroids, dtype=torch.float64).index_add_(
            0, nearest, values.double())
        moved = torch.where(count > 0, (total / count.clamp_min(1)).to(values.dtype), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, nearest


class Shared(WeightQuantizer):
    """Float, then pruned, then an index into centroids; a centroid's gradient is its cluster's
    sum."""

    def __init__(self, latent: Tensor, bits: int, config: TrainConfig,
                 options: Mapping[str, Any]) -> None:
        super().__init__(latent, bits, config, options)
        self.prune_after = config.epochs * options["dense"]
        self.cluster_after = config.epochs * options["sparse"]
        self.sparsity = 0.0  # the method sets it, layer by layer
        self.centroids = nn.Parameter(latent.new_zeros(2**bits))
        self.mask: Tensor
        self.codes: Tensor
        self.stage: Tensor
        self.register_buffer("mask", torch.ones_like(latent, dtype=torch.bool))
        self.register_buffer("codes", torch.zeros_like(latent, dtype=torch.uint8))
        self.register_buffer("stage", torch.zeros((), dtype=torch.uint8))  # 0, 1 pruned, 2 shared

    def forward(self, latent: Tensor) -> Tensor:
        value = self.centroids[self.codes.long()] if self.stage == 2 else latent
        return value * self.mask

    def epoch_ended(self, latent: Tensor, epoch: int) -> None:
        if self.stage == 0 and epoch >= round(self.prune_after):
            self.mask.copy_(keep_largest(latent, self.sparsity))
            self.stage.fill_(1)
        if self.stage == 1 and epoch >= round(self.cluster_after):
            centroids, nearest = kmeans(latent[self.mask], len(self.centroids))
            self.centroids.copy_(centroids)
            self.codes[self.mask] = nearest.to(torch.uint8)
            self.stage.fill_(2)


class DeepCompression(QuantizerMethod):
    """Prune by magnitude, retrain, cluster each layer's weights to ``2**bits`` centroids, and train
    the centroids. The first share ``dense`` of the epochs is full precision, up to ``sparse``
    pruned; until then what is measured is the float network. Pruned weights stay zero.

    Options: ``dense``, ``sparse``; ``sparsity``, of all layers or ``0.8:0.92:…`` of each.

    Not implemented: a file in its sparse, Huffman-coded format, whose size ``weight_bits``
    estimates; widths of more than 4 bits (the paper has 8 for convolutions). No packed format has
    free centroids, so the weights are saved as floats.
    """

    OPTIONS: ClassVar = {"dense": 0.4, "sparse": 0.7, "sparsity": "0.9"}
    quantizer = Shared

    def prepare(self) -> Optimizer:
        dense, sparse = self.options["dense"], self.options["sparse"]
        require(0 <= dense <= sparse <= 1, "methods", "options dense and sparse of dc",
                "be ascending in [0, 1]", f"{dense} and {sparse}")
        optimizer = super().prepare()
        mine = [quantizer for _, quantizer, _ in self.layers if isinstance(quantizer, Shared)]
        for quantizer, share in zip(mine, shares("dc", "sparsity", self.options["sparsity"],
                                                 len(mine)), strict=True):
            quantizer.sparsity = share
        return optimizer

    @property
    def is_quantized(self) -> bool:
        return all(q.stage == 2 for _, q, _ in self.layers if isinstance(q, Shared))

    @property
    def weight_bits(self) -> float | None:
        stored = [(sparse_bits(q.codes, q.mask), q.mask.numel()) for _, q, _ in self.layers
                  if isinstance(q, Shared) and q.stage == 2]
        total = sum(numel for _, numel in stored)
        return sum(bits for bits, _ in stored) / total if total else None

"""Quantized models without training: weights solved once, and recorded as an optimizer does."""

import torch
from torch import nn

from blaq.quantization import Quantization, record
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of

CODEBOOKS = [("binary", 1), ("pow2", 2), ("ternary", 2), ("linear", 3), ("pow2", 4),
             ("pow2_zero", 4)]
GROUPS = [0, -1, 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def quantize_(layer, codebook="pow2", bits=2, group_size=0, known=True):
    """Quantize ``layer.weight`` in place; ``known`` records it, as an optimizer would."""
    levels = levels_of(codebook, bits)
    latent = layer.weight.float().contiguous()
    codes, scale = ref.solve(latent, torch.ones_like(latent), None, levels, group_size, 5,
                             "alternating")
    layer.weight.copy_(ref.dequantize(codes, scale, levels, group_size))
    if known:
        record(layer.weight, Quantization(levels, group_size, scale,
                                          torch.zeros((), dtype=torch.int64)))
    return layer


def small_net(known=True, seed=0):
    """Conv and linear layers at several widths, batch norm, a float layer at each end; for inputs
    ``[batch, 2, 5, 5]``."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        quantize_(nn.Conv2d(4, 6, 3, stride=2, bias=False), "pow2", 1, 0, known), nn.ReLU(),
        nn.Flatten(), quantize_(nn.Linear(24, 10), "linear", 3, -1, known), nn.ReLU(),
        quantize_(nn.Linear(10, 7), "pow2", 2, 4, known), nn.Linear(7, 3))
    return net.eval()


def same_bits(a, b):
    """Whether two tensors are equal in dtype, shape and every bit: -0.0 is not 0.0."""
    raw = [x.contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)

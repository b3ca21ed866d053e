"""BLAQ: training with 1- to 4-bit weights, and inference from bit-packed ones."""

import blaq_kernels

from .convert import pack, unpack
from .nn import PackedConv2d, PackedLinear

__all__ = ["PackedConv2d", "PackedLinear", "pack", "unpack"]

__version__ = blaq_kernels.__version__

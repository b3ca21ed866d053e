"""BLAQ: training with 1- to 4-bit weights, and inference from bit-packed ones."""

import blaq_kernels

__version__ = blaq_kernels.__version__

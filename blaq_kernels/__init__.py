"""Ops of BLAQ: loss-aware training with 1- to 4-bit weights and inference from packed ones."""

__version__ = "0.1.0"

"""BLAQ: training with 1- to 4-bit weights, and inference from bit-packed ones."""

import blaq_kernels

from . import functional
from .accuracy import get_accuracy, set_accuracy
from .binary import BinaryActivation, PackedBinaryConv2d, PackedBinaryLinear
from .codebook import bits_of, levels_for, levels_of
from .convert import pack, unpack
from .fold import fold_norm
from .io import PackedFile, inspect, load, save
from .metrics import AmplitudeTracker, OscillationTracker, flip_ratio
from .nn import PackedConv2d, PackedLinear
from .optim import BLAQ
from .param_groups import param_groups
from .planes import drop_planes, restore_planes
from .quantization import Quantization, quantization_of
from .summary import LayerSummary, Summary, summary
from .trial import RandomState, trial_pass

__all__ = [
    "AmplitudeTracker", "BLAQ", "BinaryActivation", "LayerSummary", "OscillationTracker",
    "PackedBinaryConv2d", "PackedBinaryLinear", "PackedConv2d", "PackedFile", "PackedLinear",
    "Quantization", "RandomState", "Summary", "bits_of", "drop_planes", "flip_ratio", "fold_norm",
    "functional", "get_accuracy", "inspect", "levels_for", "levels_of", "load", "pack", "param_groups",
    "quantization_of", "restore_planes", "save", "set_accuracy", "summary", "trial_pass", "unpack",
]

__version__ = blaq_kernels.__version__

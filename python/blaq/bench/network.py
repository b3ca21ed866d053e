"""A whole network: ResNet-18 of 1-bit weights, packed with folded norms, against itself in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import blaq_kernels  # noqa: F401  (defines torch.ops.blaq)

from ..convert import pack
from ..nn import PackedLayer
from ..train.models import BasicBlock, build
from .case import BLAQ, Case, Table, Variant

__all__ = ["TABLES"]

FLOAT = ("conv1", "fc")
"""Layers that stay in float, as is usual: the first and the last."""


def _quantized(case: Case) -> nn.Module:
    """A random network in eval mode with norms that are not neutral, its inner weights quantized."""
    model = _empty(case)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Conv2d) and name not in FLOAT:
            weight = module.weight
            _, scale = torch.ops.blaq.solve.default(weight, torch.ones_like(weight), None, case.levels,
                                                    case.group_size, 5, "alternating")
            weight.copy_(torch.ops.blaq.fake_quantize.default(weight, scale, case.levels,
                                                              case.group_size))
    return model


def _empty(case: Case) -> nn.Module:
    return build("resnet18", 1000, (3, 224, 224), width=case.size[2] / 64).eval().requires_grad_(False)


def fuse_float(model: nn.Module) -> nn.Module:
    """The model with every norm fused into the float convolution before it, by torch's own means."""
    pairs = [(model, "conv1", "bn1")]
    for block in model.modules():
        if isinstance(block, BasicBlock):
            pairs += [(block, "conv1", "bn1"), (block, "conv2", "bn2")]
            if isinstance(block.downsample, nn.Sequential):
                pairs.append((block.downsample, "0", "1"))
    for parent, conv, norm in pairs:
        layer = getattr(parent, conv)
        if isinstance(layer, nn.Conv2d):
            setattr(parent, conv, fuse_conv_bn_eval(layer, getattr(parent, norm)))
            setattr(parent, norm, nn.Identity())
    return model


def _resnet18(case: Case, full: bool) -> list[Variant]:
    batch, side, _ = case.size
    state = _quantized(case).state_dict()
    x = torch.randn(batch, 3, side, side)

    def model() -> nn.Module:
        network = _empty(case)
        network.load_state_dict(state)
        return network

    def packed(accuracy: str) -> nn.Module:
        network = pack(model(), bits=case.bits, group_size=case.group_size, skip=FLOAT, fold_norm=True)
        for module in network.modules():
            if isinstance(module, PackedLayer):
                module.accuracy = accuracy
        return fuse_float(network)

    calls: dict[str, Callable[[], Tensor]] = {}
    for name, network in ((BLAQ, packed("high")), ("blaq, fast", packed("fast")),
                          ("float32", fuse_float(model()))):
        if name == BLAQ:
            nbytes = x.nbytes + sum(tensor.nbytes for tensor in network.state_dict().values())
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        calls[name] = _call(network, x)
        calls[f"{name}, channels_last"] = _call(last, x.to(memory_format=torch.channels_last))
    with torch.inference_mode():
        exact = model().double()(x.double())
        return [Variant(name, torch.inference_mode()(call), nbytes if name == BLAQ else 0,
                        float((call().double() - exact).norm() / exact.norm()))
                for name, call in calls.items()]


def _call(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        result: Tensor = network(x)
        return result
    return call


TABLES = {"resnet18": Table("resnet18", ("BATCH", "SIDE", "WIDTH"),
                            ((1, 224, 64), (16, 224, 64)), _resnet18,
                            axes={"bits": (1, 2, 4), "group_size": (0,)}, ops=("packed_conv2d",))}

"""The networks of the paper and its predecessors, as plain modules: nothing in them knows BLAQ.

All end in logits for cross-entropy. ``mlp4``, ``vgg-small`` and ``svhn-net``: LAB (Hou et al., ICLR
2017, section 4); the batch norm after the output, which belongs to its hinge loss, is an option.
``lenet5``: LeCun et al. (1998) in the form that the quantization literature compares (20 and 50
filters, 500 hidden units). ``resnet18``: He et al. (2016), parameters named as in torchvision, so
that its checkpoints load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["MODELS", "build", "initialise_as_lab"]

Shape = tuple[int, int, int]
Scaled = Callable[[int], int]


def build(name: str, num_classes: int, in_shape: Shape, *, width: float = 1.0,
          output_norm: bool = False) -> nn.Module:
    """A freshly initialised network; the weights follow torch's generator.

    Args:
        name: one of ``MODELS``.
        num_classes: outputs of the last layer.
        in_shape: channels, height and width of an image. ``lenet5`` needs 16×16 at least;
            ``vgg-small`` and ``svhn-net`` 8×8; ``resnet18`` takes the stem for small images (3×3,
            no pooling) below 64 pixels and ImageNet's from there on.
        width: factor on every hidden layer's width.
        output_norm: batch norm after the last layer.

    Returns:
        A module from float ``[n, *in_shape]`` to logits ``[n, num_classes]``.

    Raises:
        ValueError: an argument breaks its rule.

    >>> sum(p.numel() for p in build("lenet5", 10, (1, 28, 28)).parameters())
    431080
    """
    if name not in MODELS:
        raise ValueError(f"blaq.build: name must be one of {', '.join(MODELS)}, got {name!r}")
    if num_classes < 1 or len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError("blaq.build: num_classes and in_shape must be positive, "
                         f"got {num_classes} and {tuple(in_shape)}")
    if not width > 0:
        raise ValueError(f"blaq.build: width must be positive, got {width}")
    make, smallest = MODELS[name]
    if min(in_shape[1:]) < smallest:
        raise ValueError(f"blaq.build: in_shape must be at least {smallest} pixels high and wide "
                         f"for {name}, got {tuple(in_shape)}")
    model = make(num_classes, in_shape, lambda channels: max(1, round(channels * width)))
    if output_norm:
        model.add_module("output_norm", nn.BatchNorm1d(num_classes))
    return model


def initialise_as_lab(model: nn.Module) -> None:
    """Weights from U(±sqrt(1.5 / (fan_in + fan_out))), half of Glorot's bound, and zero biases:
    what LAB and LAQ start from. A convolution's fans are its channels times its kernel's area."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, gain=0.5)  # gain · sqrt(6 / (fan_in + fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _mlp4(num_classes: int, in_shape: Shape, scaled: Scaled) -> nn.Module:
    """784-2048-2048-2048-10 on MNIST."""
    channels, height, width = in_shape
    features, hidden = channels * height * width, scaled(2048)
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in (1, 2, 3):
        layers += _dense(i, features, hidden)
        features = hidden
    return nn.Sequential(OrderedDict([*layers, ("fc4", nn.Linear(hidden, num_classes))]))


def _lenet5(num_classes: int, in_shape: Shape, scaled: Scaled) -> nn.Module:
    channels, height, width = in_shape
    a, b, hidden = scaled(20), scaled(50), scaled(500)
    side = [((size - 4) // 2 - 4) // 2 for size in (height, width)]  # convolved, pooled, twice
    return nn.Sequential(OrderedDict([
        ("conv1", nn.Conv2d(channels, a, 5)), ("pool1", nn.MaxPool2d(2)), ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(a, b, 5)), ("pool2", nn.MaxPool2d(2)), ("relu2", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(b * side[0] * side[1], hidden)), ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(hidden, num_classes)),
    ]))


def _vgg_small(num_classes: int, in_shape: Shape, scaled: Scaled) -> nn.Module:
    """2×128C3-MP2-2×256C3-MP2-2×512C3-MP2-2×1024FC-10 on CIFAR-10."""
    return _vgg(num_classes, in_shape, [scaled(c) for c in (128, 256, 512)], scaled(1024))


def _svhn_net(num_classes: int, in_shape: Shape, scaled: Scaled) -> nn.Module:
    """2×64C3-MP2-2×128C3-MP2-2×256C3-MP2-2×1024FC-10 on SVHN."""
    return _vgg(num_classes, in_shape, [scaled(c) for c in (64, 128, 256)], scaled(1024))


def _vgg(num_classes: int, in_shape: Shape, widths: list[int], hidden: int) -> nn.Module:
    channels, height, width = in_shape
    layers: list[tuple[str, nn.Module]] = []
    for i, out in enumerate(widths):
        for j in (2 * i + 1, 2 * i + 2):
            layers.append((f"conv{j}", nn.Conv2d(channels, out, 3, padding=1)))
            if j % 2 == 0:
                layers.append((f"pool{i + 1}", nn.MaxPool2d(2)))
            layers += [(f"norm{j}", nn.BatchNorm2d(out)), (f"relu{j}", nn.ReLU())]
            channels = out
    features = channels * (height // 8) * (width // 8)
    layers += [("flatten", nn.Flatten()), *_dense(7, features, hidden), *_dense(8, hidden, hidden)]
    return nn.Sequential(OrderedDict([*layers, ("fc9", nn.Linear(hidden, num_classes))]))


def _dense(i: int, features: int, hidden: int) -> list[tuple[str, nn.Module]]:
    return [(f"fc{i}", nn.Linear(features, hidden)), (f"norm{i}", nn.BatchNorm1d(hidden)),
            (f"relu{i}", nn.ReLU())]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False),
                                            nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


def _resnet18(num_classes: int, in_shape: Shape, scaled: Scaled) -> nn.Module:
    channels, height, width = in_shape
    stem: list[tuple[str, nn.Module]]
    if min(height, width) < 64:
        stem = [("conv1", nn.Conv2d(channels, scaled(64), 3, padding=1, bias=False)),
                ("bn1", nn.BatchNorm2d(scaled(64))), ("relu", nn.ReLU())]
    else:
        stem = [("conv1", nn.Conv2d(channels, scaled(64), 7, 2, padding=3, bias=False)),
                ("bn1", nn.BatchNorm2d(scaled(64))), ("relu", nn.ReLU()),
                ("maxpool", nn.MaxPool2d(3, 2, padding=1))]
    layers = []
    before = scaled(64)
    for i, out in enumerate(scaled(c) for c in (64, 128, 256, 512)):
        blocks = BasicBlock(before, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)
        layers.append((f"layer{i + 1}", nn.Sequential(*blocks)))
        before = out
    model = nn.Sequential(OrderedDict([
        *stem, *layers, ("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()),
        ("fc", nn.Linear(before, num_classes))]))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # He et al. (2015), as the paper's baseline was trained
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


MODELS: dict[str, tuple[Callable[[int, Shape, Scaled], nn.Module], int]] = {
    "mlp4": (_mlp4, 1), "lenet5": (_lenet5, 16), "vgg-small": (_vgg_small, 8),
    "svhn-net": (_svhn_net, 8), "resnet18": (_resnet18, 8)}
"""Maker and smallest image side of each network."""

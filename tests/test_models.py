"""Networks of the recipes: sizes, shapes, bad arguments."""

import pytest
import torch

import blaq
from blaq.train.models import MODELS, build

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
PARAMETERS = {  # weights and biases, and two for each normalised feature; counted by hand
    "mlp4": (MNIST, 784 * 2048 + 2 * 2048**2 + 2048 * 10 + 3 * 3 * 2048 + 10),
    "lenet5": (MNIST, 25 * 20 + 20 * 50 * 25 + 800 * 500 + 500 * 10 + 20 + 50 + 500 + 10),
    "vgg-small": (CIFAR, 9 * (3 * 128 + 128**2 + 128 * 256 + 256**2 + 256 * 512 + 512**2)
                  + 512 * 16 * 1024 + 1024**2 + 1024 * 10 + 3 * (2 * 896 + 2 * 1024) + 10),
    "svhn-net": (CIFAR, 9 * (3 * 64 + 64**2 + 64 * 128 + 128**2 + 128 * 256 + 256**2)
                 + 256 * 16 * 1024 + 1024**2 + 1024 * 10 + 3 * (2 * 448 + 2 * 1024) + 10),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_is_the_published_networks(name):
    shape, count = PARAMETERS[name]
    assert sum(p.numel() for p in build(name, 10, shape).parameters()) == count


def test_resnet18_is_torchvisions():
    model = build("resnet18", 1000, (3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == 11_689_512  # torchvision's documentation
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.1.bn2.bias",
            "layer2.0.downsample.0.weight", "layer3.0.downsample.1.running_var",
            "fc.bias"} <= set(model.state_dict())
    assert len(model.state_dict()) == 122
    small = build("resnet18", 10, CIFAR, width=0.1)
    assert not hasattr(small, "maxpool") and small.conv1.stride == (1, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [MNIST, CIFAR, (2, 64, 71)])
def test_any_shape_gives_logits_and_gradients(name, shape):
    model = build(name, 7, shape, width=0.05)
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_same_seed_same_weights():
    def make():
        torch.manual_seed(3)
        return build("lenet5", 10, MNIST, width=0.1)

    pairs = zip(make().parameters(), make().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_quantized_and_packed_without_loss(name):
    model = build(name, 4, (3, 16, 16), width=0.04).eval()
    blaq.BLAQ(blaq.param_groups(model, bits=2))
    weights = {key: m.weight.clone() for key, m in model.named_modules()
               if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    blaq.pack(model)
    layers = {key: m for key, m in model.named_modules()
              if isinstance(m, (blaq.PackedLinear, blaq.PackedConv2d))}
    assert layers.keys() == weights.keys()
    assert all(torch.equal(layers[key].weight, weights[key]) for key in layers)


@pytest.mark.parametrize(("arguments", "message"), [
    (("lenet6", 10, MNIST), "name must be one of mlp4, lenet5, .*got 'lenet6'"),
    (("lenet5", 0, MNIST), "num_classes and in_shape must be positive, got 0"),
    (("lenet5", 10, (28, 28)), r"in_shape must be positive, got 10 and \(28, 28\)"),
    (("lenet5", 10, (1, 15, 28)), "at least 16 pixels high and wide for lenet5"),
    (("vgg-small", 10, (3, 7, 7)), "at least 8 pixels"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"blaq.build: .*{message}"):
        build(*arguments)


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_bad_width(width):
    with pytest.raises(ValueError, match="blaq.build: width must be positive"):
        build("lenet5", 10, MNIST, width=width)

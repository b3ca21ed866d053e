"""fold_norm: the folded model computes what the packed one did, and is for that alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

import blaq
from blaq_kernels import reference as ref
from blaq_kernels.codebook import levels_of
from blaq.train.models import BasicBlock, build


@pytest.fixture(autouse=True)
def one_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def quantized(model, bits=1, group_size=0, skip=()):
    """The model in eval mode, its weights quantized and its norms anything but neutral."""
    levels = levels_of("pow2", bits)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in skip:
            scale = torch.rand(ref.scale_shape(module.weight.shape, group_size)) * 0.1 + 0.05
            module.weight.copy_(torch.ops.blaq.fake_quantize(module.weight, scale, levels, group_size))
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.normal_()  # negative ones too
                module.bias.normal_()
    return model.eval()


def pack(model, bits=1, group_size=0, skip=(), **options):
    return blaq.pack(quantized(model, bits, group_size, skip), bits=bits, group_size=group_size,
                     skip=skip, **options)


def sequential(bias=True, affine=True):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU(),
        nn.Conv2d(8, 36, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(144, 10, bias=bias), nn.BatchNorm1d(10, affine=affine), nn.ReLU())


def kinds(model):
    return [type(m).__name__ for m in model.modules() if not list(m.children())]


def assert_same_results(folded, packed, x, relative=1e-5):
    with torch.inference_mode():
        actual, expected = folded(x), packed(x)
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) <= relative


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [0, -1, 5, 36])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_folding_changes_no_result(bits, group_size, bias, affine):
    packed = pack(sequential(bias, affine), bits, group_size)
    for layer in packed:
        layer.accuracy = "exact"
    folded = blaq.fold_norm(copy.deepcopy(packed))
    assert kinds(folded) == ["PackedConv2d", "Identity", "Identity", "PackedConv2d", "Identity",
                             "MaxPool2d", "Flatten", "PackedLinear", "Identity", "ReLU"]
    assert folded[0].relu and folded[3].relu and folded[0].folded and not folded[3].folded
    assert folded[0].group_size == (group_size or -1) and folded[3].group_size == group_size
    assert torch.equal(folded[0].qweight, packed[0].qweight)
    assert_same_results(folded, packed, torch.randn(2, 3, 8, 8))


def test_pack_folds_when_asked():
    folded = pack(sequential(), fold_norm=True)
    assert "BatchNorm2d" not in kinds(folded) and folded[0].folded
    assert "BatchNorm2d" in kinds(pack(sequential()))


@pytest.mark.parametrize("accuracy", ["exact", "high", "fast"])
def test_a_resnet_keeps_its_results_and_the_relu_that_its_sums_share(accuracy):
    packed = pack(build("resnet18", 10, (3, 64, 64), width=0.25), skip=["conv1", "fc"])
    for module in packed.modules():
        if isinstance(module, blaq.PackedConv2d):
            module.accuracy = accuracy
    folded = blaq.fold_norm(copy.deepcopy(packed))
    norms = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ["bn1"]  # of the first convolution, which is float
    block = folded.layer2[0]
    assert block.conv1.folded and block.conv2.folded and block.downsample[0].folded
    assert type(block.relu) is nn.ReLU and type(block.bn1) is nn.Identity
    # Units of 8 bits see the same inputs, up to float32's rounding: which can turn a tie.
    assert_same_results(folded, packed, torch.randn(2, 3, 64, 64), 1e-4 if accuracy == "exact" else 1e-2)


class Shared(nn.Module):
    """One norm behind two layers, one layer before two norms, and a result that goes two ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.twice, self.once, self.other, self.alone = (nn.BatchNorm1d(6) for _ in range(4))
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.twice(self.a(x)) + self.twice(self.b(x))
        y = self.c(x)
        x = self.once(y) + self.other(y) + y
        return self.relu(self.alone(self.d(x)))


def test_what_others_use_too_stays():
    packed = pack(Shared())
    folded = blaq.fold_norm(copy.deepcopy(packed))
    stay = {name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert stay == {"twice", "once", "other"}
    assert [getattr(folded, name).folded for name in "abcd"] == [False, False, False, True]
    assert_same_results(folded, packed, torch.randn(4, 6))


def test_a_norm_without_statistics_or_with_a_hook_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert type(blaq.pack(quantized_without_statistics(model), bits=1, fold_norm=True)[1]) is nn.BatchNorm1d
    model = pack(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    seen = []
    model[1].register_forward_hook(lambda *args: seen.append(1))
    blaq.fold_norm(model)(torch.randn(3, 4))
    assert seen == [1]


@torch.no_grad()
def quantized_without_statistics(model):
    model[0].weight.copy_(torch.ops.blaq.fake_quantize(model[0].weight, torch.ones(1), (1.0,), 0))
    return model.eval()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.fc(x)) if x.sum() > 0 else x


def test_bad_models_are_named_and_stay_as_they_were():
    model = quantized(Branches())
    for call in (lambda: blaq.pack(model, bits=1, fold_norm=True), lambda: blaq.fold_norm(model)):
        with pytest.raises(ValueError, match=r"blaq\.fold_norm: model must be one that torch\.fx traces, "
                                             "got Branches: "):
            call()
    assert kinds(model) == ["Linear", "BatchNorm1d"]
    model = quantized(sequential()).train()
    with pytest.raises(ValueError, match=r"blaq\.fold_norm: model must be in eval mode; try model.eval\(\)"):
        blaq.pack(model, bits=1, fold_norm=True)
    assert kinds(model)[0] == "Conv2d"


def test_a_folded_model_only_runs(tmp_path):
    folded = pack(sequential(), fold_norm=True)
    with pytest.raises(ValueError, match=r"blaq\.save: 0 must be as it was packed, .* before blaq\.fold_norm"):
        blaq.save(folded, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blaq\.unpack: 0 must be as it was packed"):
        blaq.unpack(folded)
    assert kinds(folded)[0] == "PackedConv2d" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="PackedLinear: input must have 2 dimensions"):
        folded[7](torch.randn(2, 3, 144))
    with pytest.raises(ValueError, match="PackedConv2d: layer must be in eval mode"):
        folded.train()(torch.randn(2, 3, 8, 8))
    folded.eval()
    x = torch.randn(2, 3, 8, 8)
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(copied(x), folded(x))
    assert "relu" in repr(folded[0]) and "folded" in repr(folded[0])


def test_a_saved_model_is_folded_after_loading(tmp_path):
    packed = pack(sequential())
    blaq.save(packed, tmp_path / "model.safetensors")
    loaded = blaq.fold_norm(blaq.load(tmp_path / "model.safetensors", sequential().eval()))
    assert_same_results(loaded, packed, torch.randn(2, 3, 8, 8), 1e-4)


def test_a_folded_model_compiles_and_exports():
    folded = pack(sequential(), fold_norm=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = folded(x)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-2)
        exported = torch.export.export(folded, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-2)


def test_a_binary_layer_takes_the_norm_and_leaves_the_relu():
    packed = pack(nn.Sequential(blaq.BinaryActivation(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    folded = blaq.fold_norm(copy.deepcopy(packed))
    assert kinds(folded) == ["BinaryActivation", "PackedBinaryConv2d", "Identity", "ReLU"]
    assert_same_results(folded, packed, torch.randn(2, 4, 5, 5))


def test_blocks_fold_by_themselves():
    packed = pack(BasicBlock(16, 16, 1))
    assert_same_results(blaq.fold_norm(copy.deepcopy(packed)), packed, torch.randn(1, 16, 6, 6), 1e-3)

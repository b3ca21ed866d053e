"""save, load, inspect: what was saved comes back bit for bit; a bad file changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import DTYPES, quantize_, same_bits, small_net
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import blaq
from blaq import PackedLinear


def packed_net(seed=0):
    return blaq.pack(small_net(seed=seed))


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)


def rewrite(path, tensors=None, config=None, config_text=None, **metadata):
    """The file again, with tensors and fields replaced (None drops one) and no checksum."""
    with safe_open(path, "pt") as file:
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        fields = file.metadata()
    fields.pop("blaq.crc32")
    if config is not None:
        entries = json.loads(fields["blaq.config"])
        config(entries)
        config_text = json.dumps(entries)
    fields["blaq.config"] = config_text or fields["blaq.config"]
    fields |= {f"blaq.{key}": value for key, value in metadata.items()}
    new = {key: value for key, value in (old | (tensors or {})).items() if value is not None}
    save_file(new, path, {key: value for key, value in fields.items() if value is not None})


def test_saved_and_loaded_into_a_float_and_a_packed_model(tmp_path):
    model, path = packed_net(), tmp_path / "model.safetensors"
    model[1].running_mean.uniform_()
    blaq.save(model, path)
    x = torch.randn(4, 2, 5, 5)
    for other in (small_net(known=False, seed=1), packed_net(seed=1)):
        kept = other[0].weight
        assert blaq.load(path, other) is other
        assert equal_states(other, model) and other(x).equal(model(x))
        assert other[0].weight is kept  # copied into, so that an optimizer keeps it
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_loads_into_a_model_without_memory(tmp_path):
    model, path = packed_net(), tmp_path / "model.safetensors"
    blaq.save(model, path)
    with torch.device("meta"):
        empty = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10),
            nn.ReLU(), nn.Linear(10, 7), nn.Linear(7, 3)).eval()
    blaq.load(path, empty)
    x = torch.randn(4, 2, 5, 5)
    assert equal_states(empty, model) and empty(x).equal(model(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_a_model_that_is_one_layer(dtype, tmp_path):
    layer = quantize_(nn.Linear(13, 6, bias=False).to(dtype), "linear", 4, 5)
    weight = layer.weight.detach().clone()
    blaq.save(blaq.pack(layer), tmp_path / "layer")
    loaded = blaq.load(tmp_path / "layer", nn.Linear(13, 6, bias=False).to(dtype))
    assert isinstance(loaded, PackedLinear) and loaded.levels == blaq.pack(layer).levels
    assert same_bits(loaded.weight, weight)
    assert list(blaq.inspect(tmp_path / "layer").tensors) == ["qweight", "scale"]


def test_same_model_same_bytes_in_every_process(tmp_path):
    program = ("import sys, blaq; from quantized import small_net; "
               "blaq.save(blaq.pack(small_net()), sys.argv[1])")
    here = str(Path(__file__).parent)
    for i in range(2):
        environment = {**os.environ, "PYTHONHASHSEED": str(i), "PYTHONPATH": os.pathsep.join(
            [here, *sys.path])}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / str(i))], env=environment,
                       check=True)
    first = (tmp_path / "0").read_bytes()
    assert first == (tmp_path / "1").read_bytes()
    blaq.save(blaq.load(tmp_path / "0", small_net(known=False)), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == first


class Tied(nn.Module):
    """Two packed layers with one weight, a float one tied to an embedding, a module used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.again = self.a
        self.register_buffer("column", torch.arange(12.0).reshape(3, 4)[:, 1])

    def forward(self, x):
        return self.head(self.again(self.b(self.a(self.embedding(x)))))


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    quantize_(model.a)
    blaq.pack(model)
    blaq.save(model, tmp_path / "tied")
    file = blaq.inspect(tmp_path / "tied")
    assert set(file.tensors) == {"a.qweight", "a.scale", "a.bias", "b.bias", "column",
                                 "embedding.weight"}
    assert file.aliases == {"again.bias": "a.bias", "again.qweight": "a.qweight",
                            "again.scale": "a.scale", "b.qweight": "a.qweight",
                            "b.scale": "a.scale", "head.weight": "embedding.weight"}
    other = blaq.load(tmp_path / "tied", Tied())
    assert other.a is other.again and other.a.qweight is other.b.qweight
    assert other.head.weight is other.embedding.weight and equal_states(other, model)
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(6, 8))
    assert blaq.load(tmp_path / "tied", untied).head.weight.equal(model.head.weight)
    rewrite(tmp_path / "tied", {"head.weight": torch.zeros(6, 8)}, aliases=json.dumps(
        {k: v for k, v in file.aliases.items() if k != "head.weight"}))
    with pytest.raises(ValueError, match=r"head\.weight must equal embedding\.weight, the same"):
        blaq.load(tmp_path / "tied", Tied())


def test_inspect_tells_what_is_there(tmp_path):
    model, path = packed_net(), tmp_path / "model.safetensors"
    blaq.save(model, path)
    file = blaq.inspect(path)
    assert file.path == path and file.size == path.stat().st_size
    assert {name: (spec.kind, spec.bits) for name, spec in file.layers.items()} == {
        "3": ("conv2d", 1), "6": ("linear", 3), "8": ("linear", 2)}
    spec = file.layers["6"]
    assert spec.shape == (10, 24) and spec.levels == model[6].levels and spec.dtype == "float32"
    assert file.tensors["6.qweight"] == ("U8", [3, 10, 3])
    assert file.metadata["blaq.format_version"] == "1"


def plane(model, layer, change):
    qweight = model[layer].qweight.clone()
    change(qweight)
    return {f"{layer}.qweight": qweight}


def edit(layer, **fields):
    return lambda config: config[layer].update(fields)


BAD_FILES = {  # tensors, and fields, of small_net to put wrong; and the rule that must be named
    "version": (None, {"format_version": "2"}, r"blaq\.format_version must be 1, got 2"),
    "no version": (None, {"format_version": None}, r"format_version must be 1, got None"),
    "no config": (None, {"config": lambda c: c.clear()}, r"6?\.qweight must be a tensor of the mo"),
    "config is no JSON": (None, {"config_text": "{"}, r"blaq\.config must be a JSON object"),
    "config is a list": (None, {"config_text": "[]"}, r"blaq\.config must be a JSON object"),
    "config is deep": (None, {"config_text": "[" * 99999}, r"blaq\.config must be a JSON object"),
    "entry": (None, {"config": lambda c: c.update({"6": 3})}, r"'6' must have exactly kind, shape"),
    "field missing": (None, {"config": lambda c: c["6"].pop("bits")}, "must have exactly kind"),
    "field unknown": (None, {"config": edit("6", more=1)}, "must have exactly kind"),
    "kind": (None, {"config": edit("6", kind="conv1d")}, "must have kind linear or conv2d"),
    "kind of another": (None, {"config": edit("6", kind="conv2d")}, "shape of 4 positive integers"),
    "shape": (None, {"config": edit("6", shape=[10, -24])}, "shape of 2 positive integers"),
    "shape true": (None, {"config": edit("6", shape=[True, 24])}, "shape of 2 positive integers"),
    "shape huge": (None, {"config": edit("6", shape=[10, 2**70])}, r"6\.qweight must be U8 \[3"),
    "shape within a byte": (None, {"config": edit("8", shape=[7, 11])}, r"8\.shape must be the"),
    "levels": (None, {"config": edit("6", levels=[1.0, 0.5])}, "must have levels, 1 to 8"),
    "levels NaN": (None, {"config": edit("6", levels=[float("nan"), 1.0])}, "must have levels"),
    "levels text": (None, {"config": edit("6", levels="abc")}, "must have levels, 1 to 8"),
    "levels many": (None, {"config": edit("6", levels=[(i + 1) / 16 for i in range(16)])},
                    "must have levels, 1 to 8"),
    "bits": (None, {"config": edit("6", bits=4)}, "must have bits 3 for 4 levels, got 4"),
    "bits as float": (None, {"config": edit("6", bits=3.0)}, "must have bits 3 for 4 levels"),
    "bits and levels": (None, {"config": edit("6", bits=2, levels=[0.5, 1.0])},
                        r"6\.qweight must be U8 \[2, 10, 3\], as blaq.config has it, got U8 \[3"),
    "group_size": (None, {"config": edit("6", group_size=-2)}, "must have group_size 0, -1 or pos"),
    "group_size other": (None, {"config": edit("6", group_size=8)}, r"6\.scale must be F32"),
    "dtype": (None, {"config": edit("6", dtype="float64")}, "must have dtype float32"),
    "dtype other": (None, {"config": edit("3", dtype="float16")}, r"3\.dtype must be the model's"),
    "module unknown": (None, {"config": lambda c: c.update({"9x": c.pop("6")})},
                       r"9x\.qweight must be U8 .* got no such tensor"),
    "qweight missing": ({"6.qweight": None}, {}, r"6\.qweight must be U8 .*got no such tensor"),
    "scale missing": ({"6.scale": None}, {}, r"6\.scale must be F32 .*got no such tensor"),
    "bias missing": ({"6.bias": None}, {}, r"6\.bias must be in the file as in the model"),
    "bias extra": ({"3.bias": torch.zeros(6)}, {}, r"3\.bias must be in the file as in the model"),
    "bias dtype": ({"6.bias": torch.zeros(10).half()}, {}, r"6\.bias must be F32 \[10\]"),
    "scale dtype": ({"6.scale": torch.ones(10, 1).double()}, {}, r"6\.scale must be F32 \[10, 1\]"),
    "scale NaN": ({"6.scale": torch.full((10, 1), float("nan"))}, {}, r"6\.scale must be finite"),
    "scale inf": ({"6.scale": torch.full((10, 1), float("inf"))}, {}, r"6\.scale must be finite"),
    "other missing": ({"1.running_var": None}, {}, r"1\.running_var must be F32 \[4\]"),
    "other extra": ({"more": torch.ones(1)}, {}, r"more must be a tensor of the model"),
    "other shape": ({"9.weight": torch.ones(7, 3)}, {}, r"9\.weight must be F32 \[3, 7\], as in"),
    "other dtype": ({"9.bias": torch.ones(3).half()}, {}, r"9\.bias must be F32 \[3\], as in the"),
    "float weight": ({"6.weight": torch.ones(10, 24)}, {}, r"6\.weight must be a tensor of"),
    "exotic dtype": ({"9.bias": torch.ones(3, dtype=torch.complex64)}, {}, "of a dtype"),
    "padding bits": (plane(packed_net(), 8, lambda q: q[0, 2, 1].bitwise_or_(0x80)), {},
                     r"8\.qweight must have 6 padding bits of 0 in a row"),
    "signed zero": (plane(packed_net(), 6, lambda q: (q[:2].zero_(), q[2].fill_(1))), {},
                    r"6\.qweight must have no sign on a level of zero"),
    "level beyond": (plane(packed_net(), 6, lambda q: q[:2].fill_(1)),
                     {"config": edit("6", levels=[0.25, 0.5, 1.0])},
                     r"6\.qweight must have codes of 3 levels"),
    "aliases": (None, {"aliases": "[]"}, r"blaq\.aliases must be a JSON object"),
    "alias of nothing": ({"9.bias": None}, {"aliases": '{"9.bias": "nope"}'}, r"\['9\.bias'\]"),
    "alias of itself": (None, {"aliases": '{"9.bias": "9.bias"}'}, r"aliases\['9\.bias'\] must"),
    "alias of a list": (None, {"aliases": '{"x": ["9.bias"]}'}, r"aliases\['x'\] must name"),
    "alias extra": (None, {"aliases": '{"x": "9.bias"}'}, r"x must be a tensor of the model"),
    "checksum": (None, {"crc32": "00000000"}, r"blaq\.crc32 must be [0-9a-f]{8}"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_and_changes_nothing(case, tmp_path):
    tensors, fields, rule = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    blaq.save(packed_net(), path)
    rewrite(path, tensors, **fields)
    model = small_net(known=False, seed=1)
    before = [(type(m), m) for m in model]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blaq\.load: .*bad\.safetensors: .*" + rule):
        blaq.load(path, model)
    assert [(type(m), m) for m in model] == before
    assert all(same_bits(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model,rule", [
    (nn.Sequential(nn.Linear(3, 3)), r"3 must be a Conv2d of the model, .*got no such module"),
    (small_net(False)[:9], r"9\.bias must be a tensor of the model"),
    (small_net(False).half(), r"3\.dtype must be the model's torch.float16, got float32"),
    (blaq.pack(quantize_(nn.Linear(4, 4))), r"3 must be a Conv2d of the model"),
    (packed_net().append(blaq.pack(quantize_(nn.Linear(3, 3)))), r"10 must be packed in the file"),
])
def test_a_file_of_another_model_is_refused(model, rule, tmp_path):
    blaq.save(packed_net(), tmp_path / "f")
    with pytest.raises(ValueError, match=r"blaq\.load: .*: " + rule):
        blaq.load(tmp_path / "f", model)


def test_a_subclass_in_the_model_is_refused(tmp_path):
    class Mine(nn.Linear):
        pass

    blaq.save(packed_net(), tmp_path / "f")
    model = small_net(known=False)
    model[6] = Mine(24, 10)
    with pytest.raises(ValueError, match=r"6 must be a Linear of the model, .*got Mine"):
        blaq.load(tmp_path / "f", model)


@pytest.mark.parametrize("content", [b"", b"x", b"\x80\x04pickle", b"\xff" * 64, b"\2" + b"\0" * 7])
def test_what_is_not_safetensors_is_refused(content, tmp_path):
    (tmp_path / "f").write_bytes(content)
    for read in (blaq.inspect, lambda path: blaq.load(path, small_net())):
        with pytest.raises(ValueError, match=r"blaq\.(inspect|load): .*f: file must be whole"):
            read(tmp_path / "f")
    with pytest.raises(FileNotFoundError):
        blaq.inspect(tmp_path / "nothing")


def test_truncation_anywhere_is_refused(tmp_path):
    path = tmp_path / "f"
    blaq.save(packed_net(), path)
    whole = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="file must be whole safetensors"):
            blaq.inspect(path)


WHOLE: list[bytes] = []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_give_a_value_error_or_the_same_model(tmp_path_factory, data):
    """One to three bytes anywhere in the file: nothing but ValueError, or what was saved."""
    path = tmp_path_factory.getbasetemp() / "flipped"
    if not WHOLE:
        blaq.save(packed_net(), path)
        WHOLE.append(path.read_bytes())
    content = bytearray(WHOLE[0])
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        end = header if data.draw(st.integers(0, 3)) else len(content)
        content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    model = small_net(known=False, seed=1)
    try:
        blaq.load(path, model)
    except ValueError as error:
        assert str(error).startswith(f"blaq.load: {path}: ")
        assert type(model[6]) is nn.Linear
    else:
        assert equal_states(model, packed_net())


@pytest.mark.parametrize("spoil,rule", [
    (lambda m: blaq.unpack(m), r"model must have a packed layer; try blaq\.pack"),
    (lambda m: m.double(), r"3 must be float32 or bfloat16 or float16, got float64"),
    (lambda m: m[6].scale[2].fill_(float("nan")), r"6\.scale must be finite, got \[nan\]"),
    (lambda m: setattr(m[6], "bias", nn.Parameter(m[6].bias.double())),
     r"6\.bias must be F32 \[10\], as the layer is, got F64"),
    (lambda m: m[0].to("meta"), r"0\.weight must be a dense tensor .*got torch.float32 on meta"),
    (lambda m: m[0].register_buffer("c", torch.ones(1, dtype=torch.complex64)), r"0\.c must"),
])
def test_what_cannot_be_saved_is_named_and_leaves_the_old_file(spoil, rule, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    model = packed_net()
    spoil(model)
    with pytest.raises(ValueError, match=r"blaq\.save: .*f: " + rule):
        blaq.save(model, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    with pytest.raises(FileNotFoundError):
        blaq.save(packed_net(), tmp_path / "no" / "f")

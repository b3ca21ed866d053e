"""docs/format.md is right: its reader reads what is written, its example is what is stored."""

import re
from pathlib import Path

import pytest
import torch
from quantized import CODEBOOKS, DTYPES, GROUPS, quantize_, same_bits, small_net
from torch import nn

import blaq
from blaq.quantization import Quantization, record

TEXT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_packed():
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(code) == 1 and "torch" not in code[0] and "blaq " not in code[0]
    names = {}
    exec(code[0], names)  # the document's own code
    return names["read_packed"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_documented_reader_reads_every_codebook(read_packed, dtype, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[quantize_(nn.Linear(13, 6).to(dtype), name, bits, group)
                            for name, bits in CODEBOOKS for group in GROUPS])
    blaq.save(blaq.pack(model), tmp_path / "f")
    weights = read_packed(tmp_path / "f")
    assert len(weights) == len(model)
    for name, layer in model.named_children():
        assert same_bits(torch.from_numpy(weights[name]).to(dtype), layer.weight)


def test_the_documented_reader_reads_convolutions_and_aliases(read_packed, tmp_path):
    model = blaq.pack(small_net())
    model.append(model[6])
    blaq.save(model, tmp_path / "f")
    weights = read_packed(tmp_path / "f")
    assert sorted(weights) == ["10", "3", "6", "8"]
    assert all(same_bits(torch.from_numpy(w), model[int(i)].weight) for i, w in weights.items())


EXAMPLE = torch.tensor([[0.25, -0.5, 0.5], [-0.25, 0.25, 0.25]])
GOLDEN = (  # the example as version 1 is written, byte by byte; it must stay readable for ever
    b'@\x01\0\0\0\0\0\0{"__metadata__":{"blaq.config":"{\\"\\":{\\"bits\\":2,'
    b'\\"dtype\\":\\"float32\\",\\"group_size\\":0,'
    b'\\"kind\\":\\"linear\\",\\"levels\\":[0.5,1.0],\\"shape\\":[2,3]}}",'
    b'"blaq.crc32":"a916774a","blaq.format_version":"1"},"scale":{"dtype":"F32","shape":[1],'
    b'"data_offsets":[0,4]},"qweight":{"dtype":"U8","shape":[2,2,1],"data_offsets":[4,8]}} '
    b"\0\0\0?\x06\0\x02\x01")


def test_the_example_by_hand(tmp_path):
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(EXAMPLE)
    record(layer.weight, Quantization((0.5, 1.0), 0, torch.tensor([0.5])))
    packed = blaq.pack(layer)
    assert f"`{packed.qweight.tolist()}`" in TEXT and "`06 00 02 01`" in TEXT
    blaq.save(packed, tmp_path / "f")
    raw = (tmp_path / "f").read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little"):]
    assert body == torch.tensor([0.5]).numpy().tobytes() + bytes.fromhex("06 00 02 01")


def test_a_file_of_version_1_still_reads(read_packed, tmp_path):
    (tmp_path / "f").write_bytes(GOLDEN)
    loaded = blaq.load(tmp_path / "f", nn.Linear(3, 2, bias=False))
    assert same_bits(loaded.weight, EXAMPLE)
    assert same_bits(torch.from_numpy(read_packed(tmp_path / "f")[""]), EXAMPLE)

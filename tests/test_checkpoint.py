"""Files of a run: whole or not there, and nothing is taken from a damaged one."""

import json
import pickle

import pytest
import torch

from blaq.train.checkpoint import (
    CHECKPOINT,
    CONTENT,
    load_checkpoint,
    save_checkpoint,
    write_metrics,
    write_whole,
)
from blaq.train.config import TrainConfig, load_config
from blaq.train.models import build
from blaq.train.weights import load_weights, save_weights


def content():
    torch.manual_seed(0)
    return {"config": {"bits": 1}, "in_shape": (1, 28, 28), "num_classes": 10,
            "model": {"weight": torch.randn(300)},
            "steps_per_epoch": 3,
            "method": {"steps": 6, "optimizer": {"state": {0: {}}, "betas": (0.9, 0.99)}},
            "oscillation": None,
            "order": torch.Generator().get_state(),
            "random": torch.get_rng_state(), "random_cuda": None, "evaluations": 7,
            "history": [{"epoch": 1, "loss": 0.25, "flip_ratio": None}]}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, content())
    return path


def test_round_trip(path):
    loaded = load_checkpoint(path)
    assert set(loaded) == set(CONTENT)
    assert torch.equal(loaded["model"].pop("weight"), content()["model"]["weight"])
    plain = [key for key, value in content().items() if not isinstance(value, (torch.Tensor, dict))]
    assert {key: loaded[key] for key in plain} == {key: content()[key] for key in plain}
    assert loaded["method"] == content()["method"]


@pytest.mark.parametrize("where", range(10))
def test_any_flipped_byte_is_noticed(path, where):
    whole = path.read_bytes()
    start = whole.index(content()["model"]["weight"].numpy().tobytes())
    at = [0, 40, start, start + 700, start + 1199, len(whole) // 2, len(whole) - 1500,
          len(whole) - 60, len(whole) - 20, len(whole) - 5][where]
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x24]) + whole[at + 1:])
    try:
        loaded = load_checkpoint(path)
    except ValueError as error:
        assert str(error).startswith(f"blaq.load_checkpoint: {path}: ")
    else:  # the byte carried nothing: padding, or a date
        assert torch.equal(loaded["model"]["weight"], content()["model"]["weight"])
        assert not start <= at < start + 1200


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, -1])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path}: file must be a whole checkpoint, got "):
        load_checkpoint(path)


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="checkpoint.pt: file must exist, got no such file"):
        load_checkpoint(tmp_path / CHECKPOINT)


class Payload:
    def __reduce__(self):
        return print, ("code in the file ran",)


def test_code_in_the_file_does_not_run(path, capsys):
    torch.save({**content(), "version": 2, "model": {"x": Payload()}}, path)
    with pytest.raises(ValueError, match="file must be a whole checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="file must be a whole checkpoint"):
        load_checkpoint(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 1}, "version must be 2, got 1"),
    ({"history": "none"}, "history must be in the file, of its type, got str"),
    ({"order": None}, "order must be in the file, of its type, got NoneType"),
])
def test_contradictory(path, change, message):
    torch.save({"version": 2, **content(), **change}, path)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        load_checkpoint(path)


def test_incomplete(path):
    torch.save({"version": 2, "history": []}, path)
    with pytest.raises(ValueError, match="config must be in the file, of its type, got nothing"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="content must be a dict, got list"):
        load_checkpoint(path)


def test_an_interrupted_write_leaves_the_old_file(path):
    before = path.read_bytes()

    def interrupted(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_metrics_are_json_lines(tmp_path):
    history = [{"epoch": 1, "loss": 0.1, "flip_ratio": None}, {"epoch": 2, "loss": 2**-40}]
    write_metrics(tmp_path / "m.jsonl", history)
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == history
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "m.jsonl", [{"loss": float("nan")}])
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


# float weights


def test_weights_round_trip_and_bad_files(tmp_path):
    def lenet(width=0.1):
        return build("lenet5", 10, (1, 16, 16), width=width)

    path, model = tmp_path / "model.safetensors", lenet()
    save_weights(model, path)
    other = lenet()
    load_weights(other, path)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    wider = lenet(0.2)
    before = [p.clone() for p in wider.parameters()]
    with pytest.raises(ValueError, match=f"{path}: conv1.bias must be .4. as in the model"):
        load_weights(wider, path)
    assert all(torch.equal(a, b) for a, b in zip(before, wider.parameters(), strict=True))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path}: file must be whole safetensors"):
        load_weights(other, path)
    with pytest.raises(ValueError, match="none: file must exist"):
        load_weights(other, tmp_path / "none")


# config


def test_config_from_toml_and_json(tmp_path):
    toml, as_json = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text('model = "mlp4"\nbits = 2\nlr = 1\nlast_bits = 8\naugment = true  # yes\n')
    config = load_config(toml)
    assert (config.model, config.bits, config.last_bits, config.augment) == ("mlp4", 2, "8", True)
    assert type(config.lr) is float and config.epochs == TrainConfig().epochs
    as_json.write_text(json.dumps(config.as_dict()))
    assert load_config(as_json) == config


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.toml", "bit = 2", "keys must be among model, .*, got 'bit'"),
    ("a.toml", "bits = ", "Invalid value"),
    ("a.toml", "bits = 5", "bits must be 1, 2, 3 or 4, got 5"),
    ("a.toml", "bits = true", "bits must be of type int, got True"),
    ("a.toml", 'bits = "2"', "bits must be of type int, got '2'"),
    ("a.json", '{"lr": NaN}', "lr must be positive and finite, got nan"),
    ("a.json", '{"epochs": 2.5}', "epochs must be of type int, got 2.5"),
    ("a.json", "[1]", "content must be one object, got list"),
    ("a.json", '{"bits": 1', "Expecting"),
    ("a.json", "[" * 100000, "recursion"),
    ("a.yaml", "bits: 1", "name must end in .toml or .json"),
])
def test_bad_config_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"blaq.load_config: {tmp_path / name}: .*{message}"):
        load_config(tmp_path / name)


@pytest.mark.parametrize(("field", "value", "rule"), [
    ("model", "lenet", "one of mlp4"), ("data", "imagenet", "one of digits"),
    ("method", "adam", "one of fp, laq, blaq"), ("backtrack", 0.0, r"in \(0, 1\]"),
    ("backtrack", 1.5, r"in \(0, 1\]"), ("epochs", 0, "at least 1"), ("batch_size", 0, "at lea"),
    ("lr", float("inf"), "positive and finite"), ("lr", 0.0, "positive"), ("width", -1.0, "posit"),
    ("group_size", -2, "0, -1 or positive"), ("max_iter", 0, "at least 1"),
    ("warmup", -1.0, "at least 0"), ("schedule", "linear", "one of cosine, step"),
    ("first_bits", "5", "one of same, fp"), ("amp", "fp16", "one of off, bf16"),
    ("solve", "newton", "one of "), ("seed", -1, "at least 0"),
    ("clip", float("nan"), "at least 0"), ("momentum", 1.0, r"in \[0, 1\)"),
    ("milestones", "3,2", "ascending epochs"), ("milestones", "a", "ascending epochs"),
    ("milestones", "-1", "ascending epochs"), ("loss", "hinge", "one of cross-entropy, squared"),
    ("activation_bits", 9, "0 to 8"), ("validation", -1, "at least 0"), ("gamma", 0.0, "positive"),
])
def test_bad_fields(field, value, rule):
    with pytest.raises(ValueError, match=f"blaq.TrainConfig: {field} must be {rule}.*, got"):
        TrainConfig(**{field: value})


def test_codebook_must_have_the_width():
    with pytest.raises(ValueError, match="bits must be one of .*ternary"):
        TrainConfig(codebook="ternary", bits=3)
    assert TrainConfig(codebook="ternary", bits=3, method="fp").label == "digits-lenet5-fp-s0"
    assert TrainConfig(codebook="ternary", bits=2, seed=5).label == "digits-lenet5-blaq2-s5"

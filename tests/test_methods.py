"""Every method trains, measures what it ships, and refuses what it has no meaning for."""

import re
from pathlib import Path

import pytest
import torch

import blaq
from blaq.convert import is_quantized
from blaq.methods import METHODS, check_method, make_method, method_class
from blaq.methods.method import read_options
from blaq.methods.quantizer import QuantizerMethod
from blaq.nn import PackedLayer
from blaq.train import data as datasets
from blaq.train.config import TrainConfig
from blaq.train.loop import evaluate, quantized_epochs, train
from blaq.train.models import build

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
SETTINGS = {
    "aq": {"epochs": 3}, "alq": {"epochs": 4, "group_size": -1, "options": "rounds=1"},
    "admm": {"options": "rho=0.01"}, "admm-pruning": {"epochs": 4, "options": "sparsity=0.5"},
    "bc": {"options": "magnitude=0.05"}, "bc-stochastic": {"options": "magnitude=0.05"},
    "dc": {"epochs": 4, "options": "sparsity=0.5"},
}
"""What a method needs to learn anything in two short epochs."""


@pytest.fixture(scope="module")
def data():
    """400 and 100 of the digits."""
    def head(split, count):
        return datasets.Split(split.images[:count], split.labels[:count], 10, split.mean, split.std)

    digits = datasets.load("digits")
    return datasets.Data(head(digits.train, 400), head(digits.test, 100))


def config(name, **changes):
    return TrainConfig(**{"method": name, "width": 0.2, "epochs": 2, "batch_size": 16, "lr": 0.003,
                          "threads": 1, "schedule": "none", **SETTINGS.get(name, {}), **changes})


@pytest.mark.parametrize("name", METHODS)
def test_learns_and_ships_what_it_measured(tmp_path, data, name):
    run = config(name)
    model, method, history = train(run, tmp_path, data=data)
    losses = [line["train_loss"] for line in history]
    assert min(losses[1:]) < losses[0] and history[-1]["test_loss"] < 2.4
    looks = 6 if name == "ewgs" else 0  # at the curvature: two in each of three batches
    assert history[-1]["evaluations"] == 25 * run.epochs * method.evaluations_per_step + looks
    assert "quantized" not in history[-1]
    assert evaluate(model, data.test) == (history[-1]["test_loss"], history[-1]["test_accuracy"])
    layers = [m for m in model.modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert len(layers) == 4  # plain ones again
    if run.quantized:  # a pruned weight's zero may come on top
        values = max(row.unique().numel() for layer in layers for row in layer.weight.flatten(1))
        assert 2 <= values <= 2**run.bits + (name == "dc")
    if any(map(is_quantized, layers)):
        blaq.set_accuracy("exact")
        try:
            packed = blaq.pack(model)
            assert sum(isinstance(m, PackedLayer) for m in packed.modules()) == 4
            assert evaluate(packed, data.test)[0] == pytest.approx(history[-1]["test_loss"],
                                                                   rel=1e-4)
        finally:
            blaq.set_accuracy("high")


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].bits])
def test_layers_in_full_precision_and_of_8_bits(tmp_path, data, name):
    if name == "alq":
        with pytest.raises(ValueError, match="first_bits and last_bits must be at most 4 for alq"):
            make_method(build("lenet5", 10, (1, 28, 28), width=0.1), config(name, last_bits="8"), 9)
        return
    model = train(config(name, epochs=1, first_bits="fp", last_bits="8"), tmp_path, data=data)[0]
    assert model.conv1.weight.unique().numel() == model.conv1.weight.numel()
    assert 16 < model.fc2.weight.unique().numel() <= 255


def test_registry():
    assert check_method("laq-log", 0, "") == (3, "pow2_zero")
    assert check_method("twn", 2, "ternary") == (2, "ternary")
    assert TrainConfig(method="lab").codebook == "binary"
    assert TrainConfig(method="lat2-exact").codebook == ""
    for name, entry in METHODS.items():
        assert method_class(name).__doc__, name
        for bits in entry.bits:
            for codebook in entry.codebooks[:1]:
                assert check_method(name, bits, codebook) == (bits, codebook)


def test_documentation_has_every_method_and_option():
    text = DOCUMENT.read_text()
    table, options = text.split("## Options of one method")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall("`(.+?)`", row)) == sorted(METHODS)
    named = set(re.findall("`([a-z0-9_]+)`", options))
    assert {option for name in METHODS for option in method_class(name).OPTIONS} <= named


def test_documented_example_of_a_method(data, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "median", None)  # so that it is gone when the test ends
    exec(re.search("```python\n(.*?)```", DOCUMENT.read_text(), re.S)[1], {"__name__": "own"})
    model, _, history = train(config("median"), tmp_path, data=data)
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert len([m for m in blaq.pack(model).modules() if isinstance(m, PackedLayer)]) == 4


@pytest.mark.parametrize(("fields", "message"), [
    ({"method": "twin"}, "method must be one of fp, laq, .* got 'twin'"),
    ({"method": "twn", "bits": 3}, "bits must be 2 for twn, got 3"),
    ({"method": "laq-linear", "bits": 1}, "bits must be 2 or 3 or 4 for laq-linear, got 1"),
    ({"method": "lab", "codebook": "pow2"}, "codebook must be binary for lab, got 'pow2'"),
    ({"method": "alq", "codebook": "pow2"}, "codebook must not be given for alq, got 'pow2'"),
])
def test_a_method_without_a_meaning_for_it(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize(("fields", "message"), [
    ({"method": "laq", "optimizer": "sgd"}, "optimizer must be adamw, .* for laq, got 'sgd'"),
    ({"method": "bwn", "activation_bits": 2}, "activation_bits must be 0 for bwn, got 2"),
    ({"method": "laq", "activation_bits": 2}, "activation_bits must be 0 for laq, got 2"),
    ({"method": "fp", "activation_bits": 2}, "activation_bits must be 0 for fp, got 2"),
    ({"method": "bwn", "options": "rule=none"}, "option rule of bwn must be identity or scaled"),
    ({"method": "bwn", "options": "rul=x"}, "options of bwn must be among rule, got 'rul'"),
    ({"method": "twn", "options": "rule=x"}, "options of twn must not be given, got 'rule'"),
    ({"method": "bc", "options": "magnitude=x"}, "option magnitude of bc must be of type float"),
    ({"method": "bc", "options": "magnitude=0"}, "option magnitude of bc must be positive"),
    ({"method": "bc", "options": "glorot_lr=1"}, "option glorot_lr of bc must be yes or no"),
    ({"method": "admm", "options": "rho=-1"}, "option rho of admm must be at least 0, got -1"),
    ({"method": "dc", "options": "sparsity=1"}, r"option sparsity of dc must be a share in \[0, 1"),
    ({"method": "dc", "options": "sparsity=0.1:0.2"}, "option sparsity of dc must be .* or 4 with"),
    ({"method": "dc", "options": "dense=0.8,sparse=0.2"}, "options dense and sparse of dc must be"),
    ({"method": "alq", "options": "prune=1"}, "option prune of alq must be in "),
    ({"method": "alq", "options": "rounds=-1"}, "option rounds of alq must be at least 0"),
    ({"method": "aq", "options": "margin=0"}, "option margin of aq must be positive, got 0"),
])
def test_options_without_a_meaning(tmp_path, data, fields, message):
    with pytest.raises(ValueError, match=f"blaq.methods: {message}"):
        train(TrainConfig(**fields), tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_an_epoch_is_chosen_among_those_that_measured_quantized_weights(tmp_path, data):
    history = train(config("aq"), tmp_path, data=data)[2]
    assert [line.get("quantized", True) for line in history] == [False, False, True]
    assert quantized_epochs(history) == history[2:] and 0 < history[-1]["weight_bits"] <= 16
    assert quantized_epochs(history[:2]) == history[:2]


def test_options_are_read_by_the_type_of_their_default():
    defaults = {"rate": 0.5, "count": 3, "flag": False, "name": "a"}
    assert read_options("m", " rate=2, count = 4,flag=yes,name=b", defaults) == {
        "rate": 2.0, "count": 4, "flag": True, "name": "b"}
    assert read_options("m", "", defaults) == defaults


def test_quantizers_own_parameters_have_no_decay_and_a_rate_of_their_own():
    method = make_method(build("lenet5", 10, (1, 28, 28), width=0.1),
                         config("dc", weight_decay=0.1, lr=1.0), 5)
    assert isinstance(method, QuantizerMethod)
    plain, learned = method.optimizer.param_groups
    assert [p.shape for p in learned["params"]] == [(16,)] * 4
    assert (plain["weight_decay"], learned["weight_decay"]) == (0.1, 0.0)
    learned["lr_scale"] = 0.5
    method.set_lr(0.2)
    assert (plain["lr"], learned["lr"]) == (0.2, 0.1)


def test_binary_connect_rates_by_glorot():
    run = config("bc", options="glorot_lr=yes,magnitude=1.0")
    method = make_method(build("lenet5", 10, (1, 28, 28), width=0.1), run, 5)
    fans = [(1 + 2) * 25, (2 + 5) * 25, 80 + 50, 50 + 10]
    rates = [group["lr_scale"] for group in method.optimizer.param_groups[1:]]
    assert rates == pytest.approx([(fan / 1.5) ** 0.5 for fan in fans])
    count = sum(len(group["params"]) for group in method.optimizer.param_groups)
    assert count == len(list(method.model.parameters())) == 8

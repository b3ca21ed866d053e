"""Training: learns, is reproducible, and resumes bit for bit wherever it was interrupted."""

import json
import math

import pytest
import torch

import blaq
from blaq.methods import make_method
from blaq.train import data as datasets
from blaq.train.checkpoint import CHECKPOINT, CONFIG, METRICS
from blaq.train.config import TrainConfig
from blaq.train.loop import evaluate, learning_rate, restore, train
from blaq.train.models import build
from blaq.train.weights import save_weights

SMALL = {"width": 0.1, "epochs": 4, "batch_size": 16, "threads": 1, "lr": 0.01}
METHODS = {
    "fp": {"method": "fp", "max_grad_norm": 1.0},
    "laq": {"method": "laq", "bits": 2, "group_size": -1},
    "blaq": {"bits": 1, "augment": True, "last_bits": "8"},
    "one-pass": {"method": "blaq-one-pass", "bits": 3, "solve": "exact", "first_bits": "fp"},
    "bc": {"method": "bc", "model": "mlp4", "width": 0.01, "first_bits": "8"},
    "random": {"method": "bc-stochastic", "options": "magnitude=0.1"},
    "two-scale": {"method": "lat2-approximate"},
    "admm": {"method": "admm", "bits": 2, "options": "growth=2.0"},
    "pruned": {"method": "admm-pruning", "options": "sparsity=0.5,retrain=0.6"},
    "dc": {"method": "dc", "options": "sparsity=0.5,dense=0.2,sparse=0.5"},
    "alq": {"method": "alq", "group_size": -1, "options": "rounds=1"},
    "aq": {"method": "aq"},
    "twn": {"method": "twn-exact", "optimizer": "sgd", "validation": 40},
    "batch-norm": {"model": "mlp4", "width": 0.01, "bits": 2, "amp": "bf16", "schedule": "step"},
}


@pytest.fixture(scope="module")
def data():
    """200 and 80 of the digits."""
    def head(split, count):
        return datasets.Split(split.images[:count], split.labels[:count], 10, split.mean, split.std)

    digits = datasets.load("digits")
    return datasets.Data(head(digits.train, 200), head(digits.test, 80))


def config(name, **changes):
    return TrainConfig(**{**SMALL, **METHODS[name], **changes})


def tensors(value):
    """All tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    nested = (dict, list, tuple, torch.Tensor)
    return [t for v in values if isinstance(v, nested) for t in tensors(v)]


def assert_same(first, second, out, other):
    """Two runs: every tensor of model and optimizer, every metric but the time."""
    for a, b in ((first.model, second.model), (first.method, second.method)):
        left, right = tensors(a.state_dict()), tensors(b.state_dict())
        assert len(left) == len(right) > 0
        assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
    lines = [[json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
             for folder in (out, other)]
    for line in (*lines[0], *lines[1]):
        assert line.pop("seconds") >= 0
    assert lines[0] == lines[1]
    assert [line["epoch"] for line in lines[0]] == list(range(1, len(lines[0]) + 1))


class Kill(BaseException):
    """Ends a run where Ctrl-C or a kill would."""


def killed(config, out, data, epoch, batch):
    def on_batch(*at):
        if at[:2] == (epoch, batch):
            raise Kill

    with pytest.raises(Kill):
        train(config, out, data=data, on_batch=on_batch)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, data, name):
    whole = train(config(name), tmp_path / "whole", data=data)
    killed(config(name), tmp_path / "parts", data, 1, 5)  # before there is a checkpoint
    assert not (tmp_path / "parts" / CHECKPOINT).exists()
    killed(config(name), tmp_path / "parts", data, 3, 7)
    with open(tmp_path / "parts" / METRICS, "a") as file:
        file.write('{"epoch": 3, "train_lo')  # as if it had died while writing
    seen = []
    resumed = train(config(name), tmp_path / "parts", data=data, on_epoch=seen.append)
    assert [line["epoch"] for line in seen] == [3, 4]
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "parts")
    again = train(config(name), tmp_path / "parts", on_batch=lambda *_: pytest.fail("trained"))
    assert_same(whole, again, tmp_path / "whole", tmp_path / "parts")
    restored_config, restored = restore(tmp_path / "parts")
    assert restored_config == config(name)
    assert_same(whole, restored, tmp_path / "whole", tmp_path / "parts")


def test_more_epochs_go_on_where_the_schedule_allows(tmp_path, data):
    flat = {"schedule": "none"}
    whole = train(config("blaq", **flat), tmp_path / "whole", data=data)
    train(config("blaq", epochs=2, **flat), tmp_path / "parts", data=data)
    longer = train(config("blaq", **flat), tmp_path / "parts", data=data)
    assert_same(whole, longer, tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match="epochs must be at least 4, which .* got 3"):
        train(config("blaq", epochs=3, **flat), tmp_path / "parts", data=data)


def test_a_folder_with_a_run(tmp_path, data):
    train(config("laq", epochs=1), tmp_path, data=data)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {CHECKPOINT, CONFIG, METRICS}
    with pytest.raises(ValueError, match="out must be a folder without a run.*try --resume"):
        train(config("laq", epochs=1), tmp_path, data=data, resume=False)
    with pytest.raises(ValueError, match=r"lr must be 0.01, as the run in .* began, got 0.02"):
        train(config("laq", epochs=1, lr=0.02), tmp_path, data=data)
    (tmp_path / CHECKPOINT).write_bytes(before[CHECKPOINT][:-7])
    with pytest.raises(ValueError, match="file must be a whole checkpoint"):
        train(config("laq", epochs=1), tmp_path, data=data)
    (tmp_path / CHECKPOINT).write_bytes(before[CHECKPOINT])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_seed_decides_and_the_caller_s_state_stays(tmp_path, data):
    torch.manual_seed(11)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = train(config("blaq", epochs=1), tmp_path / "a", data=data)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    torch.manual_seed(12)
    second = train(config("blaq", epochs=1), tmp_path / "b", data=data)
    assert_same(first, second, tmp_path / "a", tmp_path / "b")
    other = train(config("blaq", epochs=1, seed=1), tmp_path / "c", data=data)
    assert other.history[0]["train_loss"] != first.history[0]["train_loss"]


@pytest.mark.parametrize(("name", "evaluations"),
                         [("fp", 1), ("laq", 1), ("blaq", 2), ("one-pass", 1)])
def test_gradient_evaluations_are_counted(tmp_path, data, name, evaluations):
    result = train(config(name, epochs=2), tmp_path, data=data)
    assert [line["evaluations"] for line in result.history] == [12 * evaluations, 24 * evaluations]
    measured = name != "fp"
    assert all((line["flip_ratio"] is not None) == measured for line in result.history)
    assert all((line["oscillation"] is not None) == measured for line in result.history)
    untracked = train(config(name, epochs=1, track_oscillation=False), tmp_path / "x", data=data)
    assert untracked.history[0]["oscillation"] is None


def test_laq_is_blaq_with_backtrack_1(tmp_path, data):
    laq = train(config("laq"), tmp_path / "laq", data=data)
    blaq_1 = train(config("laq", method="blaq", backtrack=1.0), tmp_path / "blaq", data=data)
    assert_same(laq, blaq_1, tmp_path / "laq", tmp_path / "blaq")


@pytest.mark.parametrize("method", ["fp", "laq", "blaq"])
def test_learns_the_digits(tmp_path, method):
    run = TrainConfig(method=method, width=0.3, epochs=5, lr=3e-3, threads=1)
    model, _, history = train(run, tmp_path)
    assert history[-1]["test_accuracy"] > 0.9
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    test = datasets.load("digits").test
    accuracy = history[-1]["test_accuracy"]
    assert evaluate(model, test) == (history[-1]["test_loss"], accuracy)
    if method != "fp":  # what was evaluated is what ships
        assert evaluate(blaq.pack(model), test)[1] == pytest.approx(accuracy, abs=0.003)


def test_starts_from_float_weights(tmp_path, data):
    fp = train(config("fp", epochs=2), tmp_path / "fp", data=data)
    save_weights(fp.model, tmp_path / "fp.safetensors")
    tuned = config("laq", init=str(tmp_path / "fp.safetensors"), epochs=1, lr=1e-6)
    result = train(tuned, tmp_path / "laq", data=data)
    scratch = train(config("laq", epochs=1, lr=1e-6), tmp_path / "scratch", data=data)
    assert result.history[0]["train_loss"] < 0.8 * scratch.history[0]["train_loss"]
    (tmp_path / "fp.safetensors").unlink()  # a run that has begun needs it no more
    assert len(train(config("laq", init=tuned.init, epochs=2, lr=1e-6, schedule="cosine"),
                     tmp_path / "laq", data=data).history) == 2


def test_training_that_diverges_is_an_error(tmp_path, data, monkeypatch):
    broken = data.train.normalise
    monkeypatch.setattr(datasets.Split, "normalise", lambda self, x: broken(x) * float("nan"))
    with pytest.raises(RuntimeError, match="loss must be finite, got nan in epoch 1"):
        train(config("fp"), tmp_path / "fp", data=data)
    with pytest.raises(RuntimeError, match="gradient of 'conv1.weight' must be finite"):
        train(config("laq"), tmp_path / "laq", data=data)
    assert not (tmp_path / "fp" / CHECKPOINT).exists()


def test_layers_get_their_widths():
    run = config("blaq", first_bits="fp", last_bits="4", bits=2)
    model = build("lenet5", 10, (1, 28, 28), width=0.1)
    make_method(model, run, 1)
    widths = {name: getattr(blaq.quantization_of(p), "bits", None)
              for name, p in model.named_parameters() if name.endswith("weight")}
    assert widths == {"conv1.weight": None, "conv2.weight": 2, "fc1.weight": 2, "fc2.weight": 4}


def test_learning_rate():
    def rates(**fields):
        run = TrainConfig(lr=1.0, epochs=8, **fields)
        return [learning_rate(run, step, 5) for step in range(40)]

    assert rates(schedule="none") == [1.0] * 40
    assert rates(schedule="step") == pytest.approx([1.0] * 20 + [0.1] * 10 + [0.01] * 10)
    cosine = rates(schedule="cosine", warmup=2)
    assert cosine[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cosine[10] == 1.0 and cosine[25] == pytest.approx(0.5)
    assert cosine[39] == pytest.approx(0.5 * (1 + math.cos(math.pi * 29 / 30)))
    assert all(rate > 0 for rate in rates(warmup=100, schedule="cosine"))
    milestones = rates(schedule="step", milestones="1,2.4", gamma=0.5)
    assert milestones == pytest.approx([1.0] * 5 + [0.5] * 7 + [0.25] * 28)
    falling = rates(schedule="exponential", gamma=0.9)
    assert falling == pytest.approx([0.9 ** (step // 5) for step in range(40)])
    later = rates(schedule="exponential", gamma=0.9, milestones="3")
    assert later == pytest.approx([0.9 ** max(0, step // 5 - 3) for step in range(40)])


def test_images_are_held_out_the_same_for_every_seed(tmp_path, data):
    rest, held = datasets.held_out(data.train, 40)
    assert (len(rest), len(held)) == (160, 40)
    again = datasets.held_out(data.train, 40)[1]
    assert torch.equal(held.images, again.images)
    whole = [tuple(image.flatten().tolist()) for image in data.train.images]
    parts = [tuple(image.flatten().tolist()) for part in (rest, held) for image in part.images]
    assert sorted(parts) == sorted(whole)
    model, _, history = train(config("laq", epochs=1, validation=40), tmp_path / "a", data=data)
    assert history[0]["evaluations"] == 160 // 16
    assert evaluate(model, held) == (history[0]["valid_loss"], history[0]["valid_accuracy"])
    assert evaluate(model, data.test) == (history[0]["test_loss"], history[0]["test_accuracy"])
    for count in (200, 201):
        with pytest.raises(ValueError, match=f"validation must leave some of the 200 .*{count}"):
            train(config("laq", validation=count), tmp_path / "b", data=data)


def test_lab_recipe(tmp_path, data):
    run = config("laq", model="mlp4", width=0.02, epochs=2, loss="squared-hinge", output_norm=True,
                 init_rule="lab")
    model, _, history = train(run, tmp_path, data=data)
    assert type(model[-1]) is torch.nn.BatchNorm1d and model[-1].num_features == 10
    expected = evaluate(model, data.test, loss="squared-hinge")
    assert expected == (history[-1]["test_loss"], history[-1]["test_accuracy"])
    with torch.no_grad():
        outputs = model.eval()(data.test.normalise(data.test.images))
    targets = torch.full_like(outputs, -1.0)
    targets[torch.arange(80), data.test.labels] = 1.0
    by_hand = (1 - targets * outputs).clamp_min(0).square().mean()
    assert history[-1]["test_loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_lab_initial_weights():
    model = TrainConfig(init_rule="lab", width=0.5).build(10, (1, 28, 28))
    for layer, fans in ((model.conv2, 25 * (10 + 25)), (model.fc1, 400 + 250)):
        bound = math.sqrt(1.5 / fans)
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (layer.bias == 0).all()


def test_evaluate_by_hand(data):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.Dropout(0.9))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 2.0] + [0.0] * 8))
    loss, accuracy = evaluate(model, data.test, batch_size=7)
    ones = (data.test.labels == 1).double().mean().item()
    assert accuracy == pytest.approx(ones)
    assert loss == pytest.approx(math.log(9 + math.exp(2)) - 2 * ones, rel=1e-5)
    assert model.training

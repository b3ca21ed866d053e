"""Methods that train through quantizers: their steps by hand, and whole runs on a few digits."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import blaq
from blaq.methods import METHODS, make_method
from blaq.methods.ewgs import EWGS, ScaledGradientStep, curvature_deltas
from blaq.methods.lr_net import LRNet
from blaq.methods.norms import RecentInputs
from blaq.methods.oscillation import Dampened, DampenedStep, Frozen, FrozenStep
from blaq.methods.saq import SAQ
from blaq.methods.tempering import TemperedStep
from blaq.train import data as datasets
from blaq.train.config import TrainConfig
from blaq.train.loop import evaluate, train

LATENT = torch.tensor([[0.9, -0.35, 0.1], [-2.0, 0.6, -0.05]])


def set_to(parameter, value):
    with torch.no_grad():
        parameter.fill_(value)


def config(method, **fields):
    return TrainConfig(**{"method": method, "epochs": 4, "lr": 0.01, **fields})


def test_ewgs_gradient_by_hand():
    quantizer = ScaledGradientStep(LATENT, 2)
    set_to(quantizer.step, 0.5)
    quantizer.delta.fill_(0.2)
    latent = LATENT.clone().requires_grad_()
    quantizer(latent).backward(torch.tensor([[1.0, 2.0, -4.0], [1.0, 1.0, -8.0]]))
    # Inside the clip: z = -0.7, 0.2 and -0.1, rounded to -1, 0 and 0; g (1 + 0.2 sign(g) (z - ẑ)).
    expected = [[0.0, 2 * (1 + 0.2 * 0.3), -4 * (1 - 0.2 * 0.2)],
                [0.0, 0.0, -8 * (1 + 0.2 * 0.1)]]
    torch.testing.assert_close(latent.grad, torch.tensor(expected))
    latent.grad = None
    quantizer.delta.fill_(-0.2)  # the loss is concave: max(0, δ), as in LSQ
    quantizer(latent).sum().backward()
    assert latent.grad.tolist() == [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]


def test_ewgs_delta_of_a_quadratic():
    """H is diagonal, so Hutchinson's estimate is its trace; g = h ŵ is known."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    quantizer = ScaledGradientStep(layer.weight.detach(), 3)
    parametrize.register_parametrization(layer, "weight", quantizer)
    hessian = torch.rand(5, 6) + 0.5
    random_state = torch.get_rng_state()

    def closure():
        layer.zero_grad()
        loss = 0.5 * (hessian * layer.weight.square()).sum()
        loss.backward()
        return loss

    found = curvature_deltas(layer, [quantizer], closure, seed=3)
    grad = hessian * layer.weight.detach()
    step = quantizer.step.item()
    # In steps g is s g and H is s² H.
    expected = step**2 * hessian.sum().item() / 30 / (3 * (step * grad).std().item())
    assert found == [pytest.approx(expected, rel=1e-2)]
    assert quantizer.probe is None and torch.equal(torch.get_rng_state(), random_state)
    hessian = -hessian
    assert curvature_deltas(layer, [quantizer], closure, seed=3) == [pytest.approx(-expected, 1e-2)]


def test_ewgs_looks_at_the_first_batches_of_every_epoch_but_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    method = EWGS(model, config("ewgs", bits=3, activation_bits=3), steps_per_epoch=5)
    x, y, calls = torch.randn(20, 4), torch.arange(20) % 3, []

    def closure():
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append(method.steps)
        return loss

    seen = []
    for _ in range(10):
        method.step(closure)
        seen.append([q.delta.item() for q in model.modules() if isinstance(q, ScaledGradientStep)])
    assert [calls.count(step) for step in range(10)] == [1] * 5 + [3, 3, 3, 1, 1]
    assert seen[4] == [0.0, 0.0, 0.0] and any(delta > 0 for delta in seen[5])
    assert seen[7] != seen[6] != seen[5] and seen[9] == seen[7]


def tempered(**options):
    quantizer = TemperedStep(LATENT, 2, None, {"noise": 1.0, "decay": 6.0, **options})
    set_to(quantizer.step, 0.5)
    return quantizer


def test_tempered_noise_decays_and_has_the_size_of_the_error():
    quantizer = tempered()
    clean = quantizer.eval()(LATENT)
    error = (clean - LATENT).abs()
    quantizer.train()
    torch.manual_seed(0)
    for progress in (0.0, 0.5, 1.0):
        quantizer.progress = progress
        scale = math.exp(-6 * progress)
        noise = torch.stack([quantizer(LATENT).detach() for _ in range(3000)]) - clean
        largest = noise.abs().amax(0)
        assert (largest <= scale * error * (1 + 1e-4) + 1e-7).all()
        assert (largest >= 0.97 * scale * error - 1e-7).all()
        assert (noise.mean(0).abs() <= 5 * scale * error / math.sqrt(3 * 3000) + 1e-7).all()


def test_progress_reaches_the_quantizers_of_inputs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    run = config("noise-tempering", activation_bits=3, epochs=2)
    method = make_method(model, run, steps_per_epoch=1)
    levels = []
    for _ in range(2):
        method.step(lambda: model(torch.ones(2, 4)).sum())
        levels.append([m.noise() for m in model.modules() if isinstance(m, TemperedStep)])
    assert levels == [[1.0] * 3, [math.exp(-3.0)] * 3]


def test_tempered_delta_s_hypergradient():
    """-g · (the last step's |g| (z - ẑ)), as a cosine: how the loss would move with δ."""
    quantizer = tempered(noise=0.0)
    first = torch.tensor([[1.0, 2.0, -4.0], [1.0, 1.0, -8.0]])
    second = torch.tensor([[1.0, -3.0, 2.0], [1.0, 1.0, 1.0]])
    latent = LATENT.clone().requires_grad_()
    quantizer(latent).backward(first)
    assert quantizer.delta.grad.item() == 0.0  # nothing has come before
    quantizer.delta.grad = None
    quantizer(latent).backward(second)
    z = (LATENT / 0.5).clamp(-2, 1)
    last = (0.5 * first).abs() * (z - z.round())
    g = 0.5 * second
    expected = -(g * last).sum() / (g.norm() * last.norm())
    torch.testing.assert_close(quantizer.delta.grad, expected)
    # Its sign is the loss's: w after a step with δ and with a little more.
    losses = [(g * (z - 0.1 * (0.5 * first + delta * last))).sum() for delta in (0.0, 1e-3)]
    assert (losses[1] - losses[0]) * expected > 0


def quadratic_model():
    """A layer and a bias in a model, and a loss whose gradients are known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    target = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]])
    values = []

    def closure():
        model.zero_grad()
        weight = model[0].weight
        loss = 0.5 * (weight - target).square().sum() + 0.5 * model[0].bias.square().sum()
        values.append((weight.detach().clone(), model[0].bias.detach().clone()))
        loss.backward()
        return loss

    return model, closure, target, values


def test_saq_steps_with_the_gradient_at_the_ascended_weights():
    model, closure, target, values = quadratic_model()
    method = SAQ(model, config("saq", bits=3, optimizer="sgd", momentum=0.0, options="rho=0.3"), 1)
    assert method.evaluations_per_step == 2
    (_, quantizer, latent), bias = method.layers[0], model[0].bias
    before, old_bias = latent.detach().clone(), bias.detach().clone()
    quantized = quantizer(before).detach()
    z = before / quantizer.step.detach()
    inside = (z >= -4) & (z <= 3)
    loss = method.step(closure)
    g, g_bias = quantized - target, old_bias
    norm = torch.cat([g.flatten(), g_bias]).norm()
    moved, moved_bias = quantized + 0.3 * g / norm, old_bias + 0.3 * g_bias / norm
    assert len(values) == 2
    torch.testing.assert_close(values[0], (quantized, old_bias))
    torch.testing.assert_close(values[1], (moved, moved_bias))
    torch.testing.assert_close(latent.detach(), before - 0.01 * (moved - target) * inside)
    torch.testing.assert_close(bias.detach(), old_bias - 0.01 * moved_bias)
    assert loss.item() == pytest.approx(0.5 * (g.square().sum() + g_bias.square().sum()).item())
    assert quantizer.probe is None


def test_saq_leaves_the_model_as_it_was_if_the_second_evaluation_fails():
    model, closure, _, values = quadratic_model()
    method = SAQ(model, config("saq", bits=3), 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def failing():
        if len(values) == 1:
            raise ZeroDivisionError
        return closure()

    with pytest.raises(ZeroDivisionError):
        method.step(failing)
    assert method.layers[0][1].probe is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_dampening_by_hand():
    quantizer = DampenedStep(LATENT, 2, None, {"dampening": 0.1})
    set_to(quantizer.step, 0.5)
    quantizer.progress = 0.5
    latent = LATENT.clone().requires_grad_()
    penalty = quantizer.penalty(latent)
    # ŵ - clip(w), clip to -1 and 0.5: 0, -0.15, -0.1 and 0, 0, 0.05; λ = 0.05 half way.
    rows = (0.15**2 + 0.1**2) / 3 + 0.05**2 / 3
    assert penalty.item() == pytest.approx(0.05 * rows, rel=1e-5)
    penalty.backward()
    expected = torch.tensor([[0.0, 0.15, 0.1], [0.0, 0.0, -0.05]]) * 0.05 * 2 / 3
    torch.testing.assert_close(latent.grad, expected)
    assert quantizer.step.grad is None
    quantizer.progress = 0.0
    assert quantizer.penalty(LATENT).item() == 0.0
    quantizer.progress = 1.0
    assert quantizer.weight() == pytest.approx(0.1)


def test_a_weight_that_oscillates_freezes_where_it_was_most():
    options = {"momentum": 0.5, "start": 0.3, "end": 0.1}
    latent = torch.tensor([[0.0, 0.0, 1.0]])
    quantizer = FrozenStep(latent, 3, None, options)
    set_to(quantizer.step, 1.0)
    quantizer.integer.copy_(latent)
    quantizer.average.copy_(latent)

    def step(first, progress):
        quantizer.progress = progress
        latent.copy_(torch.tensor([[first, 0.2, 1.0]]))
        quantizer.after_step(latent, None)
        return quantizer.frequency[0].tolist()

    assert step(1.0, 0.1) == [0.0, 0.0, 0.0]  # a first change opposes none
    assert step(0.0, 0.1) == [0.5, 0.0, 0.0]  # an oscillation; but no weight freezes this early
    assert not quantizer.frozen.any() and quantizer.threshold() == math.inf
    assert quantizer.average[0, 0].item() == pytest.approx(0.25)
    assert step(1.0, 0.25) == [0.75, 0.0, 0.0]  # threshold 0.3
    assert quantizer.frozen.tolist() == [[True, False, False]]
    assert quantizer.average[0, 0].item() == pytest.approx(0.625)
    assert latent[0].tolist() == pytest.approx([1.0, 0.2, 1.0])
    step(-2.6, 1.0)
    assert quantizer.threshold() == pytest.approx(0.1)
    assert latent[0].tolist() == pytest.approx([1.0, 0.2, 1.0])  # whatever the optimizer did
    set_to(quantizer.step, 0.5)
    step(3.0, 1.0)
    assert latent[0].tolist() == pytest.approx([0.5, 0.2, 1.0])  # its integer, at the new step


def test_lr_net_draws_outputs_with_the_weights_moments():
    torch.manual_seed(0)
    for model, x in ((nn.Sequential(nn.Linear(6, 3)), torch.randn(1, 6)),
                     (nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1)),
                      torch.randn(1, 2, 5, 5))):
        method = LRNet(model, config("lr-net", bits=2), 1)
        layer, quantizer, latent = method.layers[0]
        many = x.expand(20_000, *x.shape[1:])
        outputs = model(many).detach()
        positive, zero = latent.sigmoid(), quantizer.zero()
        weights = [((torch.rand_like(latent) < positive).float() * 2 - 1)
                   * (torch.rand_like(latent) >= zero) * quantizer.factor for _ in range(1500)]
        draws = torch.cat([torch.func.functional_call(
            nn.Linear(6, 3) if isinstance(layer, nn.Linear) else nn.Conv2d(2, 3, 3, 2, 1),
            {"weight": w, "bias": layer.bias}, (x,)) for w in weights]).detach()
        error = 5 * outputs.std(0) * (1 / math.sqrt(len(outputs)) + 1 / math.sqrt(len(draws)))
        assert ((outputs.mean(0) - draws.mean(0)).abs() < error).all()
        torch.testing.assert_close(outputs.std(0), draws.std(0), rtol=0.08, atol=1e-3)
        model.eval()
        assert torch.equal(model(x), model(x))
        shipped = method.finalize().train()
        assert torch.equal(shipped(x), shipped(x))  # nothing is drawn any more


def test_lr_net_s_distributions_do_not_decay():
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    method = LRNet(model, config("lr-net", bits=2, weight_decay=0.1), 1)
    decays = {id(p): group["weight_decay"] for group in method.optimizer.param_groups
              for p in group["params"]}
    for layer, quantizer, latent in method.layers:
        assert decays[id(latent)] == decays[id(quantizer.zero_logit)] == 0.0
        assert decays[id(layer.bias)] == 0.1
    assert len(decays) == len(list(model.parameters())) == 6
    penalty = sum(p.square().sum() for _, q, latent in method.layers
                  for p in (latent, q.zero_logit))
    torch.testing.assert_close(method.penalty(), 1e-11 * penalty)


def test_norms_are_estimated_for_the_weights_that_ship():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    recent = RecentInputs(model, count=2)
    inputs = [torch.randn(8, 4) for _ in range(3)]
    for x in inputs:
        model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)  # as if other weights shipped
        model(torch.randn(8, 4) + 100)  # not in training
    recent.estimate_norms()
    batches = [model[0](x).detach() for x in inputs[1:]]
    for found, each in ((model[1].running_mean, [batch.mean(0) for batch in batches]),
                        (model[1].running_var, [batch.var(0) for batch in batches])):
        torch.testing.assert_close(found, torch.stack(each).mean(0))
    assert model.training and model[2].training and model[1].momentum == 0.1
    mean = model[1].running_mean.clone()
    recent.estimate_norms()  # the inputs are gone
    assert torch.equal(model[1].running_mean, mean)
    recent.close()
    model(inputs[0])
    assert not recent.inputs


def test_inputs_are_quantized_in_front_of_every_layer_but_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    method = Frozen(model, config("lsq-frozen", bits=3, activation_bits=2), 1)
    assert not hasattr(model[0], "input_quantizer")
    seen = {}
    for i in (2, 4):
        seen[i] = []
        model[i].register_forward_pre_hook(lambda m, args, i=i: seen[i].append(args[0]))
    model(torch.randn(50, 4))
    for i in (2, 4):
        step = model[i].input_quantizer.step.item()
        assert set((seen[i][0] / step).round().unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        assert len(seen[i][0].unique()) <= 4
    learned = method.optimizer.param_groups[1]["params"]
    assert any(p is model[2].input_quantizer.step for p in learned)
    assert len(learned) == 5


@pytest.mark.parametrize("method", [Dampened, Frozen, SAQ, EWGS])
def test_options_are_read(method):
    name = next(n for n, entry in METHODS.items() if entry.place.endswith("." + method.__name__))
    option = next(iter(method.OPTIONS))
    run = config(name, options=f"{option}=1")
    made = method(nn.Sequential(nn.Linear(4, 8)), run, 1)
    assert made.options[option] == 1
    with pytest.raises(ValueError, match=f"options of {name} must be among {option}"):
        method(nn.Sequential(nn.Linear(4, 8)), config(name, options="speed=3"), 1)


@pytest.mark.parametrize(("fields", "message"), [
    ({"method": "ewgs", "options": "refresh=0"}, "option refresh of ewgs must be at least 1, got"),
    ({"method": "lotion", "options": "strength=-1"}, "option strength of lotion must be at least"),
    ({"method": "lotion", "optimizer": "sgd"}, "optimizer must be adamw, .* for lotion, got 'sgd'"),
    ({"method": "saq", "options": "rho=nan"}, "option rho of saq must be at least 0, got nan"),
    ({"method": "lsq-frozen", "options": "momentum=0"}, r"option momentum .* must be in \(0, 1\]"),
    ({"method": "lsq", "group_size": -1}, "group_size must not be given for lsq, .* got -1"),
    ({"method": "trq", "activation_bits": 2}, "activation_bits must be 0 for trq, got 2"),
    ({"method": "lsq", "bits": 1}, "bits must be 2 or 3 or 4 for lsq, got 1"),
    ({"method": "lr-net", "bits": 3}, "bits must be 1 or 2 for lr-net, got 3"),
    ({"method": "qil", "codebook": "pow2"}, "codebook must not be given for qil, got 'pow2'"),
])
def test_fields_without_a_meaning(fields, message):
    with pytest.raises(ValueError, match=f"blaq.methods: {message}"):
        make_method(nn.Sequential(nn.Linear(4, 8)), TrainConfig(**fields), 1)


@pytest.mark.parametrize("name", ["lsq", "lq-net", "qil", "dsq", "dsq-learned", "octav", "ewgs",
                                  "noise-tempering", "lr-net", "saq"])
def test_autocast(name):
    """Inputs in bfloat16 are quantized in float32, and handed on in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    bits = {} if name == "lr-net" else {"activation_bits": 2}
    method = make_method(model, config(name, bits=2, **bits), steps_per_epoch=2)
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    seen = []
    model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))

    def closure():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [method.step(closure).item() for _ in range(4)]
    assert all(map(math.isfinite, losses)) and all(p.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert all(values.dtype == torch.bfloat16 for values in seen)
    assert name == "lr-net" or len(seen[-1].unique()) <= 4


RUNS = {
    "lq-net": {"activation_bits": 3}, "qil": {"bits": 3, "activation_bits": 3}, "dsq": {},
    "dsq-learned": {"activation_bits": 4}, "octav": {"activation_bits": 4}, "trq": {},
    "lr-net": {"model": "mlp4", "width": 0.02}, "paretoq": {}, "paretoq-ternary": {},
    "lsq": {"activation_bits": 3}, "ewgs": {"activation_bits": 3},
    "lotion": {"model": "mlp4", "width": 0.02}, "noise-tempering": {"activation_bits": 4},
    "saq": {}, "lsq-dampened": {"model": "mlp4", "width": 0.02}, "lsq-frozen": {"bits": 2},
    "qil-2": {"bits": 2}, "lotion-sample": {"options": "sample=yes"}, "paretoq-1": {"bits": 1},
    "lq-net-1": {"bits": 1}, "paretoq-3": {"bits": 3}, "lr-net-1": {"bits": 1}}
PACKED = {"qil-2", "dsq", "trq", "paretoq", "paretoq-ternary", "paretoq-1", "lq-net-1", "lr-net",
          "lotion", "lotion-sample", "lr-net-1"}


@pytest.fixture(scope="module")
def data():
    """400 and 100 of the digits."""
    def head(split, count):
        return datasets.Split(split.images[:count], split.labels[:count], 10, split.mean, split.std)

    digits = datasets.load("digits")
    return datasets.Data(head(digits.train, 400), head(digits.test, 100))


class Kill(BaseException):
    """Ends a run where Ctrl-C or a kill would."""


@pytest.mark.parametrize("name", RUNS)
def test_two_epochs(tmp_path, data, name):
    """The loss falls; a killed run ends in the same bits; weights lie on the grid, and pack."""
    method = name if name in METHODS else name.rpartition("-")[0]
    run = config(method, **{"width": 0.2, "epochs": 2, "batch_size": 20, "threads": 1, "lr": 5e-3,
                            **RUNS[name]})
    model, _, history = train(run, tmp_path / "whole", data=data)
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert history[1]["test_accuracy"] > 0.2
    assert evaluate(model, data.test)[1] == history[1]["test_accuracy"]

    def on_batch(*at):
        if at[:2] == (2, 3):
            raise Kill

    with pytest.raises(Kill):
        train(run, tmp_path / "parts", data=data, on_batch=on_batch)
    resumed = train(run, tmp_path / "parts", data=data).model
    states = model.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            rows = layer.weight.detach().flatten(1)
            if method not in ("lq-net", "paretoq", "paretoq-ternary"):
                rows = rows.reshape(1, -1)
            assert max(len(row.unique()) for row in rows) <= 2**run.bits
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    packs = any(blaq.quantization_of(p) is not None for p in model.parameters())
    assert packs == (name in PACKED)
    if packs:
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        unpacked = blaq.unpack(blaq.pack(model)).state_dict()
        assert all(torch.equal(unpacked[key], weights[key]) for key in weights)

"""The second evaluation of a step: what it sees, and that it leaves no trace."""

import pytest
import torch
from small_network import (
    assert_param_is_quantized_latent,
    assert_same,
    make_batch,
    make_closure,
    make_model,
    make_optimizer,
    snapshot,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import blaq


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_buffers_and_random_state_are_those_of_one_evaluation(compiled):
    once, model = make_model(dropout=0.5), make_model(dropout=0.5)
    make_optimizer(once)  # quantizes, so that both models evaluate the same weights
    opt = make_optimizer(torch.compile(model, backend="aot_eager") if compiled else model)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    x, y = make_batch()
    torch.manual_seed(5)
    cross_entropy((torch.compile(once, backend="aot_eager") if compiled else once)(x), y).backward()
    random_after = torch.get_rng_state()
    torch.manual_seed(5)
    opt.step(make_closure(run, opt))
    assert torch.equal(torch.get_rng_state(), random_after)
    assert_same(buffers(model), buffers(once))
    assert model[1].num_batches_tracked.item() == 1


def test_both_evaluations_draw_the_same_dropout_masks():
    model, masks = make_model(dropout=0.5), []
    ones = torch.ones(64)
    model[4].register_forward_hook(lambda *_: masks.append(nn.functional.dropout(ones)))
    opt = make_optimizer(model)
    for _ in range(2):
        opt.step(make_closure(model, opt))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


def test_trial_pass_restores_after_an_exception_and_replaced_buffers():
    model = make_model()
    before, norm = buffers(model), model[1]
    kept = norm.running_mean
    with pytest.raises(ZeroDivisionError), blaq.trial_pass(model):
        norm.running_mean = norm.running_mean + 1.0
        norm.running_var.add_(1.0)
        torch.rand(3)
        _ = 1 / 0
    assert norm.running_mean is kept
    assert_same(buffers(model), before)


def test_random_state_is_replayed_inside_and_put_back_outside():
    random_state = blaq.RandomState()
    first, entered = torch.rand(4), torch.get_rng_state()
    with blaq.trial_pass([], random_state):
        assert torch.equal(torch.rand(4), first)
        torch.rand(9)  # more than was drawn before
    assert torch.equal(torch.get_rng_state(), entered)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_second_evaluation_that_raises_puts_everything_back(error):
    model = make_model(dropout=0.5)
    opt = make_optimizer(model)
    closure = make_closure(model, opt)
    opt.step(closure)
    before, calls = snapshot(model, opt), []
    trial_weights = []

    def failing():
        calls.append(0)
        loss = closure()
        if len(calls) == 1:
            failing.after_first = (buffers(model), torch.get_rng_state(),
                                   [p.grad.clone() for p in model.parameters()])
        else:
            trial_weights.append(model[5].weight.detach().clone())
            raise error
        return loss

    weight = model[5].weight.detach().clone()
    with pytest.raises(error):
        opt.step(failing)
    assert not torch.equal(trial_weights[0], weight)  # the trial was really under way
    assert_param_is_quantized_latent(opt)
    after = snapshot(model, opt)
    assert_same(after[1], before[1])
    assert_same([p.detach() for p in model.parameters()],
                [before[0][name] for name, _ in model.named_parameters()])
    assert_same([buffers(model), torch.get_rng_state(), [p.grad for p in model.parameters()]],
                list(failing.after_first))
    opt.step(closure)  # and it goes on
    assert_param_is_quantized_latent(opt)


@pytest.mark.parametrize("bad", [None, torch.ones(2), "loss"])
@pytest.mark.parametrize("at", [0, 1], ids=["first", "second"])
def test_a_closure_without_a_scalar_loss_changes_nothing(bad, at):
    model = make_model()
    opt = make_optimizer(model)
    closure, calls = make_closure(model, opt), []

    def wrong():
        loss = closure()
        calls.append(loss)
        return bad if len(calls) == at + 1 else loss

    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=r"closure must return the loss, a scalar, got"):
        opt.step(wrong)
    after = snapshot(model, opt)
    assert_same(after[1], before[1])
    assert_same([p.detach() for p in model.parameters()],
                [before[0][name] for name, _ in model.named_parameters()])


def test_a_closure_need_not_clear_gradients_between_its_runs():
    model, other = make_model(), make_model()
    opt, lazy = make_optimizer(model), make_optimizer(other)
    x, y = make_batch()

    def accumulating():
        loss = cross_entropy(other(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(make_closure(model, opt))
        lazy.zero_grad()
        lazy.step(accumulating)
    assert_same(snapshot(model, opt), snapshot(other, lazy))


def test_data_parallel_gradients_that_view_a_bucket_are_kept():
    """The second backward overwrites the bucket that the first gradients live in."""
    model, other = make_model(), make_model()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(other, gradient_as_bucket_view=True)
        opt, twin = make_optimizer(model), make_optimizer(parallel)
        for _ in range(3):
            opt.step(make_closure(model, opt))
            twin.step(make_closure(parallel, twin))
        assert any(p.grad._is_view() for p in other.parameters())  # or this tests nothing
    finally:
        torch.distributed.destroy_process_group()
    assert_same(snapshot(model, opt), snapshot(other, twin))


def test_misplaced_calls_are_errors():
    model = make_model()
    opt = make_optimizer(model)
    closure = make_closure(model, opt)
    closure()
    opt.trial_step()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"trial_step: step\(\) must end the trial first"):
        opt.trial_step()
    with pytest.raises(RuntimeError, match="closure must not be given after trial_step"):
        opt.step(closure)
    with pytest.raises(RuntimeError, match="add_param_group"):
        opt.add_param_group({"params": [("new", torch.ones(2))]})
    opt.cancel_trial()
    assert_param_is_quantized_latent(opt)
    opt.cancel_trial()  # without a trial: nothing
    laq = make_optimizer(make_model(), backtrack=1.0)
    with pytest.raises(RuntimeError, match=r"trial_step: .*backtrack < 1"):
        laq.trial_step()


def test_the_trial_moves_only_weights_of_1_to_4_bits():
    model = make_model()
    opt = make_optimizer(model)
    make_closure(model, opt)()
    before = snapshot(model, opt)
    opt.trial_step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[0][name])}
    assert moved == {"0.weight", "5.weight"}
    assert_same(snapshot(model, opt)[1], before[1])


@pytest.mark.parametrize("first,second", [(True, False), (False, True), (False, False)])
def test_a_parameter_takes_part_if_the_first_evaluation_reaches_it(first, second):
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([a, b])
    opt = blaq.BLAQ(blaq.param_groups(model, bits=2), lr=0.1)
    x, reach = torch.randn(5, 4), iter([first, second, True, True])

    def closure():
        opt.zero_grad()
        out = a(x)
        if next(reach):
            out = out + b(x)
        loss = out.square().mean()
        loss.backward()
        return loss

    before = b.weight.detach().clone()
    opt.step(closure)
    assert torch.equal(b.weight, before) is (not first)
    assert opt.state[a.weight]["step"].item() == 1
    assert opt.state[b.weight]["step"].item() == float(first)
    opt.step(closure)  # steps of unlike age go on side by side
    assert opt.state[a.weight]["step"].item() == 2
    assert opt.state[b.weight]["step"].item() == 1 + float(first)
    assert_param_is_quantized_latent(opt)
    assert blaq.quantization_of(b.weight).scale is opt.state[b.weight]["scale"]

"""Packed models through torch.compile and torch.export: one graph, any batch, the same numbers."""

import pytest
import torch
from quantized import small_net

import blaq


def packed_net():
    return blaq.pack(small_net())


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(n, 2, 5, 5) for n in (4, 7, 3)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile_with_any_batch(backend, batches):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = packed_net()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        model(batches[0])  # the graph has the repacked weights that are there
        for x in batches:
            torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_packs_saves_and_loads_under_its_own_names(batches, tmp_path):
    torch._dynamo.reset()
    net = small_net()
    model = torch.compile(net, backend="eager")
    x = batches[0]
    expected = model(x)
    assert blaq.pack(model, skip="6") is model and type(net[8]) is blaq.PackedLinear
    torch.testing.assert_close(model(x), expected)
    blaq.save(model, tmp_path / "f")
    assert sorted(blaq.inspect(tmp_path / "f").layers) == ["3", "8"]
    other = torch.compile(small_net(known=False, seed=1), backend="eager")
    assert blaq.load(tmp_path / "f", other) is other
    torch.testing.assert_close(other(x), expected)


def test_compiled_gradients_are_the_eager_ones(batches):
    torch._dynamo.reset()
    model = packed_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, other = (batches[0].clone().requires_grad_() for _ in range(2))
    model(eager).square().sum().backward()
    compiled(other).square().sum().backward()
    torch.testing.assert_close(other.grad, eager.grad)


def test_compile_under_autocast(batches):
    torch._dynamo.reset()
    model = packed_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(batches[0]), model(batches[0]))


def test_export_with_a_dynamic_batch_saves_and_loads(batches, tmp_path):
    model = packed_net()
    program = torch.export.export(model, (batches[0],),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    ops = {node.target for node in program.graph.nodes}
    assert {torch.ops.blaq.packed_linear.default, torch.ops.blaq.packed_conv2d.default} <= ops
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for x in batches:
        torch.testing.assert_close(loaded(x), model(x))

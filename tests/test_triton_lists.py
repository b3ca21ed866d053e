"""How Triton's training kernels take a list: offsets, tables, rules, and what is kept between calls."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from step_cases import (  # noqa: F401 (fixtures)
    DEVICE,
    STATE,
    make_state,
    scalar,
    tail,
)

from blaq_kernels import device as devices
from blaq_kernels import flat, tables
from blaq_kernels.triton import launch, plan, settle, workspace
from blaq_kernels.triton.blend import blend
from blaq_kernels.triton.fused_step import fused_step
from blaq_kernels.triton.scaled_update import scaled_update
from blaq_kernels.triton.solve import solve


def test_offsets_are_64_bits_wide():
    """On numbers alone: where a group begins in a weight of 5e9 elements."""
    import triton
    import triton.language as tl

    @triton.jit
    def begin(groups, out, length, per_row, row, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, plan.first_element(tl.load(groups + at), length, per_row, row, False))

    groups = torch.tensor([0, 69_999, 70_000 * 9 - 1, 12_345], dtype=torch.int32, device=DEVICE)
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    begin[(1,)](groups, out, 8000, 9, 70_000, 4)
    numbers = groups.tolist()
    assert out.tolist() == [g // 9 * 70_000 + g % 9 * 8000 for g in numbers] and max(out) > 2**32


def test_the_table_counts_more_elements_than_32_bits_hold():
    sizes = ((50_000, 50_000), torch.float32, True)
    part, = plan.parts((sizes, sizes), 0)
    assert part.elements == 5 * 10**9 and part.table[1, plan.SCRATCH.value] == 25 * 10**8
    assert len(part.programs) == 2 * -(-25 * 10**8 // plan.CHUNK)


def test_more_groups_than_32_bits_count_are_an_error():
    with pytest.raises(ValueError, match="group_size must leave less than 2.31 groups in a list, got"):
        plan.parts((((70_000, 70_000), torch.float32, True),), 2)


def test_bad_arguments_have_the_words_of_the_other_kernels():
    levels = [0.5, 1.0]
    state = make_state(levels, -1, torch.float32, [(3, 10), (4,)])
    step = tail(levels, -1) | {"backtrack": scalar(0.6)}
    before = [x.clone() for key in STATE for x in state[key]]
    cases = [({"lr": scalar([0.1])}, "lr must be a 0-dim tensor, got [1]"),
             ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
             ({"grads": [state["grads"][0]]}, "grads must have as many tensors as params (2), got 1"),
             ({"latents": [state["latents"][0].t().contiguous().t(), state["latents"][1]]},
              "latents[0] must be contiguous, got strides [1, 3]"),
             ({"scales": state["latents"]}, "scales[0] must have shape [3, 1], got [3, 10]"),
             ({"exp_avgs": state["latents"]}, "must not overlap another tensor of the call")]
    for change, message in cases:
        with pytest.raises(ValueError) as error:
            fused_step(**(state | step | change))
        assert str(error.value).startswith("blaq.fused_step: ") and message in str(error.value)
    after = [x for key in STATE for x in state[key]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for op, arguments in ((scaled_update, (state["latents"][0].t(),) * 3),
                          (blend, (state["latents"][0], state["latents"][0], 0.0)),
                          (solve, (state["latents"][0] * float("nan"),) * 2
                           + (None, levels, -1, 5, "exact"))):
        with pytest.raises(ValueError, match=f"blaq.{op.__name__}: .* must .*, got "):
            op(*arguments)


def test_tensors_on_different_devices_are_an_error():
    meta = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match="grad must be on latent's device .*, got meta"):
        scaled_update(torch.rand(4, device=DEVICE), meta, torch.rand(4, device=DEVICE))
    levels = [1.0]
    state = make_state(levels, 0, torch.float32, [(4,), (4,)])
    arguments = state | tail(levels, 0) | {"backtrack": scalar(1.0)}
    with pytest.raises(ValueError, match=r"found_inf must be on params\[0\]'s device .*, got meta"):
        fused_step(**arguments, found_inf=torch.empty((), device="meta"))
    for key in ("params", "grads", "trial_grads", "latents", "exp_avgs", "exp_avg_sqs", "scales"):
        state[key][1] = state[key][1].to("meta")
    with pytest.raises(ValueError, match=r"params\[1\] must be on params\[0\]'s device .*, got meta"):
        fused_step(**(arguments | state))


def test_tables_are_kept_by_their_addresses():
    levels = [0.5, 1.0]
    state = make_state(levels, -1, torch.float32)
    arguments = tail(levels, -1) | {"backtrack": scalar(0.6)}
    tables.tables._kept.clear()
    for _ in range(3):
        fused_step(**state, **arguments)
    kept = len(tables.tables._kept)
    state["grads"] = [g.clone() for g in state["grads"]]
    fused_step(**state, **arguments)
    assert kept < len(tables.tables._kept) <= 2 * kept <= tables.KEPT


def test_flat_states_are_those_of_their_weights():
    levels = [0.5, 1.0]
    lists, flats = (make_state(levels, -1, torch.float32) for _ in range(2))
    views = {name: flat.join(flats[name]) for name in flat.STATES}
    joined = {name: [flat.joined(views[name])] for name in flat.STATES}
    arguments = tail(levels, -1) | {"backtrack": scalar(0.6)}
    for clip in (0.5, 0.3):  # the second call's setting is new to a known list
        fused_step(**(lists | arguments | {"clip": clip}))
        fused_step(**(flats | joined | arguments | {"clip": clip}))
    for name in STATE:
        for a, b in zip(lists[name], (flats | views)[name], strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"scales\[0\] must have shape .* for all params"):
        fused_step(**(flats | joined | arguments | {"scales": [torch.ones(1, device=DEVICE)]}))


def test_a_table_that_a_graph_reads_stays(monkeypatch):
    """Also where an eager call made it; one that a graph uploads is not there before a replay."""
    own, captures = tables.Tables(), False
    monkeypatch.setattr(tables.devices, "capturing", lambda device: captures)
    part, = plan.parts((((4, 8), torch.float32, True),), -1)
    device = torch.device("cpu")

    def get(start):
        return own.get(part, device, [(start + i,) for i in range(7)])[0]

    eager = get(0)
    captures = True
    assert get(0) is eager and get(16) is not get(16)
    captures = False
    for start in range(32, 32 + tables.KEPT + 1):
        get(start)
    assert get(0) is not eager and any(kept.there is eager for kept in own._captured.values())
    assert not any(kept.there is get(16) for kept in own._captured.values())


def test_another_stream_does_not_read_a_table_that_may_not_be_there(monkeypatch):
    own, stream = tables.Tables(), 1
    monkeypatch.setattr(tables.devices, "stream_of", lambda device: stream)
    part, = plan.parts((((4, 8), torch.float32, True),), -1)
    first = own.get(part, torch.device("cpu"), [(0,)] * 7)[0]
    assert own.get(part, torch.device("cpu"), [(0,)] * 7)[0] is first
    stream = 2
    assert own.get(part, torch.device("cpu"), [(0,)] * 7)[0] is not first


def test_a_known_list_is_still_checked_for_what_may_have_changed():
    levels = [0.5, 1.0]
    state = make_state(levels, -1, torch.float32, [(3, 10), (4,)])
    arguments = state | tail(levels, -1) | {"backtrack": torch.tensor(0.6)}
    flips = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        fused_step(**arguments, flips=flips)
    short = {"grads": [state["grads"][0], state["grads"][1][:3]]}
    cases = [({"backtrack": torch.tensor(1.5)}, {}), ({"lr": scalar([1.0])}, {}),
             ({"levels": [1.0, 0.5]}, {}), ({"group_size": 0}, {}), ({}, short),
             ({}, {"exp_avgs": state["latents"]}), ({}, {"flips": flips[:1]})]
    for change, lists in cases:
        with pytest.raises(ValueError, match=r"blaq\.fused_step: .* must"):
            fused_step(**({"flips": flips} | arguments | change | lists))
    trial_free = arguments | {"trial_grads": [], "backtrack": torch.tensor(1.0)}
    for _ in range(2):
        fused_step(**trial_free)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="trial_grads must be given where backtrack < 1"):
            fused_step(**(trial_free | {"backtrack": torch.tensor(0.5)}))


def test_copies_of_a_histogram_stay_within_their_memory():
    one = settle.UNITS.value * settle.BINS.value
    assert one * settle.copies_of(1) <= settle.MOST_BINS
    assert settle.copies_of(10**6) == 1 and settle.copies_of(1) == 8


def test_zeros_are_those_of_a_stream_and_a_graph_has_its_own(monkeypatch):
    device, own = torch.device("cpu"), (16, torch.int32)
    monkeypatch.setattr(workspace, "_zeros", {})
    stream, captures = 1, False
    monkeypatch.setattr(workspace.devices, "stream_of", lambda device: stream)
    monkeypatch.setattr(workspace.devices, "capturing", lambda device: captures)
    first = workspace.zeros(device, *own)
    assert workspace.zeros(device, 8, torch.int32) is first and workspace.zeros(device, *own) is first
    assert workspace.zeros(device, 16, torch.int64) is not first
    stream = 2
    other = workspace.zeros(device, *own)
    captures = True
    captured = workspace.zeros(device, *own)
    assert len({x.data_ptr() for x in (first, other, captured)}) == 3
    assert workspace.zeros(device, *own) is not captured


def test_parts_of_a_sum_are_those_of_a_stream_and_a_graph_has_its_own(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(workspace, "_zeros", {})
    monkeypatch.setattr(workspace, "_splits", {})
    stream, captures = 1, False
    monkeypatch.setattr(workspace.devices, "stream_of", lambda device: stream)
    monkeypatch.setattr(workspace.devices, "capturing", lambda device: captures)
    first = workspace.splits_of(device, 100, 4)
    assert workspace.splits_of(device, 60, 4) is first and not first.tickets.any()
    more_tickets = workspace.splits_of(device, 10, 8)
    assert more_tickets.parts is first.parts and more_tickets.tickets.numel() == 8
    more_parts = workspace.splits_of(device, 200, 2)
    assert more_parts.parts.numel() == 200 and more_parts.tickets is more_tickets.tickets
    assert workspace.splits_of(device, 200, 8) is more_parts  # neither grows in turn
    stream = 2
    other = workspace.splits_of(device, 10, 4)
    captures = True
    captured = [workspace.splits_of(device, 10, 4) for _ in range(2)]
    assert len({x.data_ptr() for pair in (more_parts, other, *captured) for x in pair}) == 8


def test_what_is_kept_comes_from_no_pool_of_the_thread(monkeypatch):
    """A graph's pool takes what one thread allocates; what outlives the call must not be there."""
    seen, current = [], object()

    @contextlib.contextmanager
    def on(stream):
        seen.append(stream)
        yield

    def empty(count, dtype, device):
        seen.append((threading.get_ident() == here, count, device.type))
        return torch.zeros(count, dtype=dtype)

    here = threading.get_ident()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "empty", empty)
    kept = devices.kept_empty(3, torch.int32, torch.device("cuda", 0))
    assert kept.dtype == torch.int32 and seen == [current, (False, 3, "cuda")]


def test_compiled_code_is_launched_where_addresses_allow(monkeypatch):
    """What was compiled for addresses that are multiples of 16 meets no others; a profiler that hooks
    launches has its say."""
    import triton

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(("Triton", grid, options)) or Compiled()

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __getitem__(self, grid):
            return lambda *args: seen.append((grid, *args))

        def run(self, *args):
            seen.append(args)

    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 10 + device)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    run = launch.Launch(Kernel(), (2, 1, 1), 7, num_warps=4)
    aligned = torch.empty(64, device=DEVICE)
    for x in (aligned[1:], aligned, aligned, aligned[1:]):
        run(x, None)
    compiled = ("Triton", (2, 1, 1), {"num_warps": 4})
    args = aligned.data_ptr(), None, 7
    if triton.__version__.startswith("3.6."):
        at_once = (2, 1, 1, 13, "function", "metadata", None, None, None, *args)
    else:
        at_once = ((2, 1, 1), *args)
    assert seen == [compiled, compiled, at_once, compiled]
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    run(aligned, None)
    assert seen[-1] == ((2, 1, 1), *args)


def test_an_address_that_another_tensor_took_is_looked_at_again():
    """Lists are known by addresses: the same may come back in another shape, dtype or layout."""
    levels = [0.5, 1.0]
    state = make_state(levels, 0, torch.float32, [(4, 6), (8,)])
    arguments = tail(levels, 0) | {"backtrack": scalar(0.6)}
    fused_step(**state, **arguments)
    grad = state["grads"][0]
    for other, message in ((grad.view(6, 4), "have the shape of"),
                           (grad.view(torch.int32), "be float32"),
                           (grad.as_strided((4, 6), (1, 4)), "be contiguous")):
        assert other.data_ptr() == grad.data_ptr()
        with pytest.raises(ValueError, match=rf"blaq\.fused_step: grads\[0\] must {message}"):
            fused_step(**(state | arguments | {"grads": [other, state["grads"][1]]}))
    whole = {name: [x.view(2, 12) if x.dim() == 2 else x for x in state[name]] for name in state}
    copies = {name: [x.clone() for x in tensors] for name, tensors in whole.items()}
    for views in (whole, copies):  # the same addresses in another shape, and nothing known
        fused_step(**(views | arguments | {"group_size": -1, "scales": [
            torch.ones(len(x) if x.dim() == 2 else 1, 1, device=DEVICE) for x in views["params"]]}))
    for name in STATE[:4]:
        for a, b in zip(whole[name], copies[name], strict=True):
            assert torch.equal(a, b)
    state["grads"][0].resize_(4, 5)  # in place
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape of params\[0\] \[4, 6\]"):
        fused_step(**state, **arguments)

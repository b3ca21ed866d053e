"""The benchmark tool: its clock, tables and files. Nothing here asserts how long a kernel takes."""

import argparse
import csv
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from blaq.bench import command, timing
from blaq.bench.case import BLAQ, FLOOR, Case, Result, Row, run_case
from blaq.bench.machine import describe
from blaq.bench.output import format_result, format_verdicts
from blaq.bench.packed import LINEAR_BFLOAT16, LINEAR_FLOAT32
from blaq.bench.suites import SWEEP, worst
from blaq.bench.targets import TARGETS, Verdict
from blaq.bench.timing import Timing, measure, quantile
from blaq.bench.training import ADAMW, COMPILED
from blaq_kernels.schemas import SCHEMAS

SMALL = {"fused_trial": (2, 33), "fused_step": (2, 33), "trial_and_step": (2, 33),
         "scaled_update": (77,), "blend": (77,), "solve": (5, 13), "fake_quantize": (5, 13),
         "pack": (5, 13), "unpack": (5, 13), "repack": (5, 13), "unrepack": (5, 13), "packed_linear": (3, 16, 40),
         "packed_conv2d": (2, 4, 6, 8), "conv_repack": (4, 6), "binary_repack": (5, 13), "binary_linear": (3, 16, 40),
         "binary_conv2d": (2, 4, 6, 8), "resnet18": (1, 32, 8)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads wait for each other on a busy machine
    yield
    torch.set_num_threads(before)


class Clock:
    """Time that passes only in ``spend``."""

    def __init__(self):
        self.now = 0

    def perf_counter_ns(self):
        return self.now

    def perf_counter(self):
        return self.now * 1e-9

    def spend(self, seconds):
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def small_cases(**chosen):
    cases = [case for op, table in command.TABLES.items()
             for case in table.cases([SMALL[op]], **chosen)]
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_quantile_is_numpys(count, share):
    values = torch.rand(count).tolist()
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))


def test_timing_compares_round_by_round():
    ours, other = Timing((1.0, 2.0, 30.0), 1), Timing((2.0, 4.0, 60.0), 1)
    assert ours.over(other) == 0.5
    assert (ours.median, ours.p20, ours.p80) == (2.0, pytest.approx(1.4), pytest.approx(18.8))


def test_measure_interleaves_and_fills_samples(clock):
    calls = []

    def variant(name, seconds):
        def call():
            calls.append(name)
            clock.spend(seconds)

        return call

    timings = measure({"quick": variant("quick", 1e-4), "slow": variant("slow", 5e-3)}, rounds=7)
    assert {name: t.repeats for name, t in timings.items()} == {"quick": 10, "slow": 1}
    assert timings["quick"].seconds == pytest.approx([1e-4] * 7)
    assert timings["slow"].seconds == pytest.approx([5e-3] * 7)
    assert timings["slow"].over(timings["quick"]) == pytest.approx(50)
    one_round = ["quick"] * 11 + ["slow"]  # the first of several is not timed
    assert calls[-7 * 12:] == one_round * 7


def test_measure_sees_noise_of_one_round_in_that_round_only(clock):
    pace = iter([1.0] * 100)

    def variant(seconds):
        return lambda: clock.spend(seconds * next(pace))

    rounds = {"a": variant(0.02), "b": variant(0.04)}
    pace = iter([1.0] * 4 + [3.0, 3.0] + [1.0] * 100)
    timings = measure(rounds, rounds=5)
    assert timings["b"].over(timings["a"]) == pytest.approx(2)
    assert timings["a"].median == pytest.approx(0.02) and max(timings["a"].seconds) > 0.05


def test_measure_calls_before_every_sample_and_times_none_of_it(clock):
    calls = []

    def quick():
        calls.append("quick")
        clock.spend(1e-5)

    def before():
        calls.append("before")
        clock.spend(1)

    timing = measure({"quick": quick}, 5, before=before)["quick"]
    assert timing.repeats == 1 and timing.seconds == pytest.approx([1e-5] * 5)
    assert calls[-10:] == ["before", "quick"] * 5


def test_measure_stops_after_most_seconds_but_not_before_five_rounds(clock):
    variants = {"slow": lambda: clock.spend(10)}
    assert len(measure(variants, 20, most_seconds=1)["slow"].seconds) == 5
    assert len(measure(variants, 20, most_seconds=75)["slow"].seconds) == 8
    assert len(measure(variants, 3, most_seconds=1)["slow"].seconds) == 3


def test_measure_wants_a_round():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure({"a": lambda: None}, 0)


def test_every_op_has_a_table():
    timed = {op for name, table in command.TABLES.items() for op in table.ops or (name,)}
    assert timed == set(SCHEMAS)
    assert SMALL.keys() == command.TABLES.keys()


@pytest.mark.parametrize("case", small_cases(bits=(1, 2)))
def test_case_runs_and_its_rows_are_whole(case):
    result = run_case(case, command.TABLES[case.op], rounds=1)
    names = [row.variant for row in result.rows]
    assert names[0] == BLAQ and names[-1] == FLOOR and len(names) >= 3
    assert len(set(names)) == len(names)
    own = result.rows[0]
    assert own.ratio == 1.0 and own.bytes > 0 and own.of_floor > 0 and own.backend
    for row in result.rows:
        assert 0 < row.min_us <= row.p20_us <= row.median_us <= row.p80_us
        assert math.isfinite(row.ratio) and row.rounds == 1 and row.repeats >= 1
        if row.bytes:
            assert row.gb_per_s == pytest.approx(row.bytes / row.median_us * 1e-3)
        if row.variant != FLOOR and case.op in ("packed_linear", "packed_conv2d"):
            assert row.error < 0.05 and row.gop_per_s > 0


@pytest.mark.parametrize("case", small_cases(bits=(3,), group_size=(-1, 4), dtype=("bfloat16",)))
def test_case_runs_with_other_arguments(case):
    rows = run_case(case, command.TABLES[case.op], rounds=1).rows
    assert rows[0].dtype == case.dtype and (rows[0].group_size or 0) == case.group_size


@pytest.mark.parametrize("op", ["scaled_update", "blend", "pack", "unpack"])
@pytest.mark.parametrize("bits", [1, 3])
def test_alternatives_do_the_same_work(op, bits):
    table = command.TABLES[op]
    own, *others = table.build(table.cases([SMALL[op]], bits=(bits,))[0], False)
    assert others
    for other in others:
        result = torch.as_tensor(other.call())
        torch.testing.assert_close(result, own.call(), rtol=1e-6, atol=1e-6, check_stride=False)


def test_least_traffic_of_a_training_step_is_twice_adamws():
    variants = command.TABLES["trial_and_step"].build(
        Case("trial_and_step", (2, 50), bits=1, group_size=0, method="alternating"), False)
    traffic = {variant.name: variant.bytes for variant in variants}
    assert traffic[ADAMW] == 28 * 100 and traffic[BLAQ] == 56 * 100


def test_packed_linear_counts_bits_and_operations():
    result = run_case(Case("packed_linear", (3, 16, 40), bits=2, group_size=0),
                      command.TABLES["packed_linear"], rounds=1)
    assert result.rows[0].bytes == 2 * 16 * 5 + 4 + 3 * (40 + 16) * 4
    assert result.rows[0].operations == 2 * 3 * 16 * 40


def test_cases_are_all_combinations_without_the_method_that_one_bit_lacks():
    cases = command.TABLES["solve"].cases([(2, 3)], bits=(1, 2), group_size=(0, 4))
    assert len({case.name for case in cases}) == len(cases) == 2 + 4
    assert not [case for case in cases if case.bits == 1 and case.method == "exact"]
    only = command.TABLES["solve"].cases(bits=(1,), method=("exact",))
    assert {case.method for case in only} == {"exact"}


def fake_result(case, seconds, errors=None):
    timings = {name: Timing((value,) * 3, 1) for name, value in seconds.items()}
    blank = {name: None for name in Row.__dataclass_fields__}
    errors = errors or {}
    rows = [Row(**{**blank, "variant": name, "error": errors.get(name)}) for name in seconds]
    return Result(case, timings, tuple(rows))


def test_step_target_divides_the_right_way():
    asked = []

    def run(case, full):
        asked.append((case.op, case.size, case.bits, case.method, full))
        slow = {COMPILED: 9.0} if full else {}
        return fake_result(case, {BLAQ: 3.0, ADAMW: 1.2, **slow})

    one, compiled, two, four = TARGETS["step-10m"](run)
    assert (one.measured, one.bound, one.met) == (2.5, 2.3, False)
    assert (compiled.measured, compiled.bound, compiled.met) == (3.0, 2, True)
    assert (two.bound, two.met) == (None, None)
    assert (four.measured, four.bound, four.met) == (2.5, 3, True)
    size = (16, 625_000)
    assert asked == [("trial_and_step", size, 1, "alternating", True),
                     ("trial_and_step", size, 2, "alternating", False),
                     ("trial_and_step", size, 4, "exact", False)]


def test_small_step_target_is_in_microseconds():
    verdicts = list(TARGETS["step-small"](lambda case, full: fake_result(case, {BLAQ: 149e-6})))
    assert [v.met for v in verdicts] == [True, True] and verdicts[0].measured == pytest.approx(149)


def test_linear_target_bounds_speed_at_batch_one_and_error_at_all():
    verdicts = list(TARGETS["linear-4096"](lambda case, full: fake_result(
        case, {BLAQ: 1.0, LINEAR_FLOAT32: 7.0, LINEAR_BFLOAT16: 2.0},
        {BLAQ: 1e-6, LINEAR_BFLOAT16: 2e-6})))
    assert [v.met for v in verdicts] == [False, True] + [None, True] * 4
    assert verdicts[1].measured == pytest.approx(0.5)


def test_solve_target_is_met():
    verdicts = list(TARGETS["solve-exact"](None))
    assert len(verdicts) == 16 and all(v.met for v in verdicts)
    assert min(v.measured for v in verdicts) >= 0


def test_command_writes_what_it_measured(tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "png")}
    status = command.run(parse(
        "pack", "blend", "--sizes", "5x13", "77", "--bits", "1", "2", "--rounds", "2", "--threads",
        "1", "--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["png"])))
    assert status == 0
    report = json.loads(files["json"].read_text())
    with files["csv"].open(newline="") as file:
        records = list(csv.DictReader(file))
    assert {r["case"] for r in records} == {"pack 5x13 float32 1-bit", "pack 5x13 float32 2-bit",
                                            "blend 77 float32"}
    assert list(records[0]) == list(dict.fromkeys([*describe(), *Row.__dataclass_fields__]))
    assert len(records) == len(report["rows"]) == 2 * 3 + 4 and report["targets"] == []
    for record, row in zip(records, report["rows"], strict=True):
        assert record["threads"] == "1" and record["torch"] == torch.__version__
        assert float(record["median_us"]) == pytest.approx(row["median_us"], rel=1e-5)
        assert record["error"] == ""
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "numpy.packbits" in capsys.readouterr().out


def test_command_streams_weights_where_asked(tmp_path):
    path = tmp_path / "out.csv"
    command.run(parse("binary_repack", "--sizes", "5x13", "--rounds", "1", "--stream", "--csv", str(path)))
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    assert {r["variant"] for r in records} >= {"blaq", "read", "qweight.clone()"}
    assert {(r["cache"], r["repeats"]) for r in records} == {("stream", "1")}


def test_command_writes_targets_beside_the_rows(tmp_path, capsys, monkeypatch):
    def target(run):
        run(Case("pack", (5, 13), bits=1), False)
        yield Verdict("tiny", "gap, %", 0.25, "at most", 0.1, False)

    monkeypatch.setitem(command.TARGETS, "tiny", target)
    path = tmp_path / "out.csv"
    assert command.run(parse("--targets", "tiny", "--rounds", "1", "--csv", str(path))) == 0
    with (tmp_path / "out-targets.csv").open(newline="") as file:
        [record] = csv.DictReader(file)
    expected = {"target": "tiny", "quantity": "gap, %", "measured": "0.25", "rule": "at most",
                "bound": "0.1", "met": "False"}
    assert {key: record[key] for key in expected} == expected
    assert len(path.read_text().splitlines()) == 4
    assert "NOT MET" in capsys.readouterr().out


@pytest.mark.parametrize("load,warned", [(0.0, False), (3.0, True), (None, False)])
def test_command_warns_of_a_busy_machine(load, warned, monkeypatch, capsys):
    monkeypatch.setattr(command, "describe", lambda: {**describe(), "load": load})
    command.run(parse("blend", "--sizes", "9", "--rounds", "1"))
    assert ("load average 3.0" in capsys.readouterr().err) == warned


def test_command_restores_threads(tmp_path):
    before = torch.get_num_threads()
    command.run(parse("blend", "--sizes", "9", "--rounds", "1", "--threads", str(before + 1)))
    assert torch.get_num_threads() == before


def test_packed_suite_draws_time_over_the_batch(tmp_path, capsys):
    files = [tmp_path / name for name in ("rows.csv", "rows.json", "plot.svg")]
    args = parse("packed", "--bits", "1", "--sizes", "1x16x40", "4x16x40", "--rounds", "1",
                 "--csv", str(files[0]), "--json", str(files[1]), "--plot", str(files[2]))
    assert command.run(args) == 0
    rows = list(csv.DictReader(files[0].open()))
    assert {(row["threads"], row["cache"], row["size"]) for row in rows} == {
        (threads, cache, size) for threads in ("1", "2") for cache in ("resident", "stream")
        for size in ("1x16x40", "4x16x40")}
    assert len(json.loads(files[1].read_text())["rows"]) == len(rows)
    assert "2 threads, stream" in files[2].read_text()


def test_sweep_names_the_shapes_where_torch_is_faster(capsys):
    assert len(set(SWEEP.sizes)) == 60
    args = parse("sweep", "--bits", "1", "--sizes", "3x16x40", "--rounds", "1")
    assert command.run(args) == 0
    assert "worst ratio" in capsys.readouterr().out
    case = Case("sweep", (3, 16, 40), bits=1)
    timings = {"blaq": 2.0, "blaq, fast": 4.0, "F.linear float32": 3.0, "mkldnn float32": 2.5,
               "F.linear bfloat16": 1.0, "int8, dynamic": 1.6}
    result = Result(case, {k: Timing((v,), 1) for k, v in timings.items()}, ())
    float32, bfloat16, int8 = (f"torch in {kind}" for kind in (
        "float32", "bfloat16 (rounds them)", "int8 (rounds them)"))

    def line(own, kind, ratio, faster):
        return (f"{own}, float32 inputs, {kind}: worst ratio {ratio}; torch is faster on {faster} "
                f"of 1, by more than 5% on {faster}")

    assert worst([result]) == [
        line("blaq", float32, "1.25", 0), line("blaq", bfloat16, "0.50", 1),
        line("blaq", int8, "0.80", 1),
        line("blaq, fast", float32, "0.62", 1),
        "  0.62  sweep 3x16x40 float32 1-bit: mkldnn float32",
        line("blaq, fast", bfloat16, "0.25", 1), line("blaq, fast", int8, "0.40", 1)]


def test_command_lists_every_op_and_target(capsys):
    assert command.run(parse("--list")) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*command.TABLES, *TARGETS])


@pytest.mark.parametrize("arguments,message", [
    (["nothing"], "op must be one of fused_trial, .*, got nothing"),
    (["--targets", "pack"], "target must be one of step-10m, .*, got pack"),
    (["pack", "--sizes", "1x2x3"], "a size must be NxK, got 1x2x3"),
    (["pack", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    (["pack", "--threads", "0"], "--threads must be at least 1, got 0"),
    (["packed", "--stream"], "--stream must be used with ops, got packed"),
    (["--targets", "--stream"], "--stream must be used with ops, got --targets"),
    (["pack", "--csv", "/no/such/folder/a.csv"], "folder of output must be there, got /no/such"),
])
def test_command_refuses_before_it_measures(arguments, message, capsys):
    with pytest.raises(ValueError, match=f"^blaq.bench: {message}"):
        command.run(parse(*arguments))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", ["", "0", "4x", "4x-1", "axb"])
def test_command_refuses_a_size_that_is_none(size, capsys):
    with pytest.raises(SystemExit):
        parse("pack", "--sizes", size)
    assert "a size must be positive numbers joined by x" in capsys.readouterr().err


def test_tables_line_up():
    result = run_case(Case("pack", (5, 13), bits=1), command.TABLES["pack"], rounds=1)
    title, heading, *lines = format_result(result).splitlines()
    assert title.startswith("pack 5x13 float32 1-bit   [") and heading.endswith("error")
    assert [line.split("  ")[0] for line in lines] == ["blaq", "numpy.packbits", "memory floor"]
    text = format_verdicts([Verdict("a", "time", 1.5),
                            Verdict("b", "gap, %", 2, "at most", 1, False)])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["a", "time", "1.5"], ["b", "gap,", "%", "2", "at", "most", "1", "NOT", "MET"]]


def test_environment_names_the_commit():
    environment = describe()
    assert environment["machine"] and environment["cores"] >= 1
    top = Path(__file__).parent.parent
    if not (top / ".git").exists():
        assert environment["commit"] is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=top, text=True, capture_output=True,
                          check=True).stdout.strip()
    assert environment["commit"] == head

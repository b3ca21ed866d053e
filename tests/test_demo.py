import csv
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import blaq
import blaq_kernels
from blaq.train import demo, report, verify
from blaq.train.checkpoint import CHECKPOINT

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "blaq.train.demo", "--quick", "--workers", "2", "--out"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick demo that Ctrl-C interrupted and that then went on: its folder and both outputs."""
    out = tmp_path_factory.mktemp("demo") / "out"
    first = subprocess.Popen([*COMMAND, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, start_new_session=True,
                             # A job in the background passes on that Ctrl-C is ignored.
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 120
    while not list(out.glob(f"*/{CHECKPOINT}")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the workers too
    said, _ = first.communicate(timeout=60)
    histories = {path.parent.name: len(torch.load(path)["history"])
                 for path in out.glob(f"*/{CHECKPOINT}")}
    second = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True, timeout=300)
    return out, (first.returncode, said), histories, second


def test_ctrl_c_leaves_what_the_same_command_goes_on_from(finished):
    out, (code, said), histories, second = finished
    assert code == 130
    assert f"Interrupted. {out} keeps every finished epoch: the same command goes on" in said
    assert "Traceback" not in said
    assert 0 < len(histories) < len(demo.SETTINGS)
    assert not list(out.glob("*/.*.tmp"))
    complete = sum(epochs == 2 for epochs in histories.values())
    assert second.returncode == 0, second.stderr
    assert f"Going on: {complete} of 7 runs are finished" in second.stdout
    for name in histories:
        assert len(torch.load(out / name / CHECKPOINT)["history"]) >= histories[name]


def test_writes_what_it_measured(finished):
    out, _, _, second = finished
    summary = json.loads((out / "summary.json").read_text())
    assert [run["setting"] for run in summary["runs"]] == [s.name for s in demo.SETTINGS]
    for run in summary["runs"]:
        lines = (out / run["folder"] / "metrics.jsonl").read_text().splitlines()
        assert run["history"] == [json.loads(line) for line in lines]
        assert run["config"]["model"] == "lenet5" and run["config"]["data"] == "digits"
    assert summary["table"] == report.aggregate(summary["runs"])
    assert summary["comparisons"] == report.compare(summary["table"])
    assert len(summary["checks"]) == 8 and all(check["passed"] for check in summary["checks"])
    assert [item["bits"] for item in summary["packed"]] == [1, 2]
    for item in summary["packed"]:
        file = blaq.inspect(out / item["file"])
        assert file.size == item["file_bytes"]
        assert all(layer.bits == item["bits"] for layer in file.layers.values())
        assert item["bytes_packed"] < item["bytes_float32"] / (8 if item["bits"] == 2 else 16)
        assert [entry["batch"] for entry in item["latency"]] == [1, 64]
        assert all(entry[key] > 0 for entry in item["latency"] for key in ("float32", "packed"))
    assert (out / "report.html").read_text() == report.render(summary)
    for row in summary["table"]:
        assert f"{row['label']}" in second.stdout
        assert f"{100 * row['test_accuracy']['mean']:.2f} %" in second.stdout


def test_a_finished_demo_trains_nothing_and_a_failed_check_is_exit_1(finished, monkeypatch, capsys):
    out = finished[0]
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"*/{CHECKPOINT}")}
    good = demo.deliver

    def broken(folder):
        done = good(folder)
        return done._replace(checks=[done.checks[0]._replace(passed=False)])

    monkeypatch.setattr(demo, "deliver", broken)
    monkeypatch.setattr(verify, "fresh_logits",
                        lambda *_: (torch.zeros(360, 10), blaq_kernels.serving()))
    assert demo.main(["--quick", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "Going on: 7 of 7 runs are finished" in said.out
    assert "FAILED  BLAQ, 1 bit: tensors decoded from the file" in said.out
    assert "blaq demo failed: BLAQ, 1 bit: tensors decoded from the file" in said.err
    assert "A check failed: do not use these files" in (out / "report.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_other_runs_is_exit_1(finished, capsys):
    assert demo.main(["--out", str(finished[0])]) == 1
    error = capsys.readouterr().err
    assert f"blaq demo failed: {finished[0] / 'fp-s0'} must hold a run with width = 1.0" in error
    assert "got 0.25; try another --out" in error


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--workers", "0"])
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err


def test_learning_rates_are_those_of_the_sweep():
    with open(ROOT / "bench" / "results" / "demo_lr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    folds = {row["fold"] for row in rows}
    assert len(rows) == len(demo.SETTINGS) * len(demo.RATES) * len(folds) and len(folds) == 5
    for setting in demo.SETTINGS:
        mine = [row for row in rows if row["setting"] == setting.name]
        means = [statistics.mean(float(row["accuracy"]) for row in mine if float(row["lr"]) == lr)
                 for lr in demo.RATES]
        assert setting.accuracies == tuple(round(mean, 4) for mean in means)
        assert setting.lr == demo.RATES[means.index(max(means))]
        assert {int(row["epochs"]) for row in mine} == {setting.config(0).epochs}


def test_folds_of_the_sweep_are_apart_and_leave_the_test_set_out():
    spec = importlib.util.spec_from_file_location("demo_lr", ROOT / "bench" / "demo_lr.py")
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    train = demo.datasets.load("digits").train
    held = [sweep.fold_of(train, fold) for fold in range(sweep.FOLDS)]
    assert sum(len(data.test) for data in held) == len(train)
    assert all(len(data.train) + len(data.test) == len(train) for data in held)
    assert torch.equal(held[1].test.images, train.images[1::5])



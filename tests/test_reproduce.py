"""``blaq reproduce``: theory to rounding, figures and tables on tiny data, resuming, mistakes."""

import json
import lzma
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from test_cli import call, fails
from test_data import idx
from torch import nn

from blaq.reproduce.charlm import TEXT, CharConfig, CharLSTM, read_text, train_charlm
from blaq.reproduce.results import VERSION, command_line, difference, spread, verdict
from blaq.reproduce.runs import RECORD
from blaq.reproduce.study import Resources, best_line, run_study
from blaq.reproduce.tables import STUDIES
from blaq.reproduce.theory import LIMITS, power_law, stability_limit
from blaq.reproduce.toy import best_quantized
from blaq.train import data as datasets, loop


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder of 200 training and 80 test images in MNIST's format: bars, one for each class."""
    folder = tmp_path_factory.mktemp("mnist")
    random = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 80)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3:2 * label + 6] += 180
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images.astype(np.uint8)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels.astype(np.uint8)))
    return folder


# theory


@pytest.mark.parametrize("backtrack", [1.0, 0.9, 0.75, 0.6])
def test_power_law_is_exact_to_rounding(backtrack):
    path = power_law(backtrack)
    for before, after in pairwise(path):
        assert after == pytest.approx((3 - 4 * backtrack) * before, rel=1e-14, abs=1e-15)
    assert len(path) == (2 if backtrack == 0.75 else 7)


@pytest.mark.parametrize("backtrack,limit", [(1.0, 2.0), (0.6, 2.5), (0.9, 2.763932), (0.75, 4.0),
                                             (0.8, 5.0), (0.875, 8.0)])
def test_stability_limit_of_the_optimizer(backtrack, limit):
    assert stability_limit(backtrack) == pytest.approx(limit, abs=2e-5)
    assert LIMITS[backtrack] == pytest.approx(limit, abs=1e-6)


def test_stability_limit_out_of_reach():
    with pytest.raises(ValueError, match=r"largest must exceed the limit, got 1\.5"):
        stability_limit(1.0, largest=1.5)


def test_best_quantized_weights_of_figure_1():
    scale, signs, loss = best_quantized()
    assert scale == pytest.approx(0.65 / 12, rel=1e-6) and signs == [1, -1]
    assert loss == pytest.approx(8.333e-7, rel=1e-3)


@pytest.mark.parametrize("name", ["theory", "fig1"])
def test_theory_holds_by_the_command(capsys, tmp_path, name, monkeypatch):
    command = ["reproduce", name, "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["blaq", *command])
    status, out, _ = call(capsys, *command)
    assert status == 0 and "says" in out and "here measured" in out
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["version"] == VERSION and found["command"] == f"blaq reproduce {name} --quick"
    assert {"commit", "torch", "date"} <= found["origin"].keys()
    if name == "theory":
        assert len(found["claims"]) == 17
        assert {claim["verdict"] for claim in found["claims"]} == {"holds"}
    for ending in (".png", ".svg"):
        assert (tmp_path / f"{name}{ending}").stat().st_size > 5000


def test_the_command_in_a_file_names_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/blaq", "reproduce", "table4", "--out", "/tmp/x",
                                     "--data-dir=/data", "--rows", "laq"])
    assert command_line() == "blaq reproduce table4 --rows laq"


# statistics


def test_paired_difference_and_its_verdict():
    gap = difference([99.3, 99.4, 99.5], [99.0, 99.2, 99.1])
    assert gap["mean"] == pytest.approx(0.3)
    # sd 0.1, t(2 degrees, 97.5 %) = 4.303
    assert gap["high"] - gap["low"] == pytest.approx(2 * 4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert verdict(gap) == "holds"
    assert verdict(difference([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])) == "undecided"
    assert verdict(difference([1.0, 1.1, 1.2], [2.0, 2.1, 2.3])) == "does not hold"
    assert verdict(difference([1.0], [0.0])) == "undecided (one seed)"
    assert spread([1.0]).sd is None and spread([1.0, 3.0]).text() == "2.00 ± 1.41"


def test_the_best_epoch_is_chosen_by_validation_images_alone():
    history = [{"valid_accuracy": 0.5, "valid_loss": 2.0, "test_accuracy": 0.9},
               {"valid_accuracy": 0.6, "valid_loss": 1.5, "test_accuracy": 0.1},
               {"valid_accuracy": 0.6, "valid_loss": 1.0, "test_accuracy": 0.2}]
    assert best_line(history)["test_accuracy"] == 0.2


# tables


@pytest.mark.parametrize("name", ["table4"])
def test_table_on_tiny_data_resumes_and_refuses(capsys, tmp_path, mnist, name):
    arguments = ["reproduce", name, "--quick", "--data-dir", mnist, "--out", tmp_path]
    status, out, _ = call(capsys, *arguments, "--rows", "laq,blaq")
    assert status == 1 and "the same command goes on" in out  # other rows are not run yet
    kept = tmp_path / f"{name}-quick" / "laq-s0" / RECORD
    written = kept.stat().st_mtime_ns
    status, out, _ = call(capsys, *arguments)
    assert status == 0 and kept.stat().st_mtime_ns == written
    found = json.loads((tmp_path / f"{name}.json").read_text())["content"]
    rows = {row["row"]: row for row in found["rows"]}
    assert set(rows) == {"fp", "laq", "laq-2x", "blaq"} and found["missing"] == []
    assert rows["laq-2x"]["evaluations"] == rows["blaq"]["evaluations"]
    assert rows["blaq"]["evaluations"] == 2 * rows["laq"]["evaluations"]
    assert rows["laq-2x"]["lr"] == rows["laq"]["lr"]
    assert [run["seed"] for run in rows["laq"]["runs"]] == [0, 1]
    assert all(run["config"]["validation"] == 40 for run in rows["laq"]["runs"])

    record = json.loads(kept.read_text())
    kept.write_text(json.dumps({**record, "version": 99}))
    assert fails_at_end(capsys, arguments).endswith(
        f"version must be {VERSION}, got 99; try another --out")
    record["config"]["batch_size"] = 10
    kept.write_text(json.dumps(record))
    assert "batch_size must be 20, got 10" in fails_at_end(capsys, arguments)


def test_rows_that_are_one_run_are_trained_once(tmp_path, mnist, monkeypatch):
    trained = []

    def train(config, out, **rest):
        trained.append(out.name)
        return loop.train(config, out, **rest)

    monkeypatch.setattr("blaq.reproduce.runs.train", train)
    study = STUDIES["table4"]
    plan = replace(study.plans["quick"], rates=(3e-3,), epochs=1, seeds=1, rows=("laq-same-lr", "laq"))
    study = replace(study, plans={"quick": plan})
    data = datasets.load("mnist", mnist)
    content = run_study(study, "quick", data, Resources(tmp_path))
    assert trained == ["laq-same-lr-s0"] and content["missing"] == []
    assert content["rows"][0]["runs"] == content["rows"][1]["runs"]
    (tmp_path / "table4-quick" / "laq-same-lr-s0" / RECORD).unlink()
    run_study(study, "quick", data, Resources(tmp_path), ["laq-same-lr"])
    assert trained == ["laq-same-lr-s0"]


def fails_at_end(capsys, arguments):
    """The last line of stderr, where progress may stand before it."""
    status, _, err = call(capsys, *arguments)
    assert status == 2
    return err.strip().splitlines()[-1]


# mistakes


def test_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("BLAQ_DATA", raising=False)
    out = ["--out", tmp_path]
    assert "figure or table must be one of theory, " in fails(capsys, "reproduce", "fig9", *out)
    assert "got None" in fails(capsys, "reproduce", *out)
    assert "BLAQ_DATA to the folder that holds mnist/" in fails(capsys, "reproduce", "table4", *out)
    missing = tmp_path / "nowhere"
    assert str(missing) in fails(capsys, "reproduce", "table4", "--data-dir", missing, *out)
    assert "--rows must not be given for theory, got 'laq'" in fails(
        capsys, "reproduce", "theory", "--rows", "laq", *out)
    assert "--workers must be at least 1" in fails(
        capsys, "reproduce", "theory", "--workers", 0, *out)
    assert "--limit-minutes must be at least 0" in fails(
        capsys, "reproduce", "theory", "--limit-minutes", -1, *out)


def test_unknown_row(capsys, tmp_path, mnist):
    assert "rows of table4 must be among fp, " in fails(
        capsys, "reproduce", "table4", "--quick", "--data-dir", mnist, "--rows", "laq,foo",
        "--out", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "blaq-reproduce", "version": 0}'])
def test_results_of_another_version_are_not_written_over(capsys, tmp_path, content):
    path = Path(tmp_path) / "theory.json"
    path.write_text(content)
    assert str(path) in fails(capsys, "reproduce", "theory", "--quick", "--out", tmp_path)
    assert path.read_text() == content


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_row_has_a_method_and_a_rate(study):
    keys = [row.key for row in study.rows]
    assert len(keys) == len(set(keys))
    for name, plan in study.plans.items():
        for key in plan.rows or keys:
            row = study.row(key)
            config = study.config(row, plan, lr=0.1, seed=0, epochs=plan.epochs, device="cpu")
            assert config.method == row.settings["method"], name
            assert not row.like or not study.row(row.like).like
    for item in study.comparisons:
        assert {item.ours, item.theirs} <= set(keys)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, mnist):
    """Small sets in the original formats of every table's data, by table."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "svhn").mkdir()
    for name, count in (("train", 120), ("extra", 80), ("test", 60)):
        savemat(root / "svhn" / f"{name}_32x32.mat", {
            "X": random.integers(0, 256, (32, 32, 3, count)).astype(np.uint8),
            "y": (np.arange(count)[:, None] % 10 + 1).astype(np.uint8)})
    (root / "cifar").mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = random.integers(0, 256, (40, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        (root / "cifar" / name).write_bytes(records.tobytes())
    return {"table2": root / "cifar", "table2-lab": root / "cifar", "table3": mnist,
            "table5": root / "svhn"}


@pytest.mark.parametrize("name", ["table2", "table2-lab", "table3", "table5"])
def test_every_table_on_small_files_of_its_format(capsys, tmp_path, folders, name):
    status, out, _ = call(capsys, "reproduce", name, "--quick", "--data-dir", folders[name],
                          "--out", tmp_path, "--rows", "laq,blaq")
    assert status == 1 and "BLAQ is above LAQ after as many epochs" in out
    content = json.loads((tmp_path / f"{name}.json").read_text())["content"]
    assert [row["row"] for row in content["rows"]] == ["laq", "blaq"]


def test_table_6_on_a_folder_of_images(capsys, tmp_path):
    pytest.importorskip("torchvision")
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for kind in ("cat", "dog"):
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(
                    folder / f"{i}.png")
    status, _, _ = call(capsys, "reproduce", "table6", "--quick", "--data-dir",
                        tmp_path / "images", "--out", tmp_path, "--rows", "laq,blaq")
    assert status == 1


def test_a_time_limit_stops_and_the_same_command_goes_on(capsys, tmp_path, mnist):
    arguments = ["reproduce", "table4", "--quick", "--data-dir", mnist, "--out", tmp_path,
                 "--rows", "laq"]
    status, out, _ = call(capsys, *arguments, "--limit-minutes", 1e-9)
    assert status == 1 and "the same command goes on" in out
    assert not list(tmp_path.rglob(RECORD))
    call(capsys, *arguments)
    assert len(list(tmp_path.rglob(RECORD))) == 4  # 2 of the sweep, 2 seeds


def test_a_rate_that_diverges_is_recorded_and_not_chosen(tmp_path, monkeypatch, mnist):
    from blaq.reproduce import runs

    real = runs.train

    def train(config, folder, **more):
        if config.lr == 1e-2:
            folder.mkdir(parents=True)
            raise RuntimeError("blaq.train: loss must be finite, got nan in epoch 1")
        return real(config, folder, **more)

    monkeypatch.setattr(runs, "train", train)
    study = STUDIES["table4"]
    content = run_study(study, "quick", datasets.load("mnist", mnist), Resources(tmp_path),
                        ("laq",))
    assert content["sweep"][0]["chosen"] == 3e-3
    assert content["sweep"][0]["validation_accuracy"]["0.01"] == 0.0
    assert content["rows"][0]["lr"] == 3e-3


# oscillation and curves


def test_figure_5_takes_the_runs_of_table_4(capsys, tmp_path, mnist):
    arguments = ["--quick", "--data-dir", mnist, "--out", tmp_path]
    status, out, _ = call(capsys, "reproduce", "fig5", *arguments)
    assert status == 0 and out.count("BLAQ's last training loss is below LAQ's") == 2
    assert (tmp_path / "table4-quick" / "blaq-s0" / RECORD).exists()
    rows = json.loads((tmp_path / "fig5.json").read_text())["content"]["rows"]
    assert [row["row"] for row in rows] == ["laq", "laq-2x", "blaq"]


def test_oscillation_is_measured_once_for_table_1_and_figures_2_and_3(capsys, tmp_path, mnist):
    arguments = ["--quick", "--data-dir", mnist, "--out", tmp_path]
    assert call(capsys, "reproduce", "table1", *arguments)[0] == 0
    window = tmp_path / "oscillation-quick" / "blaq-4bit-s1" / "window.json"
    written = window.stat().st_mtime_ns
    for name in ("fig2", "fig3"):
        assert call(capsys, "reproduce", name, *arguments)[0] == 0
    assert window.stat().st_mtime_ns == written
    content = json.loads((tmp_path / "table1.json").read_text())["content"]
    assert len(content["rows"]) == 6 and len(content["runs"]) == 12
    run = content["runs"][0]
    assert len(run["traces"]) == 4 and {len(trace) for trace in run["traces"]} == {11}
    assert all(max(trace) > min(trace) for trace in run["traces"])
    assert sorted(run["amplitude_quantiles"]) == run["amplitude_quantiles"]
    mean = sum(i * n for i, n in enumerate(run["frequency_histogram"])) / sum(
        run["frequency_histogram"])
    assert run["frequency"] == pytest.approx(mean)  # 10 steps: no weight is above the last bin
    assert not (window.parent / "checkpoint.pt").exists()


# the language model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / f"{TEXT}.xz").write_bytes(lzma.compress(b"the quick brown fox jumps over. " * 200))
    return folder


def test_lstm_is_torchs(text):
    read = read_text(text)
    model, core = CharLSTM(read.symbols, 5), nn.LSTM(read.symbols, 5, batch_first=True)
    with torch.no_grad():
        core.weight_ih_l0.copy_(torch.cat([gate.weight for gate in model.input]))
        core.weight_hh_l0.copy_(torch.cat([gate.weight for gate in model.hidden]))
        core.bias_ih_l0.copy_(torch.cat([gate.bias for gate in model.input]))
        core.bias_hh_l0.zero_()
        numbers = read.test[:3, :-1]
        expected = model.decoder(core(nn.functional.one_hot(numbers, read.symbols).float())[0])
        torch.testing.assert_close(model(numbers), expected)
    assert model.input[1].bias.eq(1).all() and model.input[0].bias.eq(0).all()


def test_text_is_split_in_order_without_overlap(text):
    read = read_text(text)
    assert [len(part) for part in read[:3]] == [51, 6, 6]
    assert torch.equal(read.train[0, 100], read.train[1, 0])  # the last one is only predicted


def test_charlm_resumes_bit_for_bit(tmp_path, text):
    config, read = CharConfig("blaq", 6, 2, batch_size=10), read_text(text)
    whole = train_charlm(config, read, tmp_path / "whole")
    evaluated = []

    def stop(count):
        evaluated.append(count)
        if len(evaluated) == 7:  # of 5 steps an epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_charlm(config, read, tmp_path / "cut", on_batch=stop)
    resumed = train_charlm(config, read, tmp_path / "cut")
    assert [{**line, "seconds": 0} for line in resumed] == [
        {**line, "seconds": 0} for line in whole]
    assert whole[-1]["evaluations"] == 20 and set(evaluated) == {2}


def test_charlm_by_the_command_and_its_mistakes(capsys, tmp_path, text, monkeypatch):
    status, out, _ = call(capsys, "reproduce", "charlm", "--quick", "--data-dir", text,
                          "--out", tmp_path)
    assert status == 0 and "test cross-entropy by laq: paper says 1.291" in out
    assert len(json.loads((tmp_path / "charlm.json").read_text())["content"]["runs"]) == 3
    monkeypatch.delenv("BLAQ_DATA", raising=False)
    out = ["--out", tmp_path]
    assert "BLAQ_DATA to the folder that holds text/" in fails(capsys, "reproduce", "charlm", *out)
    assert f"must hold {TEXT}" in fails(capsys, "reproduce", "charlm", "--data-dir", tmp_path, *out)
    (tmp_path / f"{TEXT}.xz").write_bytes(b"no archive")
    assert "must be whole xz" in fails(capsys, "reproduce", "charlm", "--data-dir", tmp_path, *out)
    (tmp_path / TEXT).write_bytes(b"short")
    assert "more than 1010 characters, got 5" in fails(
        capsys, "reproduce", "charlm", "--data-dir", tmp_path, *out)

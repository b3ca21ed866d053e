"""The command line: what each command does, its exit status, and one line for each mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import blaq
from blaq.cli import COMMANDS, main
from blaq.train.checkpoint import CHECKPOINT, CONFIG, METRICS
from blaq.train.config import TrainConfig
from blaq.train.loop import restore

QUICK = ["--width", "0.1", "--epochs", "2", "--lr", "0.01", "--threads", "1"]


def call(capsys, *arguments):
    """Exit status, stdout, stderr of a command in this process."""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line that a mistake gets."""
    status, _, err = call(capsys, *arguments)
    assert status == 2 and err.count("\n") == 1 and err.endswith("\n"), err
    return err.strip()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run in full precision, and a 2-bit one of mixed widths."""
    root = tmp_path_factory.mktemp("runs")
    assert main(["train", "--method", "fp", "--out", str(root / "fp"), *QUICK]) == 0
    assert main(["train", "--bits", "2", "--first-bits", "8", "--group-size", "-1",
                 "--out", str(root / "blaq"), *QUICK]) == 0
    return root


# the table of commands


def test_overview_help_and_version(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
    status, out, _ = call(capsys)
    assert status == 2 and "usage: blaq COMMAND" in out
    assert call(capsys, "--version")[1] == f"blaq {blaq.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_every_option(capsys, name):
    status, out, _ = call(capsys, name, "--help")
    assert status == 0 and f"\n  blaq {name}" in out and "--debug" in out
    if name == "train":
        assert all(f"--{field.replace('_', '-')}" in out for field in TrainConfig().as_dict())


def test_usage_errors_are_one_line(capsys):
    assert fails(capsys, "trian").endswith("got 'trian'; did you mean train?")
    assert "unrecognized arguments: --bit 2; see blaq train --help" in fails(
        capsys, "train", "--bit", "2")
    assert "invalid int value: 'two'" in fails(capsys, "train", "--bits", "two")
    assert "invalid choice: 'lenet'" in fails(capsys, "train", "--model", "lenet")
    assert "required: target" in fails(capsys, "eval")


def test_errors_are_one_line_and_debug_shows_more(capsys, tmp_path, monkeypatch):
    arguments = ["train", "--bits", "7", "--out", tmp_path / "run"]
    assert fails(capsys, *arguments) == "blaq train: bits must be 1, 2, 3 or 4, got 7"
    status, _, err = call(capsys, *arguments, "--debug")
    assert status == 2 and err.startswith("Traceback") and err.endswith("got 7\n")
    monkeypatch.setenv("BLAQ_DEBUG", "1")
    assert call(capsys, *arguments)[2].startswith("Traceback")
    assert not (tmp_path / "run").exists()


# train


def test_train_leaves_a_run_folder(runs):
    names = {CONFIG, METRICS, CHECKPOINT, "model.safetensors"}
    assert {path.name for path in (runs / "fp").iterdir()} == names
    assert {path.name for path in (runs / "blaq").iterdir()} == names | {"packed.safetensors"}
    config = json.loads((runs / "blaq" / CONFIG).read_text())
    assert (config["bits"], config["lr"], config["method"]) == (2, 0.01, "blaq")
    lines = (runs / "blaq" / METRICS).read_text().splitlines()
    assert [json.loads(line)["evaluations"] for line in lines] == [44, 88]


def test_train_prints_each_epoch_and_a_summary(capsys, tmp_path):
    status, out, _ = call(capsys, "train", "--out", tmp_path / "run", *QUICK)
    assert status == 0
    assert re.search(r"^epoch 2/2  train loss \S+  test loss \S+  accuracy [\d.]+ %", out, re.M)
    assert re.search(r"^gradient evaluations +88$", out, re.M)
    assert re.search(r"^packed.safetensors +[\d.]+ KiB$", out, re.M)


def test_train_takes_a_file_and_flags_win(capsys, tmp_path):
    (tmp_path / "c.toml").write_text('method = "laq"\nbits = 2\nwidth = 0.1\nepochs = 1\n')
    status, _, _ = call(capsys, "train", "--config", tmp_path / "c.toml", "--bits", "3",
                        "--augment", "--no-track-oscillation", "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert status == 0 and (config["method"], config["bits"]) == ("laq", 3)
    assert config["augment"] is True and config["track_oscillation"] is False
    (tmp_path / "c.toml").write_text("bit = 2")
    assert "keys must be among model, " in fails(capsys, "train", "--config", tmp_path / "c.toml")
    assert "No such file" in fails(capsys, "train", "--config", tmp_path / "none.toml")


def test_train_in_a_folder_with_a_run(capsys, runs):
    assert "out must be a folder without a run" in fails(
        capsys, "train", "--out", runs / "fp", "--method", "fp", *QUICK)
    assert "lr must be 0.01, as the run in " in fails(
        capsys, "train", "--out", runs / "fp", "--resume", "--lr", "0.1")
    before = (runs / "fp" / METRICS).read_text()
    status, out, _ = call(capsys, "train", "--out", runs / "fp", "--resume")
    assert status == 0 and "epoch 2/2" not in out and (runs / "fp" / METRICS).read_text() == before


def test_resume_needs_a_run(capsys, tmp_path):
    assert "--resume must go with --out" in fails(capsys, "train", "--resume")
    assert "--out must be a run to resume, got " in fails(
        capsys, "train", "--resume", "--out", tmp_path)


def test_bad_data_device_and_extra(capsys, tmp_path, monkeypatch):
    run = ["train", "--out", tmp_path / "run", *QUICK]
    monkeypatch.delenv("BLAQ_DATA", raising=False)
    assert "try --data-dir, or set BLAQ_DATA" in fails(capsys, *run, "--data", "mnist")
    assert "file must exist" in fails(capsys, *run, "--data", "cifar10", "--data-dir", tmp_path)
    assert "init.safetensors: file must exist" in fails(
        capsys, *run, "--init", tmp_path / "init.safetensors")
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install 'blaq-kernels[tensorboard]'" in fails(
        capsys, "train", "--tensorboard", "--out", tmp_path / "other", *QUICK)
    assert not (tmp_path / "other").exists()
    for device, rule in (("abacus", "cpu, cuda or cuda:N"), ("cpu:1", "cpu, cuda or cuda:N"),
                         ("cuda:99", f"one of the {torch.cuda.device_count()} that torch finds")):
        message = f"device must be {rule}, got '{device}'"
        assert message in fails(capsys, "train", "--device", device, "--out", tmp_path / "o")
        assert message in fails(capsys, "eval", tmp_path, "--device", device)
    assert not (tmp_path / "o").exists()


def test_tensorboard(capsys, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert call(capsys, "train", "--tensorboard", "--out", tmp_path / "run", *QUICK)[0] == 0
    files = list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert len(files) == 1 and b"test_accuracy" in files[0].read_bytes()


# eval, pack, inspect


def test_eval_of_run_and_files_agree(capsys, runs):
    def accuracy(*target):
        return json.loads(call(capsys, "eval", *target, "--json")[1])

    for run in ("fp", "blaq"):
        last = json.loads((runs / run / METRICS).read_text().splitlines()[-1])
        whole = accuracy(runs / run)
        assert (whole["accuracy"], whole["images"]) == (last["test_accuracy"], 360)
        assert whole["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
        floats = accuracy(runs / run / "model.safetensors")
        assert (floats["loss"], floats["correct"]) == (whole["loss"], whole["correct"])
    packed = accuracy(runs / "blaq" / "packed.safetensors")
    assert packed["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert accuracy(runs / "blaq", "--split", "train", "--threads", "1")["images"] == 1437
    assert re.search(r"digits test: accuracy [\d.]+ % \(\d+ of 360\), loss",
                     call(capsys, "eval", runs / "fp")[1])


def test_eval_of_a_file_elsewhere(capsys, runs, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes((runs / "blaq" / "packed.safetensors").read_bytes())
    assert "must have its run's config.json beside it, got none" in fails(capsys, "eval", path)
    config = runs / "blaq" / CONFIG
    assert call(capsys, "eval", path, "--config", config)[0] == 0
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("width = 0.2")
    assert "must be the model's" in fails(capsys, "eval", path, "--config", wrong)
    path.write_bytes(path.read_bytes()[:-100])
    assert "must be whole safetensors" in fails(capsys, "eval", path, "--config", config)
    assert "target must exist" in fails(capsys, "eval", tmp_path / "none")
    assert "checkpoint.pt: file must exist" in fails(capsys, "eval", tmp_path)


def test_pack_equals_what_train_wrote_and_what_was_trained(capsys, runs, tmp_path):
    out = tmp_path / "m.safetensors"
    status, printed, _ = call(capsys, "pack", runs / "blaq", "--out", out)
    assert status == 0 and "3 packed layers of epoch 2" in printed
    assert out.read_bytes() == (runs / "blaq" / "packed.safetensors").read_bytes()
    config, (model, _, _) = restore(runs / "blaq")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    fresh = blaq.train.models.build(config.model, 10, (1, 28, 28), width=config.width)
    floats = blaq.unpack(blaq.load(out, fresh))
    assert all(torch.equal(weights[name], p) for name, p in floats.named_parameters())
    assert fails(capsys, "pack", runs / "fp").endswith("fit a packed format, got fp")
    assert "No such file" in fails(capsys, "pack", runs / "blaq", "--out", tmp_path / "no" / "m")


def test_inspect(capsys, runs, tmp_path):
    path = runs / "blaq" / "packed.safetensors"
    content = json.loads(call(capsys, "inspect", path, "--json")[1])
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert list(layers) == ["conv2", "fc1", "fc2"]
    assert layers["fc2"]["shape"] == [10, 50] and layers["fc2"]["levels"] == [0.5, 1.0]
    assert layers["fc2"]["bytes"] == 2 * 10 * 7 + 4 * 10 + 4 * 10  # planes, scales, bias
    assert layers["fc2"]["bytes_float32"] == 4 * 510
    assert {t["name"] for t in content["other_tensors"]} == {"conv1.weight", "conv1.bias"}
    assert content["bytes"] == path.stat().st_size
    stored = sum(part["bytes"] for part in content["layers"] + content["other_tensors"])
    assert 0 < content["bytes"] - stored < 2000  # the header
    _, out, _ = call(capsys, "inspect", path)
    assert re.search(r"^fc2 +linear +10x50 +float32 +2 +0.5 1 +row +220 B +9.3$", out, re.M)
    assert re.search(r"^conv1.bias +F32 +2 +8 B$", out, re.M)
    broken = tmp_path / "m.safetensors"
    broken.write_bytes(path.read_bytes()[:-1])
    assert str(broken) in fails(capsys, "inspect", broken)
    assert "blaq.format_version must be 1" in fails(
        capsys, "inspect", runs / "fp" / "model.safetensors")
    assert "No such file" in fails(capsys, "inspect", tmp_path / "none")


# env


def test_env(capsys, tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("BLAQ_DATA", str(tmp_path))
    report = json.loads(call(capsys, "env", "--json")[1])
    import blaq_kernels

    assert report["ops"] == blaq_kernels.serving() and "fused_step" in report["ops"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["capability"] == blaq_kernels.cpu_capability()
    assert report["cpu"]["int8"] == blaq_kernels.int8_kernels()
    assert report["data"] == {"BLAQ_DATA": str(tmp_path), "found": ["mnist"]}
    assert report["variables"]["BLAQ_DATA"] == str(tmp_path)
    _, out, _ = call(capsys, "env")
    assert re.search(r"^  fused_step +\S", out, re.M) and "torch uses" in out
    assert (blaq_kernels.int8_kernels() or "no 8-bit kernels") in out
    assert f"CUDA C++ kernels: {blaq_kernels.cuda.unavailable() or 'ready'}" in out
    assert f"BLAQ_DATA is {tmp_path}, with mnist" in out


# as a process


def heed_interrupts():
    """A job in the background, as a CI runner may be, passes on that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def spawn(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "blaq", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=heed_interrupts, **options)


def test_env_and_inspect_need_no_extra(runs):
    absent = ("sklearn", "scipy", "matplotlib", "tqdm", "torchvision", "tensorboard", "PIL")
    code = (f"import sys; sys.modules.update(dict.fromkeys({absent})); from blaq.cli import main;"
            "sys.exit(main(['env']) or main(['inspect', 'blaq/packed.safetensors'])"
            " or 10 + main(['train']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=runs, env={**os.environ, "BLAQ_BACKEND": "reference"})
    assert done.returncode == 12, done.stderr
    assert "reference (BLAQ_BACKEND=reference)" in done.stdout
    assert done.stderr.endswith("is not installed; try pip install 'blaq-kernels[train]'\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_ended_by_a_signal_resumes_to_the_same_bits(capsys, tmp_path, how):
    flags = ["--width", "0.1", "--threads", "1", "--batch-size", "16", "--schedule", "none"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = spawn("train", *flags, "--epochs", "99", "--out", run)
    began = time.monotonic()
    while not (run / METRICS).exists() or (run / METRICS).read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() - began < 120, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    done = len(restore(run)[1].history)
    assert 2 <= done < 99
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err
        assert err.endswith("blaq train: interrupted; go on with: "
                            f"blaq train --resume --out {run}\n")
    epochs = ["--epochs", done + 1]
    assert call(capsys, "train", "--resume", "--out", run, *epochs)[0] == 0
    assert call(capsys, "train", "--out", whole, *flags, *epochs)[0] == 0
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("model.safetensors", "packed.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    metrics = [[{**json.loads(line), "seconds": 0} for line in (folder / METRICS).open()]
               for folder in (run, whole)]
    assert metrics[0] == metrics[1] and len(metrics[0]) == done + 1


def test_output_into_a_closed_pipe_is_no_error():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = spawn("env", env=buffered)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait() in (0, 1)

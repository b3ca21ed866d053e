import json
import multiprocessing

import pytest

from blaq.train import data as datasets
from blaq.train.checkpoint import METRICS
from blaq.train.config import TrainConfig
from blaq.train.loop import restore, train
from blaq.train.parallel import available_cores, train_all

SMALL = {"width": 0.1, "epochs": 2, "batch_size": 16, "lr": 0.01, "threads": 1}
CONFIGS = {"laq": TrainConfig(method="laq", **SMALL), "fp": TrainConfig(method="fp", **SMALL),
           "blaq": TrainConfig(seed=1, **SMALL)}


@pytest.fixture(scope="module")
def data():
    """200 and 80 of the digits."""
    def head(split, count):
        return datasets.Split(split.images[:count], split.labels[:count], 10, split.mean, split.std)

    digits = datasets.load("digits")
    return datasets.Data(head(digits.train, 200), head(digits.test, 80))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Metrics of each run, trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for name, config in CONFIGS.items():
        train(config, folder / name, data=data)
    return {name: metrics(folder / name) for name in CONFIGS}


def metrics(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{**line, "seconds": None} for line in lines]


def test_runs_come_out_as_they_do_alone(tmp_path, data, alone):
    jobs = [(tmp_path / name, config) for name, config in CONFIGS.items()]
    batches, lines = [0] * 3, [[], [], []]

    def on_batch(index):
        batches[index] += 1

    train_all(jobs, workers=2, data=data, on_batch=on_batch,
              on_epoch=lambda index, line: lines[index].append({**line, "seconds": None}))
    assert batches == [24, 24, 24]
    for (folder, _), seen in zip(jobs, lines, strict=True):
        assert metrics(folder) == seen == alone[folder.name]
    assert multiprocessing.active_children() == []


def test_an_interrupt_leaves_runs_to_go_on_with(tmp_path, data, alone):
    jobs = [(tmp_path / name, config) for name, config in CONFIGS.items()]
    count = 0

    def interrupt(_):
        nonlocal count
        count += 1
        if count == 30:  # two workers: one run at least is past its first epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(jobs, workers=2, data=data, on_batch=interrupt)
    assert multiprocessing.active_children() == []
    begun = [len(restore(folder)[1].history) for folder, _ in jobs
             if (folder / "checkpoint.pt").exists()]
    assert begun and not list(tmp_path.glob("*/.*.tmp"))
    train_all(jobs, workers=1, data=data)
    assert {folder.name: metrics(folder) for folder, _ in jobs} == alone


def test_a_run_that_fails_is_named_and_the_others_stop(tmp_path, data):
    train(CONFIGS["fp"], tmp_path / "taken", data=data)
    other = CONFIGS["fp"].replaced({"lr": 0.5})
    jobs = [(tmp_path / "taken", other), (tmp_path / "other", CONFIGS["laq"])]
    with pytest.raises(RuntimeError, match=r"taken: ValueError: blaq\.train: lr must be 0\.01"):
        train_all(jobs, workers=2, data=data)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_an_error(tmp_path, data):
    def kill(_):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(RuntimeError, match="a worker process died, exit code -9"):
        train_all([(tmp_path / "laq", CONFIGS["laq"])], workers=1, data=data, on_batch=kill)


def test_no_jobs_and_cores():
    train_all([], workers=2)
    assert available_cores() >= 1

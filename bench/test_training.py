"""Time of the training ops, to be saved and compared between commits."""

from blaq.bench.training import TABLES


def test_training(case, time_case):
    time_case(case, TABLES[case.op])

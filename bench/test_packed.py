"""Time of packing and of packed layers, to be saved and compared between commits."""

from blaq.bench.packed import TABLES


def test_packed(case, time_case):
    time_case(case, TABLES[case.op])

"""One benchmark for each case of a table: blaq's own time. Alternatives are `blaq bench`'s part,
which interleaves them."""

from collections.abc import Callable

import pytest
import torch

from blaq.bench.case import Case, Table


@pytest.fixture
def time_case(benchmark) -> Callable[[Case, Table], None]:
    def time(case: Case, table: Table) -> None:
        torch.manual_seed(0)
        benchmark.group = case.op
        benchmark.extra_info["backend"] = table.backend
        own = table.build(case, False)[0]
        with torch.no_grad():
            benchmark(own.call)

    return time


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [case for table in metafunc.module.TABLES.values() for case in table.cases()]
        metafunc.parametrize("case", cases, ids=[case.name.replace(" ", "-") for case in cases])

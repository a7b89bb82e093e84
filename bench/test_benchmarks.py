"""The suite's cases through pytest-benchmark: `pytest bench/ --benchmark-only`.

TERRAZZO_BENCH_PRESET (default tiny), TERRAZZO_BENCH_DTYPE (default fp32) choose the cases. A provider that fails
the accuracy gate fails its test; one that cannot run here is skipped with the reason.
"""
import os

import pytest
from terrazzo.bench import accuracy, suite
from terrazzo.bench.cases import Unavailable, runner, select

CASES = select(suite.all_cases(os.environ.get("TERRAZZO_BENCH_PRESET", "tiny")), dtypes=(os.environ.get("TERRAZZO_BENCH_DTYPE", "fp32"),))
JOBS = [(case, provider) for case in CASES for provider in case.providers if provider.name in ("terrazzo", "reference", "hf")]


@pytest.fixture(scope="module")
def oracles():
    return {}


@pytest.mark.parametrize("case, provider", JOBS, ids=[f"{case.key} {provider.name}" for case, provider in JOBS])
def test_case(benchmark, oracles, case, provider):
    try:
        fn = provider.build()
    except Unavailable as why:
        pytest.skip(str(why))
    if case.key not in oracles:
        oracles.clear()  # tests of one case follow each other: keep one oracle at a time
        oracles[case.key] = accuracy.Oracle(case)
    checked = accuracy.gate(case, fn, oracles[case.key], provider.ours)
    assert checked.ok, checked.why
    benchmark.group = case.key
    benchmark.extra_info.update(max_abs=checked.max_abs, nmse=checked.nmse)
    benchmark(runner(case, fn, case.inputs(0)))

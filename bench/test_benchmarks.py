"""The suite's cases through pytest-benchmark: `pytest bench/ --benchmark-only`.

TERRAZZO_BENCH_PRESET (default tiny), TERRAZZO_BENCH_DTYPE (default fp32) and TERRAZZO_BENCH_PROVIDER (default: all but the compiled ones)
choose, as comma-separated lists. A provider that fails the accuracy gate fails its test; one that cannot run here is skipped with the reason.
"""
import os

import pytest
from terrazzo.bench import accuracy, memory, providers, suite
from terrazzo.bench.cases import Unavailable, clone_inputs, select
from terrazzo.dispatch import BackendError


def chosen(name, default):
    return tuple(os.environ.get(f"TERRAZZO_BENCH_{name}", default).split(","))


CASES = select([case for preset in chosen("PRESET", "tiny") for case in suite.all_cases(preset)], dtypes=chosen("DTYPE", "fp32"))
NAMES = suite.expand(chosen("PROVIDER", ",".join(name for name in suite.PROVIDERS if name not in suite.COMPILED)))
JOBS = [(case, provider) for case in CASES for provider in providers.of_case(case) if provider.name in NAMES]


@pytest.fixture(scope="module")
def oracles():
    memory.keep_freed()  # as every run of terrazzo bench does
    return {}


@pytest.mark.parametrize("case, provider", JOBS, ids=[f"{case.key} {provider.name}" for case, provider in JOBS])
def test_case(benchmark, oracles, case, provider):
    try:
        fn = provider.build()
        if case.key not in oracles:
            oracles.clear()  # tests of one case follow each other: keep one oracle at a time
            oracles[case.key] = accuracy.Oracle(case)
        checked = accuracy.gate(case, fn, oracles[case.key], provider.ours, provider.nmse_limit)
    except (Unavailable, BackendError) as why:
        pytest.skip(str(why))
    assert checked.ok, checked.why
    benchmark.group = case.key
    benchmark.extra_info.update(max_abs=checked.max_abs, nmse=checked.nmse)
    sets = [oracles[case.key].inputs(seed) for seed in accuracy.SEEDS]
    benchmark(suite.rotating(case, fn, [clone_inputs(s) for s in sets] if case.mutated else sets))

"""Fixtures that the suites share: the data, a place for files, and the recording of results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from bench import data
from bench import machine as machines
from bench.data import random_keys, random_values, scaled
from bench.harness import ROUNDS, Prepare, Result, interleave, ratios, write_results
from bench.peers import available
from bench.targets import ROWS, verdict

collect_ignore = ["bench_pysyncobj.py"]  # a script, not a suite: it starts clusters of processes
SUITES = {path.name for path in Path(__file__).parent.glob("bench_*.py")} - set(collect_ignore)
SMOKE_ROUNDS = 2
results: list[Result] = []
about: dict[str, Any] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", action="store_true", help="measure the other stores as well")
    parser.addoption("--results", default=None, help="where the results go (.benchmarks/results.json)")
    parser.addoption("--smoke", action="store_true", help="run every row in seconds, to see that it runs: no results")
    parser.addoption("--rounds", type=int, default=ROUNDS, help="interleaved rounds of each comparison, 5 or more")


def pytest_configure(config: pytest.Config) -> None:
    data.smoke = config.getoption("--smoke")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a whole smoke run that left a row out."""
    if not data.smoke or session.testsfailed or {item.path.name for item in session.items} != SUITES:
        return
    left_out = set(ROWS) - {result.row for result in results}
    if not Path("/proc/self/smaps_rollup").exists():
        left_out -= {row for row in left_out if row.startswith(("memory.", "disk."))}
    if left_out:
        print(f"\nnot measured: {sorted(left_out)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "who" in metafunc.fixturenames:
        names = ["fastsm"]
        if metafunc.config.getoption("--peers"):
            names += [name for name in available() if name in getattr(metafunc.function, "peers", available())]
        metafunc.parametrize("who", names)


@pytest.fixture(scope="session", autouse=True)
def _machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("machine")
    about.update(machines.describe(directory), limits=machines.limits(directory))


@pytest.fixture
def note() -> Callable[..., Result]:
    """Provide `note(row, unit, values)`, which records a result."""

    def note_result(row: str, unit: str, values: list[float], who: str = "fastsm", **more: Any) -> Result:
        results.append(Result(row, who, unit, values, **more))
        return results[-1]

    return note_result


@pytest.fixture
def compare(benchmark: Any, note: Callable[..., Result], pytestconfig: pytest.Config) -> Callable[..., Result]:
    """Provide `compare(row, subject, base, items, prepare)`, which times both alternately and notes the ratio."""

    def run(
        row: str,
        subject: Callable[..., object],
        base: Callable[..., object],
        items: int,
        prepare: Prepare = lambda: ((), ()),
        rounds: int | None = None,
        who: str = "fastsm",
    ) -> Result:
        rounds = SMOKE_ROUNDS if data.smoke else rounds or pytestconfig.getoption("--rounds")
        mine, theirs = interleave(subject, base, prepare, rounds)
        # pytest-benchmark did not time anything: its table is given the subject's times.
        benchmark.pedantic(lambda: None, rounds=1)
        if benchmark.stats is not None:
            benchmark.stats.stats.data[:] = mine
        result = note(row, "ratio", ratios(mine, theirs), who, items=items, subject=mine, base=theirs)
        benchmark.extra_info.update(row=row, who=who, ratio=result.median)
        return result

    return run


def results_path(config: pytest.Config) -> Path:
    name = config.getoption("--results") or f".benchmarks/{'smoke' if data.smoke else 'results'}.json"
    return config.rootpath / name  # a name may be an absolute one


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write the results so far: a run with all stores takes half an hour and may be interrupted."""
    if results:
        write_results(results_path(item.config), results, about)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not results:
        return
    path = results_path(config)
    write_results(path, results, about)
    terminalreporter.write_sep("=", "median (spread)")
    for result in results:
        terminalreporter.write_line(f"{result}  {'' if data.smoke else verdict(result)}")
    terminalreporter.write_line(f"written to {path}")


@pytest.fixture(scope="session")
def keys() -> list[bytes]:
    return random_keys(scaled(1_000_000))


@pytest.fixture(scope="session")
def values() -> list[bytes]:
    return random_values(scaled(1_000_000))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Provide a directory that is removed right after the test, because a run writes many gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def machine_at(place: Path) -> Iterator[Callable[..., fastsm.FastStateMachine]]:
    """Provide a function that opens state machines in a temporary directory; close them after the test."""
    opened: list[fastsm.FastStateMachine] = []

    def open_machine(**options: Any) -> fastsm.FastStateMachine:
        opened.append(fastsm.FastStateMachine(place / f"state-{len(opened)}", **options))
        return opened[-1]

    yield open_machine
    for machine in opened:
        machine.close()

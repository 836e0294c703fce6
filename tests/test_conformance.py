"""The conformance suite: both implementations pass it, and it finds implementations that are wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastsm import FastStateMachine, MemoryStateMachine, StateMachine
from fastsm.testing import StateMachineConformance
from support import wrong_answers, wrong_extras, wrong_machines, wrong_stores, wrong_watches
from support.inside import inside
from support.wrong_suites import FAULTS, StoringStateMachine

SUPPORT = Path(__file__).parent / "support"
WRONG_MACHINES = [wrong_answers, wrong_extras, wrong_machines, wrong_stores, wrong_watches]


class FastConformance(StateMachineConformance):
    """The fixtures that the classes below share; it is not collected itself."""

    sync = "flush"

    @pytest.fixture
    def machines(self) -> Iterator[list[FastStateMachine]]:
        opened: list[FastStateMachine] = []
        yield opened
        with opened[-1] as last:
            last.start()
            inside(last).check()

    @pytest.fixture
    def state_machine(self, directory: Path, machines: list[FastStateMachine]) -> FastStateMachine:
        machines.append(FastStateMachine(directory, sync=self.sync))
        return machines[-1]

    @pytest.fixture
    def reopen(
        self, directory: Path, machines: list[FastStateMachine]
    ) -> Callable[[StateMachine], FastStateMachine]:
        def close_and_open(machine: StateMachine) -> FastStateMachine:
            assert machine is machines[-1]
            machines[-1].close()
            machines.append(FastStateMachine(directory, sync=self.sync))
            return machines[-1]

        return close_and_open


    @pytest.fixture
    def with_procedures(self, directory: Path, machines: list[FastStateMachine]) -> Callable[..., FastStateMachine]:
        def make(procedures: list[Callable[..., object]]) -> FastStateMachine:
            machines.append(FastStateMachine(directory, sync=self.sync, procedures=procedures))
            return machines[-1]

        return make


class TestFastStateMachine(FastConformance):
    """The suite on ``FastStateMachine``."""


class TestFastStateMachineThatSyncsOnApply(FastConformance):
    """The suite on ``FastStateMachine`` with ``sync="apply"``."""

    sync = "apply"


class TestMemoryStateMachine(StateMachineConformance):
    """The suite on the model, which stores nothing."""

    @pytest.fixture
    def state_machine(self) -> MemoryStateMachine:
        return MemoryStateMachine()

    @pytest.fixture
    def with_procedures(self) -> Callable[..., MemoryStateMachine]:
        return lambda procedures: MemoryStateMachine(procedures=procedures)


class TestStoringStateMachine(StateMachineConformance):
    """The suite on the model with storage of the simplest kind, which is enough for the rules of storage."""

    @pytest.fixture
    def state_machine(self) -> StoringStateMachine:
        return StoringStateMachine()

    @pytest.fixture
    def reopen(self) -> Callable[[StoringStateMachine], StoringStateMachine]:
        return StoringStateMachine.reopen


# ---- what the suite finds ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed_tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Provide the names of the tests that each wrong state machine fails, by the name of its class."""
    report = tmp_path_factory.mktemp("suite") / "report.xml"
    files = [str(module.__file__) for module in WRONG_MACHINES]
    command = [sys.executable, "-m", "pytest", *files, "-q", "--tb=no", f"--junitxml={report}"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={SUPPORT.parent}"]
    ended = subprocess.run(command, cwd=report.parent, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout[-2000:] + ended.stderr
    failed: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["classname"].rpartition(".")[2].removeprefix("Test")
        assert case.find("error") is None, f"{name}: {case.attrib['name']} did not run"
        tests = failed.setdefault(name, set())
        if case.find("failure") is not None:
            tests.add(case.attrib["name"].partition("[")[0])
    return failed


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_wrong_state_machine_is_found(name: str, failed_tests: dict[str, set[str]]) -> None:
    """Each planted fault is found by the test of the rule that it breaks."""
    assert FAULTS[name] <= failed_tests[name], f"{name} fails only {sorted(failed_tests[name])}"


def test_every_rule_fails_for_some_wrong_state_machine(failed_tests: dict[str, set[str]]) -> None:
    """Each test of the suite fails for some wrong state machine."""
    rules = {name for name in dir(StateMachineConformance) if name.startswith("test_")}
    idle = rules - set().union(*failed_tests.values())
    assert not idle, f"no planted fault is found by {sorted(idle)}"


def test_the_docstring_of_each_rule_states_the_rule() -> None:
    """The docstring of each test of the suite begins with its rule, in one sentence on one line."""
    for name in dir(StateMachineConformance):
        if name.startswith("test_"):
            rule = getattr(StateMachineConformance, name).__doc__ or ""
            assert rule.partition("\n")[0].endswith("."), f"{name} does not say its rule: {rule!r}"


def test_without_pytest_the_import_says_what_to_install() -> None:
    """``import fastsm.testing`` without pytest raises an ``ImportError`` that names the extra."""
    program = (
        "import sys\nsys.modules['pytest'] = None\nimport fastsm\n"
        "try:\n    import fastsm.testing\nexcept ImportError as error:\n    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    assert 'pip install "fastsm[test]"' in ended.stdout


def test_the_package_does_not_import_pytest() -> None:
    """``import fastsm`` alone imports neither pytest nor the suite."""
    program = "import sys, fastsm; print(sorted({'pytest', 'fastsm.testing'} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "[]\n"


def test_a_class_without_the_fixture_is_told_so(tmp_path: Path) -> None:
    """Without a fixture ``state_machine`` every test says that the class needs one."""
    (tmp_path / "test_mine.py").write_text(
        "from fastsm.testing import StateMachineConformance\nclass TestMine(StateMachineConformance): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-x", "--rootdir=.", "-p", "no:cacheprovider", "test_mine.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "TestMine needs a fixture state_machine" in ended.stdout

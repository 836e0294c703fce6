"""What all tests share: the right fastsm, machines that are checked when they end, deterministic hypothesis."""

from __future__ import annotations

import faulthandler
import gc
import importlib.machinery
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fastsm import FastStateMachine

TESTS = Path(__file__).resolve().parent
CHECKOUT = TESTS.parent


def is_built(package: Path) -> bool:
    """Return whether the folder holds modules compiled for this interpreter."""
    return any((package / "core" / f"engine{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def uncover_installed_package() -> None:
    """Remove an unbuilt checkout from the path: `python -m pytest` puts it before the installed package."""
    if "fastsm" in sys.modules or not (CHECKOUT / "fastsm").is_dir() or is_built(CHECKOUT / "fastsm"):
        return
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != CHECKOUT]
    if importlib.util.find_spec("fastsm") is None:
        sys.path[:] = before  # nothing is installed: the checkout's own ImportError says what to do


def heed_ctrl_c() -> None:
    """Stop ignoring SIGINT, as under `nohup` or cron: child processes would inherit that, and tests send SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


heed_ctrl_c()
uncover_installed_package()
sys.path.insert(0, str(TESTS))  # for `import support.…`

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


HANGS = 240  # seconds after which a test that hangs ends the run
REAL_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real standard error: pytest captures it during tests, and a hard end would lose what it captured."""
    config.stash[REAL_STDERR] = os.dup(2)


@pytest.fixture
def a_hang_ends(pytestconfig: pytest.Config) -> Iterator[None]:
    """End the run if a test hangs, with the tracebacks of all threads on the real standard error."""
    faulthandler.dump_traceback_later(HANGS, exit=True, file=pytestconfig.stash[REAL_STDERR])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide an empty folder."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(autouse=True)
def _away_from_the_checkout(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty folder: ``python -c`` would find an unbuilt package in the current one."""
    monkeypatch.chdir(elsewhere)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Silence the log: thousands of torn tails and faults would be thousands of warnings."""
    logger = logging.getLogger("fastsm")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Let full garbage collections visit only objects of the module's tests, in a tenth of the time or less."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Provide the path of a state's directory, which does not exist yet."""
    return tmp_path / "state"


@pytest.fixture
def machine_at() -> Iterator[Callable[..., FastStateMachine]]:
    """Provide a function that opens state machines; check all their invariants and close them after the test."""
    import fastsm  # noqa: PLC0415  # not before the path is right

    machines: list[FastStateMachine] = []

    def open_machine(path: Path | str, **options: Any) -> FastStateMachine:
        machine = fastsm.FastStateMachine(path, **options)
        machines.append(machine)
        return machine

    yield open_machine
    try:
        for machine in machines:
            if machine.is_running():
                machine._check()
    finally:
        for machine in machines:
            machine.close()

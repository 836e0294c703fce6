"""The thread that runs the procedures of calls made in the main thread, kept for the next call; late interruptions."""

from __future__ import annotations

import collections
import functools
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Answer, FastStateMachine, background

CALL = fastsm.call("p")


def system_threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def signal_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def run(machine: FastStateMachine) -> Any:
    return machine.apply([(machine.last_applied().index + 1, 1, CALL)])[0]


@pytest.fixture
def idents(directory: Path) -> Any:
    """Returns a machine with a procedure, and the list of the threads on which the procedure ran."""
    threads: list[int] = []

    def p(tx: Any, payload: bytes) -> Any:
        threads.append(threading.get_native_id())
        return len(threads)

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
        yield machine, threads


def test_one_thread_runs_one_call_after_another(idents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred chunks in a row start at most one thread."""
    machine, threads = idents
    monkeypatch.setattr(background, "IDLE_SECONDS", 30.0)  # however slow the machine is
    started: list[Any] = []
    start_new_thread = background.start_new_thread  # type: ignore[attr-defined]

    def start(*arguments: Any) -> int:
        started.append(arguments)
        thread: int = start_new_thread(*arguments)
        return thread

    monkeypatch.setattr(background, "start_new_thread", start)
    assert [run(machine) for _ in range(100)] == [Answer(True, count) for count in range(1, 101)]
    assert len(started) <= 1
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_native_id()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list threads")
def test_an_idle_thread_ends(idents: Any) -> None:
    """Once nothing has been called for a while, the thread is gone; the next call starts another."""
    machine, threads = idents
    deadline = time.monotonic() + 60
    run(machine)
    while threads[0] in system_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads[0] not in system_threads()
    assert run(machine) == Answer(True, len(threads))


def test_a_handler_that_calls_while_a_call_is_under_way_gets_another_thread(tmp_path: Path) -> None:
    """The kept thread is busy, so the call of the handler, on another machine, does not wait for it."""
    started, over = threading.Event(), threading.Event()

    def p(tx: Any, payload: bytes) -> Any:
        started.set()
        assert over.wait(60)
        return b"outer"

    def q(tx: Any, payload: bytes) -> Any:
        return b"inner"

    answers: list[Any] = []

    def handler(*_: object) -> None:
        answers.append(inner.apply([(1, 1, fastsm.call("q"))])[0])
        over.set()

    def send() -> None:
        assert started.wait(60)
        signal_main_thread()

    before = signal.signal(signal.SIGUSR1, handler)
    sender = threading.Thread(target=send)
    try:
        with (
            FastStateMachine(tmp_path / "outer", procedures=[fastsm.procedure(p)]) as outer,
            FastStateMachine(tmp_path / "inner", procedures=[fastsm.procedure(q)]) as inner,
        ):
            sender.start()
            answers.append(run(outer))
            answers.append(run(outer))
    finally:
        signal.signal(signal.SIGUSR1, before)
        sender.join()
    assert answers == [Answer(True, b"inner"), Answer(True, b"outer"), Answer(True, b"outer")]


def test_an_interruption_never_reaches_the_next_call() -> None:
    """A handler raises when the call has no step of Python code left: the next call still runs to its end."""
    started, blocked = threading.Lock(), threading.Lock()
    calls = [started.release, blocked.acquire]  # made from C, so that the interruption comes too late for them
    for lock in (started, blocked):
        lock.acquire()

    class Interruption(Exception):
        pass

    def handler(*_: object) -> None:
        blocked.release()
        raise Interruption

    def whole() -> str:
        for _ in range(1_000):  # steps at which a late interruption would be raised
            pass
        return "whole"

    def send() -> None:
        started.acquire()
        signal_main_thread()

    sender = threading.Thread(target=send)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        sender.start()
        work: Any = functools.partial(collections.deque, map(operator.methodcaller("__call__"), calls), 0)
        with pytest.raises(Interruption):
            background.undisturbed(work, background.BackgroundCall.interrupt, often=True)
        assert background.undisturbed(whole, often=True) == "whole"
    finally:
        signal.signal(signal.SIGUSR1, before)
        sender.join()


LATE = """
import collections, functools, operator, signal, sys, threading
from fastsm import background

started, blocked = threading.Lock(), threading.Lock()
started.acquire(), blocked.acquire()
work = functools.partial(
    collections.deque, map(operator.methodcaller("__call__"), [started.release, blocked.acquire]), 0)


def handler(*_):
    blocked.release()
    raise TimeoutError


def send():
    started.acquire()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)


signal.signal(signal.SIGUSR1, handler)
threading.Thread(target=send).start()
try:
    background.undisturbed(work, background.BackgroundCall.interrupt, often=sys.argv[1] == "often")
except TimeoutError:
    print("interrupted")
sys.setprofile(lambda *_: None)
(lambda: None)()
print("went on")
"""


@pytest.mark.parametrize("often", ["often", "once"])
def test_an_interruption_that_came_too_late_is_taken(tmp_path: Path, often: str) -> None:
    """CPython 3.11 never gets past a Python function under a profile function if a thread ended without taking one."""
    ended = subprocess.run(
        [sys.executable, "-c", LATE, often], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.stdout, ended.returncode) == ("interrupted\nwent on\n", 0), ended.stderr


FORK = """
import os, sys
import fastsm

machine = fastsm.FastStateMachine(sys.argv[1], procedures=[fastsm.procedure(name="p")(lambda tx, payload: b"called")])
machine.start()
assert machine.apply([(1, 1, fastsm.call("p"))])[0].value == b"called"
if pid := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
else:
    other = fastsm.FastStateMachine(sys.argv[2], procedures=[fastsm.procedure(name="p")(lambda tx, payload: b"child")])
    other.start()
    assert other.apply([(1, 1, fastsm.call("p"))])[0].value == b"child"
    other.close()
    os._exit(7)
assert machine.apply([(2, 1, fastsm.call("p"))])[0].value == b"called"
machine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_starts_a_thread_of_its_own(tmp_path: Path) -> None:
    """The parent's idle thread does not exist in the child: a machine that the child opens must not wait for it."""
    arguments = [str(tmp_path / "parent"), str(tmp_path / "child")]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, *arguments]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)


WITHOUT_MEMORY_TO_WAIT = """
import sys, time
from fastsm import background

class Idle:
    def __index__(self):
        raise MemoryError

background.IDLE_SECONDS = Idle()
for number in range(4):
    assert background.undisturbed(lambda: number, often=True) == number
    time.sleep(number * 0.01)
"""


def test_a_thread_without_memory_to_wait_takes_no_more_calls(tmp_path: Path) -> None:
    """It ends as one that was idle for long: the next call gets another thread."""
    subprocess.run([sys.executable, "-c", WITHOUT_MEMORY_TO_WAIT], check=True, cwd=tmp_path, timeout=60)


WITHOUT_MEMORY = """
import _testcapi
import fastsm
from fastsm import background

def outcome(n):
    _testcapi.set_nomemory(n, 0)
    try:
        return background.undisturbed(function, often=often)
    except (MemoryError, fastsm.StorageError) as error:
        return error
    finally:
        _testcapi.remove_mem_hooks()

for often in (True, False):
    ended = [0, 0]
    for n in range(1, 60):
        function = lambda: None
        ended[outcome(n) is None] += 1
    assert min(ended) >= 5, ended
"""


def test_a_call_ends_even_if_there_is_never_any_memory_again(tmp_path: Path) -> None:
    """The caller leaves once the call is over, although it has no memory to wait for it, from the n-th allocation."""
    pytest.importorskip("_testcapi")
    subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], check=True, cwd=tmp_path, timeout=120)


@pytest.mark.parametrize("often", [False, True])
def test_a_call_that_raised_when_its_thread_was_started_never_runs(
    monkeypatch: pytest.MonkeyPatch, often: bool
) -> None:
    """CPython has no memory to return the number of a thread that it has started: the caller does without it."""
    start_new_thread = background.start_new_thread  # type: ignore[attr-defined]
    ended: list[Any] = []
    ran: list[bool] = []

    def start(function: Any, arguments: Any) -> None:
        def whole() -> None:
            function()
            ended.append(function)

        start_new_thread(whole, arguments)
        raise MemoryError

    monkeypatch.setattr(background, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(background, "start_new_thread", start)
    lasting = background.LastingThread()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)  # so that the thread begins after the call has failed
    try:
        with pytest.raises(MemoryError):
            background.undisturbed(lambda: ran.append(True), often=often)
        background.undisturbed(lambda: ran.append(False), needs_thread=False, often=often)
        with pytest.raises(MemoryError):
            lasting.start(lambda: ran.append(True))
    finally:
        sys.setswitchinterval(interval)
    deadline = time.monotonic() + 60
    while len(ended) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (len(ended), ran, lasting.call) == (3, [False], None)


@pytest.mark.parametrize("often", [False, True])
def test_no_memory_for_a_lock_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, often: bool) -> None:
    """As if no thread could be started: nothing was done."""

    def refuse() -> None:
        raise RuntimeError("can't allocate lock")

    monkeypatch.setattr(background, "allocate_lock", refuse)
    with pytest.raises(fastsm.StorageError, match="nothing was done"):
        background.undisturbed(list, often=often)


@pytest.fixture
def interrupted() -> Any:
    """Returns a function that makes a signal handler of the main thread raise, the handler's error, and its cause."""
    raised = threading.Event()
    error = LookupError("of a handler")
    cause = ValueError("its cause")

    def handler(*_: object) -> None:
        raised.set()
        raise error from cause

    def interrupt() -> None:
        raised.clear()
        signal_main_thread()
        assert raised.wait(60)

    before = signal.signal(signal.SIGUSR1, handler)
    yield interrupt, error, cause
    signal.signal(signal.SIGUSR1, before)


def test_the_error_of_a_handler_keeps_its_cause(interrupted: Any) -> None:
    """It is raised as the handler raised it, whether or not the call ended with an error."""
    interrupt, error, cause = interrupted

    def fail() -> None:
        interrupt()
        raise KeyError

    for function in (interrupt, fail):
        with pytest.raises(LookupError) as found:
            background.undisturbed(function, often=True)
        assert found.value is error
        assert found.value.__cause__ is cause


def test_no_interruption_reaches_what_must_not_be_disturbed(interrupted: Any) -> None:
    """A procedure that, say, closes another machine is interrupted before or after the last steps of the close."""
    interrupt, *_ = interrupted
    reached: list[str] = []

    def last_steps() -> None:
        interrupt()
        for _ in range(10_000):  # steps at which an interruption would be raised
            pass
        reached.append("the end")

    def procedure() -> None:
        background.undisturbed(last_steps)
        for _ in range(10_000):
            pass
        reached.append("too far")

    with pytest.raises(LookupError):
        background.undisturbed(procedure, background.BackgroundCall.interrupt, often=True)
    assert reached == ["the end"]

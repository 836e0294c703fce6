"""Re-entry: code that runs on top of a call (a signal handler, a finalizer, a callback) calls the machine itself.

Each public method is called at each place where a call of the machine leaves compiled code for the system, on the same
thread, as a signal handler would; and from a real signal handler, while that call waits for its turn.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fastsm.background
from fastsm import (
    FastsmError,
    FastStateMachine,
    LogId,
    NotRunningError,
    OrderError,
    ReentryError,
    SnapshotMetadata,
    StorageError,
)
from support.faulty import PATIENCE, Call, Disk, in_thread
from support.inside import inside

Method = Callable[[FastStateMachine, Path], object]

pytestmark = pytest.mark.usefixtures("a_hang_ends")

SEAMS = (
    "sync", "write", "truncate", "allocate", "rename", "sync_directory", "open_file", "create_file", "close_file",
    "read_file", "unlink",
)  # fmt: skip


def next_entry(machine: FastStateMachine, size: int = 1) -> list[tuple[int, int, bytes]]:
    return [(machine.last_applied().index + 1, 1, fastsm.put(b"again", b"v" * size))]


def persist_metadata(machine: FastStateMachine, _: Path) -> None:
    machine.persist_last_snapshot_metadata(SnapshotMetadata(machine.last_applied(), bytes(32)))


def wait_for_next(machine: FastStateMachine, _: Path) -> None:
    with suppress(TimeoutError):
        machine.wait_applied(machine.last_applied().index + 1, timeout=0)


METHODS: dict[str, Method] = {
    "apply": lambda machine, _: machine.apply(next_entry(machine)),
    "apply much": lambda machine, _: machine.apply(next_entry(machine, 1 << 20)),
    "update": lambda machine, _: machine.update_last_applied(LogId(machine.last_applied().index + 1, 1)),
    "persist": lambda machine, _: machine.persist_last_applied(LogId(machine.last_applied().index + 1, 1)),
    "metadata": persist_metadata,
    "flush": lambda machine, _: machine.flush(),
    "save": lambda machine, _: machine.save_hard_state(),
    "clear": lambda machine, _: machine.clear(),
    "compact": lambda machine, _: machine.compact(),
    "snapshot": lambda machine, path: machine.write_snapshot(path / "snapshot"),
    "checksum": lambda machine, _: machine.state_checksum(),
    "wait": wait_for_next,
    "install": lambda machine, path: machine.install_snapshot(None, path / "source", allow_older=True),
    "verify": lambda machine, _: machine.verify(),
    "stop": lambda machine, _: machine.stop(),
    "start": lambda machine, _: machine.start(),
    "close": lambda machine, _: machine.close(),
    "get": lambda machine, _: machine.get(b"key-1"),
    "items": lambda machine, _: list(machine.items()),
    "stats": lambda machine, _: machine.stats(),
}
WRITERS = [
    name for name in METHODS
    if name not in ("start", "get", "items", "stats", "flush", "save", "snapshot", "checksum", "close")
]


def fill(machine: FastStateMachine, path: Path) -> None:
    """Apply some entries, and write a snapshot of them that can be installed."""
    if not (path / "source").exists():
        with FastStateMachine(path / "of the source") as source:
            source.apply([(index, 1, fastsm.put(b"key-%d" % (index % 5), b"s")) for index in range(1, 31)])
            source.write_snapshot(path / "source")
    machine.apply([(index, 1, fastsm.put(b"key-%d" % (index % 5), b"v" * 50)) for index in range(1, 21)])


def attempt(method: Method, machine: FastStateMachine, path: Path) -> FastsmError | None:
    """Call a method; an error has to be a typed one."""
    try:
        method(machine, path)
    except FastsmError as error:
        return error
    return None


def reopened(machine: FastStateMachine) -> tuple[LogId, dict[bytes, bytes]]:
    with FastStateMachine(machine.path, verify_on_open="full") as again:
        inside(again).check()
        return again.last_applied(), dict(again.items())


def acts_for(thread: int, machine: FastStateMachine) -> bool:
    """Return whether the calling thread is this one, or takes the step to the next generation on its behalf."""
    if threading.get_ident() == thread:
        return True
    try:
        inside(machine).turns.check()
    except ReentryError:
        return True
    return False


def seams_of(outer: str, tmp_path: Path) -> list[tuple[str, int]]:
    """Return the system calls that a method makes on its own thread: the first and the last of each kind."""
    disk = Disk()
    me, seen = threading.get_ident(), dict.fromkeys(SEAMS, 0)
    machine = FastStateMachine(tmp_path / "first look", retain_entries=0, auto_compact=False, _files=disk.files)
    fill(machine, tmp_path)

    def note(call: Call) -> None:
        if call.method in seen and acts_for(me, machine):
            seen[call.method] += 1

    disk.before = note
    METHODS[outer](machine, tmp_path)
    disk.before = None
    machine.close()
    return [(name, nth) for name, count in seen.items() for nth in sorted({1, count}) if count]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("sync", ["flush", "apply"])
@pytest.mark.parametrize("outer", ["apply much", "flush", "save", "clear", "compact", "snapshot", "install", "verify",
                                   "stop", "close"])
def test_each_method_on_top_of_each_other(outer: str, sync: str, tmp_path: Path) -> None:
    """Both calls give a typed error or the right result; close always ends, and disk and memory agree."""
    tried = 0
    for seam, nth in seams_of(outer, tmp_path):
        for inner in METHODS:
            tried += 1
            check_pair(outer, inner, sync, (seam, nth), tmp_path, tmp_path / f"state-{tried}")
    assert tried


def check_pair(outer: str, inner: str, sync: Any, at: tuple[str, int], tmp_path: Path, where: Path) -> None:
    disk = Disk()
    machine = FastStateMachine(where, retain_entries=0, auto_compact=False, sync=sync, _files=disk.files)
    fill(machine, tmp_path)
    me, left, came = threading.get_ident(), [at[1]], []

    def interrupt(call: Call) -> None:
        if call.method != at[0] or came or not acts_for(me, machine):
            return
        left[0] -= 1
        if left[0] == 0:
            came.append(True)
            before = machine.last_applied() if machine.is_running() else None
            error = attempt(METHODS[inner], machine, tmp_path)
            if isinstance(error, ReentryError):
                assert machine.last_applied() == before, "refused, but something changed"

    disk.before = interrupt
    said = f"{inner} within {outer} at {at}"
    attempt(METHODS[outer], machine, tmp_path)
    disk.before = None
    if "close" in (inner if came else "", outer):
        assert inside(machine).closed(), said
    last = None
    if not inside(machine).closed():
        machine.start()
        inside(machine).check()
        last = machine.last_applied(), dict(machine.items())
    machine.close()
    machine.close()
    found = reopened(machine)
    assert last in (None, found), said


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
@pytest.mark.parametrize("inner", METHODS)
@pytest.mark.parametrize("outer", ["apply", "clear", "close", "stop"])
def test_each_method_from_a_handler_while_a_call_waits_for_its_turn(outer: str, inner: str, tmp_path: Path) -> None:
    """Writers are refused, reads work, close closes, and the waiting call gets its turn or a typed error."""
    disk = Disk()
    machine = FastStateMachine(tmp_path / "state", auto_compact=False, _files=disk.files)
    fill(machine, tmp_path)
    machine.flush()  # so that what stop and close save first needs no turn
    gate = disk.hold("allocate")
    handling, errors = threading.Event(), []

    def handler(*_: object) -> None:
        handling.set()
        errors.append(attempt(METHODS[inner], machine, tmp_path))

    def interrupt() -> None:
        while inside(machine).turns.waiting_count == 0:
            handling.wait(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert handling.wait(PATIENCE)
        gate.open()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with in_thread(lambda: machine.apply(next_entry(machine, 1 << 20))) as other:
            gate.wait()
            with in_thread(interrupt) as interrupting:
                told = attempt(METHODS[outer], machine, tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (other.error, interrupting.error) == (None, None)
    if inner == "close":
        assert errors == [None]
        assert inside(machine).closed()
        assert isinstance(told, NotRunningError) or outer == "close"
    else:
        assert isinstance(errors[0], ReentryError) or inner not in WRITERS
        assert told is None or (outer == "apply" and isinstance(told, OrderError)), "the turn was not passed on"
    machine.close()
    reopened(machine)


class Calling:
    """Calls a function once: as an attachment, as an index, or when it is freed."""

    def __init__(self, function: Callable[[], object], *, at_the_end: bool = False) -> None:
        self.function = function
        self.calls, self.at_the_end = 1, at_the_end

    def __call__(self, *_: object) -> bytes:
        if self.calls:
            self.calls = 0
            self.function()
        return b"attached"

    def __index__(self) -> int:
        if not self.at_the_end:
            self()
        return 21

    def __del__(self) -> None:
        if self.at_the_end:
            self()


@pytest.mark.parametrize("what", ["attachment", "index", "finalizer"])
@pytest.mark.parametrize("name", METHODS)
def test_callbacks_and_finalizers_may_call_everything(name: str, what: str, tmp_path: Path) -> None:
    """Attachment functions, indexes with code, and finalizers get a typed error or the right result."""
    outcomes: list[FastsmError | None] = []
    call = Calling(lambda: outcomes.append(attempt(METHODS[name], machine, tmp_path)))
    machine = FastStateMachine(
        tmp_path / "state", auto_compact=False, snapshot_attachment=call if what == "attachment" else None)
    fill(machine, tmp_path)
    if what == "attachment":
        attempt(METHODS["snapshot"], machine, tmp_path)
    else:
        call.at_the_end = what == "finalizer"
        chunk: list[Any] = [(call, 1, fastsm.noop())]
        del call
        with suppress(TypeError):  # an index that is no int
            machine.apply(chunk)
        chunk.clear()
    if what != "index":
        assert len(outcomes) == 1
    assert not inside(machine).closed() or name == "close"
    machine.close()
    reopened(machine)


PROGRESS: dict[str, Callable[[FastStateMachine, Path, Any], object]] = {
    "snapshot": lambda machine, path, call: machine.write_snapshot(path / "snapshot", progress=call),
    "compact": lambda machine, path, call: machine.compact(progress=call),
    "install": lambda machine, path, call: machine.install_snapshot(None, path / "source", progress=call),
    "verify": lambda machine, path, call: machine.verify(call),
}


@pytest.mark.parametrize("outer", PROGRESS)
@pytest.mark.parametrize("inner", METHODS)
def test_progress_callbacks_may_call_everything(inner: str, outer: str, tmp_path: Path) -> None:
    """A progress callback may write, read, compact, reset and close, with a typed error or the right result."""
    outcomes: list[FastsmError | None] = []
    call = Calling(lambda: outcomes.append(attempt(METHODS[inner], machine, tmp_path)))
    machine = FastStateMachine(tmp_path / "state", auto_compact=False, retain_entries=0)
    fill(machine, tmp_path)
    attempt(lambda machine, path: PROGRESS[outer](machine, path, call), machine, tmp_path)
    assert len(outcomes) == 1
    assert inside(machine).closed() == (inner == "close")
    if inner != "close":
        machine.start()
        machine.apply(next_entry(machine))
        last = machine.last_applied(), dict(machine.items())
        machine.close()
        assert reopened(machine) == last
    machine.close()
    reopened(machine)


@pytest.mark.parametrize("outer", ["apply", "flush", "snapshot", "compact", "install", "clear", "close"])
@pytest.mark.parametrize("inner", ["apply", "clear", "compact", "checksum", "install", "wait", "stop", "close"])
def test_trace_functions_may_call_everything(inner: str, outer: str, tmp_path: Path) -> None:
    """A profiler runs between any two calls of a method; what it calls is refused, or works, and nothing hangs."""
    events = 0
    while True:  # at each call of Python code in turn, in strides
        seen = 0
        where = tmp_path / f"{outer}-{inner}-{events}"
        machine = FastStateMachine(where, auto_compact=False, retain_entries=0)
        fill(machine, tmp_path)

        def traced(frame: Any, event: str, _: object, machine: FastStateMachine = machine, at: int = events) -> None:
            nonlocal seen
            if event == "call" and "/fastsm/" in frame.f_code.co_filename:
                seen += 1
                if seen - 1 == at:
                    sys.setprofile(None)
                    attempt(METHODS[inner], machine, tmp_path)

        sys.setprofile(traced)
        try:
            attempt(METHODS[outer], machine, tmp_path)
        finally:
            sys.setprofile(None)
        if "close" in (outer, inner) and seen > events:
            assert inside(machine).closed()
        if not inside(machine).closed():
            machine.start()
            inside(machine).check()
        machine.close()
        machine.close()
        reopened(machine)
        if seen <= events:
            return
        events += 13


def closing(machine: FastStateMachine, seam: str, nth: int) -> Callable[[Call], None]:
    """Close a machine twice, on top of the n-th system call of a kind on this thread."""
    me, left = threading.get_ident(), nth

    def interrupt(call: Call) -> None:
        nonlocal left
        if call.method == seam and acts_for(me, machine):
            left -= 1
            if left == 0:
                machine.close()
                machine.close()

    return interrupt


@pytest.mark.parametrize("busy", ["apply much", "flush", "compact"])
def test_close_from_a_handler_frees_everything_whatever_is_under_way(busy: str, tmp_path: Path) -> None:
    """Files, lock and memory are freed at each interrupted system call, even if the handler closes twice."""
    for seam, nth in seams_of(busy, tmp_path):
        disk = Disk()
        machine = FastStateMachine(
            tmp_path / f"{seam}-{nth}", retain_entries=0, auto_compact=False, _files=disk.files)
        fill(machine, tmp_path)
        disk.before = closing(machine, seam, nth)
        attempt(METHODS[busy], machine, tmp_path)
        disk.before = None
        assert inside(machine).closed()
        open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                      if os.path.exists(f"/proc/self/fd/{fd}")]  # fmt: skip
        assert not [name for name in open_files if name.startswith(machine.path)]
        with open("/proc/self/maps", encoding="ascii") as maps:
            assert machine.path not in maps.read()
        reopened(machine)


# ---- forks and threads that cannot be started ---------------------------------------------------------------


@pytest.mark.parametrize("held", ["allocate", "sync"])
def test_every_call_of_a_forked_child_is_refused_whatever_threads_of_its_parent_did(
    held: str, tmp_path: Path
) -> None:
    """The child's copies of turn and sync belong to threads that do not exist there, and it never waits for them."""
    disk = Disk()
    machine = FastStateMachine(tmp_path / "state", auto_compact=False, _files=disk.files)
    fill(machine, tmp_path)
    gate = disk.hold(held)
    busy = METHODS["apply much" if held == "allocate" else "flush"]
    with in_thread(lambda: busy(machine, tmp_path)):
        gate.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            errors = {name: attempt(method, machine, tmp_path) for name, method in METHODS.items() if name != "close"}
            machine.close()
            os._exit(sum(not isinstance(error, NotRunningError) for error in errors.values()))
        assert os.waitpid(child, 0)[1] == 0
        gate.open()
    machine.close()


@pytest.mark.parametrize("nth", range(1, 10))
def test_a_thread_that_cannot_be_started_fails_one_call_and_nothing_else(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, the call is a StorageError (EAGAIN), or works without it; later calls work."""
    starts = 0
    start_new_thread = fastsm.background.start_new_thread  # type: ignore[attr-defined]

    def start(*arguments: Any) -> int:
        nonlocal starts
        starts += 1
        if starts == nth:
            raise RuntimeError("can't start new thread")
        started: int = start_new_thread(*arguments)
        return started

    fill_source = FastStateMachine(tmp_path / "state")
    fill(fill_source, tmp_path)
    fill_source.close()
    monkeypatch.setattr(fastsm.background, "start_new_thread", start)
    machine = FastStateMachine(tmp_path / "state", auto_compact=False)
    failed = 0

    async def told_of_next(machine: FastStateMachine) -> None:
        index = machine.last_applied().index
        task = asyncio.ensure_future(machine.wait_applied_async(index + 1))
        await asyncio.sleep(0)
        if task.done():
            return await task  # it failed: nothing is waited for any more
        machine.apply(next_entry(machine))
        return await task

    async def main() -> None:
        nonlocal failed
        calls: list[Callable[[], Any]] = [
            lambda: machine.apply_chunk(next_entry(machine, 1 << 20)),
            machine.flush_async,
            lambda: machine.generate_snapshot_data(tmp_path / "snapshot", None),
            machine.state_checksum_async,
            machine.compact_async,
            lambda: told_of_next(machine),
            machine.reset,
        ]
        for call in calls:
            before = machine.last_applied(), machine.durable()
            error = None
            try:
                await call()
            except StorageError as raised:
                error = raised
            if error is not None:
                failed += 1
                assert error.errno == errno.EAGAIN
                assert (machine.last_applied(), machine.durable()) == before
                await call()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert failed <= 1
    assert starts >= 4
    machine.close()
    assert reopened(machine)[0] == LogId(0, 0)


# ---- closes and imports ---------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["thread", "coroutine"])
def test_two_jobs_whose_callbacks_close_do_not_wait_for_each_other(tmp_path: Path, second: str) -> None:
    """A callback's close waits for the other job, unless that one closes too: both end, and so does the machine."""
    machine = FastStateMachine(tmp_path / "state", retain_entries=0)
    fill(machine, tmp_path)
    both = threading.Barrier(2)
    met: set[int] = set()

    def close(*_: object) -> None:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            both.wait(PATIENCE)
        machine.close()

    def snapshot() -> None:
        if second == "thread":
            machine.write_snapshot(tmp_path / "target", progress=close)
        else:
            asyncio.run(machine.generate_snapshot_data(tmp_path / "target", progress=close))

    with in_thread(lambda: machine.compact(progress=close)) as first, in_thread(snapshot) as other:
        pass
    for outcome in (first, other):
        assert isinstance(outcome.error, (FastsmError, type(None))), outcome.error
    assert not machine.is_running()
    assert reopened(machine)[0] == LogId(20, 1)


HALF_IMPORTED = """
    import faulthandler, importlib.abc, sys
    import fastsm

    faulthandler.dump_traceback_later(60, exit=True)
    machine = fastsm.FastStateMachine(sys.argv[1])
    machine.apply([(index, 1, fastsm.put(b"%d" % index, b"v")) for index in range(1, 10)])
    calls = {"items": lambda: len(list(machine.items())), "keys": lambda: len(list(machine.keys())),
             "live_records": lambda: len(list(machine.live_records())), "scan": lambda: len(machine.scan(b"", None)[0]),
             "columns": lambda: machine.columns(), "get_columns": lambda: machine.get_columns([b"1"]),
             "entry_terms": lambda: machine.entry_terms([1, 2]),
             "snapshot": lambda: machine.write_snapshot(sys.argv[1] + "-snapshot", compress="zstd")}
    found = {}

    class Handler(importlib.abc.MetaPathFinder):
        # Runs during the import, as a signal handler would.
        def find_spec(self, name, path, target=None):
            if name in ("numpy.linalg", "numpy.lib", "numpy.random", "zstandard.backend_c") and not found:
                for method, call in calls.items():
                    try:
                        found[method] = call()
                    except fastsm.ReentryError as error:
                        found[method] = "refused"
            return None

    sys.meta_path.insert(0, Handler())
    assert "numpy" not in sys.modules
    if sys.argv[2] == "numpy":
        machine.columns()
        refused = {"columns", "get_columns", "entry_terms"}
    else:
        machine.write_snapshot(sys.argv[1] + "-snapshot", compress="zstd")
        refused = {"snapshot"}
    assert {name for name, what in found.items() if isinstance(what, str)} == refused, found
    for method, call in calls.items():
        again = call()
        assert not isinstance(again, int) or found[method] == again
    machine.close()
    print("fine")
"""


@pytest.mark.parametrize("module", ["numpy", "zstandard"])
def test_a_call_in_the_middle_of_an_import_is_right_or_refused(tmp_path: Path, module: str) -> None:
    """A handler that needs a library that its own thread is importing gets a ReentryError, and no half-made module."""
    pytest.importorskip(module)
    command = [sys.executable, "-c", textwrap.dedent(HALF_IMPORTED), str(tmp_path / "state"), module]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "fine"), ended.stderr

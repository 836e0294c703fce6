"""A deterministic explorer of schedules: stop an operation at a seam, run another one there, continue, and check.

A *seam* is a place within an operation where another thread may run: before each call of the seam to the system
(`Directory`), before each Python function that the package calls (where the interpreter may switch threads, even within
compiled code), and before each call from the package's Python code into its compiled code. A profile function of the
operation's thread counts them, so that a seam's number means the same place in every run, and nothing special needs to
be compiled.

At its seam the operation's thread starts the next operation on another thread, and continues when that one is over or,
as the system's state of its threads shows, blocked. A blocked operation continues when the first one releases it.
Nothing sleeps to hit a moment.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import fastsm
from fastsm.disk.files import Directory
from support.faulty import memory_directory

PACKAGE = str(Path(fastsm.__file__).resolve().parent)
SHARING = tuple(f"{PACKAGE}/{name}" for name in ("core/", "machine.py", "disk/files.py", "generation/current.py"))
FILES = f"{PACKAGE}/disk/files.py"
CALLS = frozenset({  # of the seam to the system
    "allocate", "close_file", "create_file", "lock", "open_file", "read_file", "rename", "sync_directory", "sync_now",
    "told", "truncate", "unlink", "write",
})  # fmt: skip
PATIENCE = 20  # seconds after which threads count as deadlocked
GLANCE = 0.001


class Deadlock(Exception):
    """Operations wait for one another, and the process cannot continue."""


class Outcome:
    """The outcome of an operation: its ``value``, or the ``error`` that it raised."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def __repr__(self) -> str:
        return repr(self.value) if self.error is None else f"{type(self.error).__name__}: {str(self.error)[:150]}"


class Step(NamedTuple):
    """An operation, and the number of its seam at which the next one runs."""

    run: Callable[[], Any]
    seam: int | None


# ---- the seams -------------------------------------------------------------------------------------------

class Watched(Directory):
    """The seam to the system as Python methods, so that each call is a seam of the operation."""

    def sync_now(self, fd: Any) -> None:
        Directory.sync(fd)

    def sync(self, fd: Any) -> None:  # type: ignore[override]
        self.sync_now(fd)

    def told(self) -> None:
        """A seam between the system's report of an error and its handling by the caller."""

    def write(self, fd: Any, data: Any, offset: int) -> None:  # type: ignore[override]
        Directory.write(fd, data, offset)

    def truncate(self, fd: Any, size: int) -> None:  # type: ignore[override]
        Directory.truncate(fd, size)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)

    def start_writeback(self, fd: Any, offset: int, size: int) -> None:  # type: ignore[override]
        """Do nothing, because the files are in memory."""

    def pace_writeback(self, fd: Any, first: int, stop: int) -> None:  # type: ignore[override]
        """Do nothing, because the files are in memory."""


class TellsOnce(Watched):
    """A disk on which the first sync of a file after arming fails, and later syncs do not report the error again."""

    armed: ClassVar[bool] = False

    def sync_now(self, fd: Any) -> None:
        if TellsOnce.armed:
            TellsOnce.armed = False
            self.told()
            raise OSError(5, "I/O error")


@contextmanager
def quiet_directory() -> Iterator[Path]:
    """Make a directory in memory, and silence the log, because schedules cause thousands of errors."""
    logging.disable(logging.CRITICAL)
    try:
        with memory_directory() as root:
            yield root
    finally:
        logging.disable(logging.NOTSET)


IsSeam = Callable[[FrameType, str, Any], bool]


def between_pieces() -> None:
    """A seam between two pieces of work whose tick this is."""


def is_seam(frame: FrameType, event: str, arg: Any) -> bool:
    if event == "call":
        return is_watched(frame.f_code.co_filename, True)
    if event == "c_call":  # the next seam comes after its return
        return is_watched(frame.f_code.co_filename, False) and is_ours(type(getattr(arg, "__self__", None)))
    return False


def is_file_seam(frame: FrameType, event: str, arg: Any) -> bool:
    """Return whether this is a call of the seam to the system; in compiled code there are no other seams."""
    return event == "call" and frame.f_code.co_filename in (FILES, __file__) and frame.f_code.co_name in CALLS


@cache
def is_watched(filename: str, called: bool) -> bool:
    """Return whether code of this file shares state with other threads: the machine's code and the seam to the system.

    Code that only works on its own values (formats, a snapshot's parts) adds no interleavings. With ``called``, named
    tuples and the seam itself count as well, because compiled code calls them.
    """
    return filename.startswith(SHARING) or (called and filename in ("<string>", __file__))


@cache
def is_ours(kind: type) -> bool:
    return any(parent.__module__.startswith("fastsm") for parent in kind.__mro__)


class Counter:
    """The profile function of an operation's thread, which stops at one seam, once."""

    def __init__(self, seam: int | None, stop: Callable[[], None], is_seam: IsSeam = is_seam) -> None:
        self.seen = 0
        self.place = ""
        self._seam = seam
        self._stop = stop
        self._is_seam = is_seam

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if not self._is_seam(frame, event, arg):
            return
        self.seen += 1
        if self.seen - 1 == self._seam:
            sys.setprofile(None)  # no seams are counted any more
            called = frame.f_code.co_name if event == "call" else f"{event} {getattr(arg, '__name__', arg)}"
            name = os.path.relpath(frame.f_code.co_filename, PACKAGE)
            self.place = f"{name}:{frame.f_lineno} {called}"
            self._stop()


# ---- one schedule ----------------------------------------------------------------------------------------

class Schedule:
    """Runs operations, each at a seam of the one before. ``outcomes`` are in their order, ``seams`` the first one's."""

    def __init__(self, steps: Sequence[Step], is_seam: IsSeam = is_seam) -> None:
        self.steps = steps
        self.is_seam = is_seam
        self.outcomes = [Outcome() for _ in steps]
        self.counters: list[Counter | None] = [None] * len(steps)
        self.started = [False] * len(steps)
        self._over = [threading.Event() for _ in steps]
        self._threads: list[threading.Thread] = []

    @property
    def seams(self) -> int:
        counter = self.counters[0]
        return 0 if counter is None else counter.seen

    @property
    def place(self) -> str:
        return "; ".join(counter.place for counter in self.counters if counter is not None and counter.place)

    def run(self) -> Schedule:
        """Run the operations to their end. Those whose seam never came do not run; see ``started``."""
        gc.disable()  # a collection would close files, and so count seams, at random places
        self._start(0)
        for thread in self._threads:  # the list grows only while one of its threads runs
            thread.join(PATIENCE)
            if thread.is_alive():
                raise Deadlock(f"{self.place}: {self.outcomes}")
        gc.enable()
        return self

    def _start(self, number: int) -> None:
        self.started[number] = True
        thread = threading.Thread(target=self._work, args=(number,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, number: int) -> None:
        step, outcome = self.steps[number], self.outcomes[number]
        counter = Counter(step.seam, lambda: self._run_next(number + 1), self.is_seam)
        self.counters[number] = counter
        if step.seam is not None:
            sys.setprofile(counter)
        try:
            outcome.value = step.run()
        except BaseException as error:
            outcome.error = error
        finally:
            sys.setprofile(None)
            self._over[number].set()

    def _run_next(self, number: int) -> None:
        """Run the next operation at a seam, to its end or until all other threads are blocked."""
        if number == len(self.steps):
            return
        self._start(number)
        over = self._over[number]
        waiting = {str(thread.native_id) for thread in self._threads[:number]}  # this and earlier threads
        before: list[str] | None = None
        while not over.wait(GLANCE):
            now = asleep(waiting)
            if now is not None and now == before:
                return
            before = now


def asleep(waiting: set[str]) -> list[str] | None:
    """Return how often each thread not waiting at a seam went to sleep; None if one of them is running.

    Two equal answers, with the GIL released by this thread in between, mean that all others are blocked.
    """
    counts = []
    for task in os.listdir("/proc/self/task"):
        if task in waiting:
            continue
        try:
            with open(f"/proc/self/task/{task}/status", encoding="ascii") as status:
                lines = status.read()
        except OSError:
            continue
        if "\nState:\tS" not in lines:
            return None
        counts.append(task + lines[lines.index("voluntary_ctxt_switches:"):].split("\n", 1)[0])
    return counts

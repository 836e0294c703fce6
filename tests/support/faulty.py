"""Stand-ins for the seam to the system: they record calls, hold them back, and let chosen ones fail."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastsm import StorageError
from fastsm.disk import headers
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory

PATIENCE = 60  # seconds until a test that waits for another thread gives up


class Call(NamedTuple):
    """One call of the seam: its method and its arguments, bytes copied."""

    method: str
    arguments: tuple[Any, ...]


class Rule:
    """Lets the calls number ``first`` to ``last`` of a method (None: of all) fail, counted from when it was made."""

    def __init__(self, method: str | None, code: int, first: int, last: float, *, done: bool) -> None:
        self.method = method
        self.code = code
        self.first = first
        self.last = last
        self.done = done
        self.seen = 0
        self.struck = 0


class Gate:
    """Holds one call of a method back until it is opened."""

    def __init__(self, method: str) -> None:
        self.method = method
        self._entered = threading.Event()
        self._opened = threading.Event()

    def wait(self) -> None:
        """Waits until the call has come."""
        assert self._entered.wait(PATIENCE), f"{self.method} was not called"

    def open(self) -> None:
        """Lets the call go on."""
        self._opened.set()

    def pass_through(self) -> None:
        self._entered.set()
        assert self._opened.wait(PATIENCE), f"{self.method} was held back for too long"


class Disk:
    """Watches over the directories of the class ``files``, to be given as ``_files``.

    ``calls`` lists what was called, in order. ``stores=False`` is a file system on which stores through a
    mapping are not safe, so that every frame is written with pwrite.
    """

    def __init__(self, *, stores: bool | None = None) -> None:
        self.calls: list[Call] = []
        self.rules: list[Rule] = []
        self.gates: list[Gate] = []
        self.before: Callable[[Call], object] | None = None  # is told of each call
        self._lock = threading.Lock()
        self.files = _class_of(self, stores)

    def fail(
        self, method: str | None, code: int = errno.EIO, *, nth: int = 1, times: float = 1, done: bool = False
    ) -> Rule:
        """The ``nth`` call from now on fails, and those after it, ``times`` in all.

        ``done`` says that the system did what it was asked to and fails nevertheless.
        """
        rule = Rule(method, code, nth, nth + times - 1, done=done)
        self.rules.append(rule)
        return rule

    def hold(self, method: str) -> Gate:
        """The next call waits until the gate is opened."""
        gate = Gate(method)
        self.gates.append(gate)
        return gate

    def count(self, method: str) -> int:
        """How often a method was called."""
        return sum(call.method == method for call in self.calls)

    def forget(self) -> None:
        """Forgets the calls so far, and all rules."""
        self.calls.clear()
        self.rules.clear()

    def run(
        self, method: str, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        copied = tuple(bytes(a) if isinstance(a, (bytearray, memoryview)) else a for a in map(_plain, arguments))
        with self._lock:
            self.calls.append(Call(method, copied))
            gate = next((gate for gate in self.gates if gate.method == method), None)
            if gate:
                self.gates.remove(gate)
            failing = None
            for rule in self.rules:
                if rule.method in (None, method):
                    rule.seen += 1
                    if rule.first <= rule.seen <= rule.last:
                        rule.struck += 1
                        failing = rule
        if gate:
            gate.pass_through()
        if self.before:
            self.before(self.calls[-1])
        if failing is None:
            return function(*arguments, **options)
        if failing.done:
            function(*arguments, **options)
        raise OSError(failing.code, os.strerror(failing.code))


def _plain(argument: Any) -> Any:
    """A buffer of whatever kind as a memoryview, anything else as it is."""
    if isinstance(argument, (int, str, bytes, Descriptor)):
        return argument
    return memoryview(argument)


def _class_of(disk: Disk, stores: bool | None) -> type[Directory]:
    class WatchedDirectory(Directory):
        def stores_are_safe(self, fd: int) -> bool:
            return super().stores_are_safe(fd) if stores is None else stores

    def watched(name: str) -> Callable[..., Any]:
        static = isinstance(Directory.__dict__[name], staticmethod)

        def method(self: Directory, *arguments: Any, **options: Any) -> Any:
            function = getattr(Directory, name)
            return disk.run(name, function if static else function.__get__(self), arguments, options)

        return method

    for name in (
        "sync", "write", "pace_writeback", "truncate", "allocate", "rename", "replace_file", "sync_directory",
        "open_file", "create_file", "close_file", "read_file", "unlink", "size", "names", "lock_file", "is_named",
    ):
        setattr(WatchedDirectory, name, watched(name))
    return WatchedDirectory


class PortableDirectory(Directory):
    """A directory on a file system where every frame has to be written with pwrite."""

    def stores_are_safe(self, fd: int) -> bool:
        return False


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A temporary directory, in memory where the system has such: for tests of thousands of openings."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


def crash_copy(source: Path, target: Path) -> Path:
    """What a killed process leaves of its directory: all that it wrote, since the page cache lives on."""
    shutil.copytree(source, target)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    """The files that make up a state, byte for byte. LOCK is not one of them: it names whoever tried."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name not in ("LOCK", "PUBLISHED") and path.is_file() and not path.is_symlink()
    }


def frames_of(log: Path) -> list[tuple[int, int]]:
    """Where each frame starts and ends."""
    data = log.read_bytes()
    frames = []
    offset = headers.LOG_HEADER_BYTES
    while offset + 16 <= len(data):
        checksum, length = struct.unpack_from("<QQ", data, offset)
        if not (checksum or length):
            break
        frames.append((offset, offset + length))
        offset += length
    return frames


@contextmanager
def in_thread(function: Callable[[], Any]) -> Iterator[Outcome]:
    """Runs ``function`` on a thread of its own, next to the block; the block's end waits for it."""
    outcome = Outcome(function)
    outcome.thread.start()
    try:
        yield outcome
    finally:
        outcome.thread.join(PATIENCE)
        assert not outcome.thread.is_alive(), "the thread does not end"


class Outcome:
    """What a function on a thread came to: ``value``, or the ``error`` that it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self._function = function
        self.thread = threading.Thread(target=self._run)

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:
            self.error = error


def error_of(call: Callable[[], Any]) -> StorageError | None:
    """The StorageError that a call raises, or None."""
    try:
        call()
    except StorageError as error:
        return error
    return None

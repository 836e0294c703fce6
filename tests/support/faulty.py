"""Stand-ins for the seam to the system: they record calls, block them, and let chosen ones fail."""

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
    """Lets calls ``first`` to ``last`` of a method (None: of any) fail, counted from the creation of the rule."""

    def __init__(self, method: str | None, code: int, first: int, last: float, *, done: bool) -> None:
        self.method = method
        self.code = code
        self.first = first
        self.last = last
        self.done = done
        self.seen = 0
        self.struck = 0


class Gate:
    """Blocks one call of a method until the gate is opened."""

    def __init__(self, method: str) -> None:
        self.method = method
        self._entered = threading.Event()
        self._opened = threading.Event()

    def wait(self) -> None:
        """Wait until the method is called."""
        assert self._entered.wait(PATIENCE), f"{self.method} was not called"

    def open(self) -> None:
        """Let the call continue."""
        self._opened.set()

    def pass_through(self) -> None:
        self._entered.set()
        assert self._opened.wait(PATIENCE), f"{self.method} was held back for too long"


class Disk:
    """Watches directories of the class ``files``, which is passed as ``_files``.

    ``calls`` lists the calls in order. ``stores=False`` stands for a file system on which stores through a
    mapping are not safe, so that every frame is written with pwrite.
    """

    def __init__(self, *, stores: bool | None = None) -> None:
        self.calls: list[Call] = []
        self.rules: list[Rule] = []
        self.gates: list[Gate] = []
        self.before: Callable[[Call], object] | None = None  # is called with each call
        self._lock = threading.Lock()
        self.files = _class_of(self, stores)

    def fail(
        self, method: str | None, code: int = errno.EIO, *, nth: int = 1, times: float = 1, done: bool = False
    ) -> Rule:
        """Let the ``nth`` call from now on fail, and the next ones, ``times`` calls in all.

        With ``done`` the call takes effect and fails nevertheless.
        """
        rule = Rule(method, code, nth, nth + times - 1, done=done)
        self.rules.append(rule)
        return rule

    def hold(self, method: str) -> Gate:
        """Let the next call of a method wait until the returned gate is opened."""
        gate = Gate(method)
        self.gates.append(gate)
        return gate

    def count(self, method: str) -> int:
        """Return how often a method was called."""
        return sum(call.method == method for call in self.calls)

    def forget(self) -> None:
        """Forget the calls so far, and all rules."""
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
    """Return any kind of buffer as a memoryview, anything else unchanged."""
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
    """A directory on a file system where every frame must be written with pwrite."""

    def stores_are_safe(self, fd: int) -> bool:
        return False


@contextmanager
def memory_directory() -> Iterator[Path]:
    """Make a temporary directory, in memory if the system allows it: for tests that open thousands of states."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


def crash_copy(source: Path, target: Path) -> Path:
    """Copy a directory as a killed process would leave it: everything that it wrote, since the page cache survives."""
    shutil.copytree(source, target)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of a state's files. LOCK is not one of them: it changes with each attempt to open."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name not in ("LOCK", "PUBLISHED") and path.is_file() and not path.is_symlink()
    }


def frames_of(log: Path) -> list[tuple[int, int]]:
    """Return the start and the end of each frame."""
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
    """Run ``function`` on another thread during the block; the end of the block waits for it."""
    outcome = Outcome(function)
    outcome.thread.start()
    try:
        yield outcome
    finally:
        outcome.thread.join(PATIENCE)
        assert not outcome.thread.is_alive(), "the thread does not end"


class Outcome:
    """The outcome of a function on a thread: its ``value``, or the ``error`` that it raised."""

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

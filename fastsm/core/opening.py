"""Opening a machine: its options, its directory, and opening and closing it off the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeVar

from fastsm.arguments import at_least_zero, bytes_of
from fastsm.background import start
from fastsm.core.moving import move
from fastsm.core.snapshots import Attachment
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.published import Published, Publisher, may_have_readers
from fastsm.errors import FastsmError, StorageError
from fastsm.event_loops import call
from fastsm.generation import current
from fastsm.snapshot.codec import require_compression
from fastsm.types import LogId

logger = logging.getLogger("fastsm")


def check_options(
    sync: str, verify_on_open: str, compress: str, attachment: Attachment, sizes: dict[str, float], lock_timeout: float,
    mode: int,
) -> None:  # fmt: skip
    """Raises ``ValueError`` or ``TypeError`` for invalid options of a machine."""
    if sync not in ("flush", "apply"):
        raise ValueError(f'sync={sync!r}: expected "flush" or "apply"')
    if verify_on_open not in ("full", "background", "off"):
        raise ValueError(f'verify_on_open={verify_on_open!r}: expected "full", "background" or "off"')
    require_compression(compress)
    if attachment is not None and not callable(attachment):
        bytes_of(attachment, "snapshot_attachment")
    for name, size in sizes.items():
        at_least_zero(name, size)
    at_least_zero("lock_timeout", lock_timeout, " seconds")
    if not isinstance(mode, int):
        raise TypeError(f"mode={mode!r}: expected permissions as an int, such as 0o700")
    if mode & 0o700 != 0o700 or mode & ~0o777:
        raise ValueError(f"mode={mode:#o}: expected permissions that let the owner in, such as 0o700 or 0o770")


def recover(
    directory: Directory, read_only: bool, expected: LogId | None, verify: bool, lock_timeout: float
) -> tuple[current.Generation, Publisher | None]:
    """Locks a directory unless it is opened read-only, and recovers its state; also returns its publisher."""
    if read_only:
        return current.open_read_only(directory, expected, verify), None
    with storage_errors(directory.path, "locking the directory"):
        directory.lock(lock_timeout)
    publisher = Publisher.open(directory)
    try:
        return recover_next_to_readers(directory, expected, verify, publisher.last()), publisher
    except BaseException:
        publisher.close()
        raise


def recover_next_to_readers(
    directory: Directory, expected: LogId | None, verify: bool, published: Published | None
) -> current.Generation:
    """Recovers the state without cutting a file that readers have mapped, which would kill them when they next read.

    ``published``: what the previous owner last told readers. A log that ends before that point lost bytes after a
    failed sync; what is left then continues in another generation.
    """
    if published is not None and not may_have_readers(published):
        published = None
    opened = current.open_current(directory, expected, verify, published)
    if published is None or opened.log.head.identity != published.identity or opened.log.end >= published.end:
        return opened
    return move(directory, opened)


class Closes(Protocol):
    """A machine that :class:`Opening` can open, and close."""

    def close(self) -> None: ...


M = TypeVar("M", bound=Closes)


class Opening(Generic[M]):
    """A machine that is opened on a thread of its own when this object is awaited or entered; for one use.

    As an async context manager, it also closes the machine at the end, off the event loop. If the wait is cancelled,
    the machine is closed as soon as it is open, so that the directory does not stay locked.
    """

    __slots__ = ("_begun", "_machine", "_open")

    def __init__(self, open_machine: Callable[[], M]) -> None:
        self._open = open_machine
        self._begun = False
        self._machine: M | None = None

    def __await__(self) -> Generator[Any, None, M]:
        return self._opened().__await__()

    async def _opened(self) -> M:
        if self._begun:
            raise RuntimeError("this machine was opened already: call open_async() again")
        self._begun = True
        machine: M | None = None
        wanted = True

        def open_it() -> M:
            nonlocal machine
            machine = self._open()
            if not wanted:
                machine.close()
            return machine

        future, _ = call(open_it)
        try:
            return await future
        except BaseException:
            wanted = False  # first: the thread sees this, or has set `machine` already
            if machine is not None:
                close_unwanted(machine)
            raise

    async def __aenter__(self) -> M:
        self._machine = await self
        return self._machine

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._machine is not None
        await close_off_loop(self._machine)


async def close_off_loop(machine: Closes) -> None:
    """Closes a machine on a thread of its own, or on the event loop if no thread can be started."""
    try:
        future, _ = call(machine.close)
    except StorageError:
        machine.close()
        return
    await future


def close_unwanted(machine: Closes) -> None:
    """Closes a machine that no caller waits for any more, on a thread of its own if one can be started."""

    def close() -> None:
        try:
            machine.close()
        except FastsmError as error:
            logger.warning("a machine whose opening was cancelled was closed with an error: %s", error)

    try:
        start(close)
    except StorageError:
        close()

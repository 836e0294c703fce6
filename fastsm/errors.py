"""Every error that fastsm raises, under one base class.

Messages say what was expected, what was found, where, and what to do. The same facts are attributes, so that programs
need not parse messages.
"""

from __future__ import annotations

import os
from typing import Any


class FastsmError(Exception):
    """Base of all errors of this library."""

    def __init__(self, *args: object) -> None:  # that of Exception is written in C, and has no signature
        super().__init__(*args)


class NotRunningError(FastsmError):
    """The state machine, log, watch or node of this call is stopped, closed, or a forked child's copy."""


class ReentryError(FastsmError, RuntimeError):
    """A signal handler, a finalizer or a callback tried to write while its own thread was in the middle of a write.

    Or it needed a module while its own thread was in the middle of importing it. Nothing was changed. Only ``close`` is
    never refused.
    """


class ReadOnlyError(FastsmError):
    """A write was attempted on a state machine that was opened with ``read_only=True``."""


class LockedError(FastsmError):
    """The directory is already open, in another process or in this one.

    ``path`` is the directory, ``pid`` the holder's process id (None if the lock file does not contain it).
    """

    def __init__(self, path: str, pid: int | None, since: str | None = None) -> None:
        self.path = path
        self.pid = pid
        self.since = since
        if pid == os.getpid():
            holder = "this process: close the object that has it open first"
        elif pid is None:
            holder = "another process, whose id is not in the lock file: close it there, or pass a lock_timeout to wait"
        else:
            held = f" (since {since})" if since else ""
            holder = f"process {pid}{held}: close it there, or pass a lock_timeout to wait"
        super().__init__(f"{path}: already open, by {holder}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.pid, self.since)


class OrderError(FastsmError, ValueError):
    """An entry is out of order: a gap, a step back, a falling term, or a term that contradicts the known one.

    ``index`` is the entry's index, if there is one.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        self.index = index
        super().__init__(message)


class CommandError(FastsmError, ValueError):
    """A command is malformed or too large. ``index`` names the entry, if there is one."""

    def __init__(self, message: str, *, index: int | None = None) -> None:
        self.index = index
        super().__init__(message)


class UnknownCommandError(CommandError):
    """A command has a kind or version that this release does not support."""


class ProcedureError(FastsmError):
    """A procedure could not run for a reason specific to this replica, or it used something that it must not use.

    ``index`` names the entry and ``name`` the procedure, if known; the cause is the original exception. Nothing of the
    chunk was applied.
    """

    def __init__(self, message: str, *, index: int | None = None, name: str | None = None) -> None:
        self.index = index
        self.name = name
        super().__init__(message)


class CompactedError(FastsmError):
    """What was requested no longer exists: it was compacted. ``oldest`` is the first index that still exists."""

    def __init__(self, message: str, *, oldest: int = 0) -> None:
        self.oldest = oldest
        super().__init__(message)


class ClockJumpError(FastsmError):
    """:class:`fastsm.Clock` refused to propose a tick that would move the clock of the state machine too far.

    ``now`` is this host's time, ``clock`` that of the state machine, ``deadline`` the earliest deadline,
    ``max_jump_ms`` the largest jump allowed; all in milliseconds.
    """

    def __init__(self, now: int, clock: int, deadline: int, max_jump_ms: int) -> None:
        self.now = now
        self.clock = clock
        self.deadline = deadline
        self.max_jump_ms = max_jump_ms
        super().__init__(
            f"this host's clock says {now} ms since 1970, {now - max(clock, deadline)} ms after the state machine's "
            f"clock ({clock}) and the earliest deadline ({deadline}); expected at most {max_jump_ms}. The clock of the "
            "state machine can never be set back, so set this host's clock right, or transfer leadership to a host "
            "whose clock is right. If the clock is right (the cluster was down for that long, or deadlines are in "
            "another unit than milliseconds), propose fastsm.tick(now) once, or give Clock a larger max_jump_ms"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.now, self.clock, self.deadline, self.max_jump_ms)


class CorruptionError(FastsmError):
    """Stored bytes are not those that were written. Nothing was cut or repaired.

    ``path`` and ``offset`` say where (offset None: the file as a whole), ``expected`` and ``found`` what.
    """

    def __init__(self, path: str, offset: int | None, expected: object, found: object, advice: str = "") -> None:
        self.path = path
        self.offset = offset
        self.expected = expected
        self.found = found
        self.advice = advice or "restore the directory from a snapshot or a replica"
        where = path if offset is None else f"{path}, offset {offset}"
        super().__init__(f"{where}: expected {expected}, found {found}; {self.advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.offset, self.expected, self.found, self.advice)


class FormatVersionError(FastsmError):
    """A file has a format version that this release does not read. Nothing was written.

    ``path``, ``expected`` (the version read here) and ``found`` have the details.
    """

    def __init__(self, path: str, expected: int, found: int) -> None:
        self.path = path
        self.expected = expected
        self.found = found
        super().__init__(
            f"{path}: format version {found}, this release reads version {expected}; "
            "open it with the release of fastsm that wrote it"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.expected, self.found)


class SnapshotError(FastsmError):
    """A snapshot could not be written, read or installed. The state machine's own state is unchanged."""


class SnapshotFormatError(SnapshotError):
    """The file is not a snapshot, or its parts contradict each other."""


class ChecksumMismatchError(SnapshotError):
    """The file's bytes do not match its checksum, or the metadata that came with it.

    Attributes: ``path``, and the checksums ``expected`` and ``found``.
    """

    def __init__(self, path: str, what: str, expected: bytes, found: bytes) -> None:
        self.path = path
        self.what = what
        self.expected = expected
        self.found = found
        super().__init__(
            f"{path}: expected {what} {expected.hex()}, found {found.hex()}; the file was damaged, or is another one: "
            "get it again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.what, self.expected, self.found)


class StaleSnapshotError(SnapshotError):
    """The snapshot is older than the existing one, or than the state.

    When installing: older than what is applied already; ``allow_older=True`` installs it anyway. When writing or
    receiving: a newer snapshot was put in place as ``snapshot.fsm`` in the meantime, and stays.
    """


class SnapshotRangeError(SnapshotError):
    """No snapshot can be exact as of this entry: it is before the base, not applied yet, or has another term."""


class StorageError(FastsmError, OSError):
    """The operating system failed to store or to read; ``errno`` and ``filename`` are from its error."""

    @classmethod
    def wrap(cls, cause: OSError, path: str, action: str) -> StorageError:
        """Returns ``cause`` as a ``StorageError``, with the path and what was being done."""
        return cls(cause.errno, f"{action} failed: {cause.strerror or cause}", path)

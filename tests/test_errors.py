"""Errors: one hierarchy, attributes for programs, and messages that say what was expected, found, where, what to do."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import (
    ChecksumMismatchError,
    CommandError,
    CorruptionError,
    Entry,
    FastsmError,
    FastStateMachine,
    FormatVersionError,
    LockedError,
    LogId,
    NotRunningError,
    OrderError,
    ReadOnlyError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotRangeError,
    StaleSnapshotError,
    StorageError,
    UnknownCommandError,
)
from support.faulty import Disk

Opener = Callable[..., FastStateMachine]

BASES = {
    NotRunningError: (FastsmError,),
    ReadOnlyError: (FastsmError,),
    LockedError: (FastsmError,),
    OrderError: (FastsmError, ValueError),
    CommandError: (FastsmError, ValueError),
    UnknownCommandError: (CommandError,),
    CorruptionError: (FastsmError,),
    FormatVersionError: (FastsmError,),
    StorageError: (FastsmError, OSError),
    SnapshotError: (FastsmError,),
    SnapshotFormatError: (SnapshotError,),
    ChecksumMismatchError: (SnapshotError,),
    StaleSnapshotError: (SnapshotError,),
    SnapshotRangeError: (SnapshotError,),
}


@pytest.mark.parametrize("error", BASES, ids=lambda error: error.__name__)
def test_every_error_is_public_and_has_its_bases(error: type[Exception]) -> None:
    """All errors have one base; those about arguments are also `ValueError`s, those of the system `OSError`s."""
    assert issubclass(error, FastsmError)
    assert error.__bases__ == BASES[error]
    assert getattr(fastsm, error.__name__) is error
    assert error.__name__ in fastsm.__all__
    assert error.__doc__


def test_no_error_is_missing_here() -> None:
    """Every error class of the package is public, and the list above has no others."""
    found = {value for value in vars(fastsm.errors).values() if isinstance(value, type)}
    errors = {value for value in found if issubclass(value, BaseException)}
    assert errors == {getattr(fastsm, error.__name__) for error in errors}
    assert set(BASES) | {FastsmError} <= errors


# Each case: the error, a function that provokes it, its attributes, and words that its message must contain.
Case = tuple[type[Exception], Callable[[Path], Any], dict[str, Any], list[str]]


def one_machine(use: Callable[[FastStateMachine], Any], **options: Any) -> Callable[[Path], Any]:
    """Return a function that opens a machine with entry 1 of term 2 applied, and uses it."""

    def provoke(directory: Path) -> None:
        with FastStateMachine(directory, **options) as machine:
            machine.apply([Entry(1, 2, fastsm.put(b"k", b"v"))])
            use(machine)

    return provoke


def damaged(damage: Callable[[Path], Any], **options: Any) -> Callable[[Path], Any]:
    """Return a function that closes a machine cleanly, damages its directory, and opens it."""

    def provoke(directory: Path) -> None:
        one_machine(lambda machine: None)(directory)
        damage(directory)
        FastStateMachine(directory, **options)

    return provoke


def overwrite(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[offset : offset + len(data)] = data
        (directory / name).write_bytes(content)

    return damage


def after_stop(machine: FastStateMachine) -> None:
    machine.stop()
    machine.get(b"k")


def after_close(machine: FastStateMachine) -> None:
    machine.close()
    machine.get(b"k")


def opened_twice(directory: Path) -> None:
    with FastStateMachine(directory):
        FastStateMachine(directory)


CASES: dict[str, Case] = {
    "use after stop": (NotRunningError, one_machine(after_stop), {}, ["stopped", "start()"]),
    "use after close": (NotRunningError, one_machine(after_close), {}, ["closed", "open the directory again"]),
    "the directory is open": (
        LockedError, opened_twice, {"pid": os.getpid(), "path": "{}"}, ["{}", "this process", "close"]),
    "a gap": (
        OrderError, one_machine(lambda m: m.apply([Entry(5, 2, b"")])), {"index": 5},
        ["entry 5", "expected entry 2", "index=1, term=2", "contiguous=False"]),
    "a falling term": (
        OrderError, one_machine(lambda m: m.apply([Entry(2, 1, b"")])), {"index": 2},
        ["entry 2", "term 1", "index=1, term=2", "never fall"]),
    "another term than known": (
        OrderError, one_machine(lambda m: m.apply([Entry(1, 3, b"")])), {"index": 1},
        ["entry 1", "term 2", "term 3", "log"]),
    "order within a chunk": (
        OrderError, one_machine(lambda m: m.apply([Entry(2, 2, fastsm.noop())] * 2)), {"index": 2},
        ["position 1", "index=2, term=2"]),
    "an index below zero": (
        OrderError, one_machine(lambda m: m.apply([Entry(-1, 2, b"")])), {}, ["index -1", "0 to 2**64 - 2"]),
    "last applied moved back": (
        OrderError, one_machine(lambda m: m.update_last_applied((0, 2))), {"index": 0},
        ["index=1, term=2", "index=0, term=2"]),
    "a malformed command": (
        CommandError, one_machine(lambda m: m.apply([Entry(2, 2, fastsm.put(b"k", b"v")[:-1])])), {"index": 2},
        ["entry 2", "9 bytes", "offset 0", "ends before", "fastsm.put"]),
    "bytes after a command": (
        CommandError, one_machine(lambda m: m.apply([Entry(2, 2, fastsm.noop() + b"x")])), {"index": 2},
        ["entry 2", "9 bytes", "left over"]),
    "a command of unknown kind": (
        UnknownCommandError, one_machine(lambda m: m.apply([Entry(2, 2, b"\0\xfe" + bytes(6))])), {"index": 2},
        ["entry 2", "kind 254", "supports kinds", "upgrade"]),
    "a command of unknown version": (
        UnknownCommandError, one_machine(lambda m: m.apply([Entry(2, 2, b"\x09" + bytes(7))])), {"index": 2},
        ["entry 2", "version 9", "supports version 0", "upgrade"]),
    "a flipped bit in the log": (
        CorruptionError, damaged(overwrite("log-1", 130, b"\xff")), {"path": "{}/log-1", "offset": 96},
        ["{}/log-1", "offset 96", "expected", "found", "checksum", "restore"]),
    "another magic": (
        CorruptionError, damaged(overwrite("log-1", 0, b"ELF")), {"path": "{}/log-1", "offset": 0},
        ["{}/log-1", "offset 0", "FASTSM-L", "ELFTSM-L"]),
    "a log that is gone": (
        CorruptionError, damaged(lambda d: (d / "log-1").unlink()), {"path": "{}/log-1", "offset": None},
        ["{}/log-1", "CURRENT", "no file"]),
    "less than expected": (
        CorruptionError, damaged(lambda d: None, expect_applied=(9, 9)), {"path": "{}/log-1"},
        ["index=9, term=9", "index=1, term=2", "expect_applied", "restore"]),
    "another history than expected": (
        CorruptionError, damaged(lambda d: None, expect_applied=(1, 1)), {"path": "{}/log-1"},
        ["entry 1", "term 1", "term 2", "another history"]),
    "a path that is a file": (
        StorageError, lambda d: (d.write_bytes(b""), FastStateMachine(d)), {"errno": errno.ENOTDIR, "filename": "{}"},
        ["{}", "opening the directory", "Not a directory"]),
    "a parent that is not there": (
        StorageError, lambda d: FastStateMachine(d / "in" / "vain"),
        {"errno": errno.ENOENT, "filename": "{}/in/vain"}, ["{}/in/vain", "No such file"]),
}


@pytest.mark.parametrize("name", CASES)
def test_message_says_what_was_expected_and_found_and_where(name: str, directory: Path) -> None:
    """Each error's attributes and message name the facts."""
    error, provoke, attributes, words = CASES[name]
    with pytest.raises(error) as caught:
        provoke(directory)
    assert type(caught.value) is error
    for attribute, value in attributes.items():
        expected = value.format(directory) if isinstance(value, str) else value
        assert getattr(caught.value, attribute) == expected
    message = str(caught.value)
    for word in words:
        assert word.format(directory) in message, message


def test_corruption_tells_expected_and_found_as_attributes(directory: Path) -> None:
    """A ``CorruptionError`` has path, offset, expected and found as attributes, and its message contains them."""
    with pytest.raises(CorruptionError) as caught:
        damaged(overwrite("CURRENT", 20, b"\xff"))(directory)
    error = caught.value
    assert (error.path, error.offset) == (str(directory / "CURRENT"), 56)
    assert str(error.expected) in str(error)
    assert str(error.found) in str(error)
    assert error.expected != error.found


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_storage_error_is_an_os_error_with_the_systems_errno(code: int, directory: Path) -> None:
    """The error has errno, strerror and filename, the system's own error as its cause, and says what failed."""
    disk = Disk()
    machine = FastStateMachine(directory, _files=disk.files)
    machine.apply([Entry(1, 1, fastsm.noop())])
    disk.fail("sync", code)
    with pytest.raises(OSError, match="syncing the log failed") as caught:
        machine.flush()
    assert isinstance(caught.value, StorageError)
    assert caught.value.errno == code
    assert os.strerror(code) in caught.value.strerror
    assert caught.value.filename == str(directory / "log-1")
    assert isinstance(caught.value.__cause__, OSError)
    assert not isinstance(caught.value.__cause__, StorageError)
    with pytest.raises(StorageError, match="close it and open the directory again") as caught:
        machine.apply([])
    assert (caught.value.errno, caught.value.filename) == (code, str(directory / "log-1"))
    with pytest.raises(StorageError):
        machine.close()


@pytest.mark.parametrize(
    "error",
    [
        OrderError("out of order", index=5),
        CommandError("malformed", index=6),
        UnknownCommandError("unknown", index=7),
        CorruptionError("/state/log-1", 64, "a frame", "zeros"),
        FormatVersionError("/state/log-1", 0, 3),
        LockedError("/state", 12, "2030-01-01T00:00:00+0000"),
        StorageError(errno.EIO, "syncing failed", "/state/log-1"),
        NotRunningError("stopped"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_sent_to_another_process(error: Exception) -> None:
    """A pickled error keeps its class, message and attributes, as a process pool needs."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_log_id_and_entry_are_tuples_with_names() -> None:
    """``LogId()`` is ``LogId(0, 0)``, and both types compare as tuples."""
    assert LogId() == LogId(0, 0) == (0, 0)
    assert LogId(2, 1) < LogId(3, 1)
    assert Entry(1, 2, b"c") == (1, 2, b"c")
    assert Entry(1, 2, b"c").command == b"c"

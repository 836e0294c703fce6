"""Generations: which base and log are the state, and the one atomic step from one generation to the next.

    CURRENT  ──►  base-1, log-1      the next base and log are written and synced next to these, then CURRENT is
                                     replaced, then the old ones are removed. A crash leaves one pair or the other.

Reset, compaction and installing a snapshot all take this step; they differ in the content of the next generation.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from dataclasses import dataclass

from fastsm.disk import headers
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.published import Published
from fastsm.errors import CorruptionError, FastsmError
from fastsm.generation.loaded_table import load_table
from fastsm.generation.log import Log, log_name
from fastsm.generation.names import CURRENT, NAMES, holds_raft_log, is_own, number_of, own_names
from fastsm.generation.saved_table import table_name
from fastsm.generation.unfinished import UNFINISHED, is_unfinished, remove_unfinished
from fastsm.generation.verification import Verification
from fastsm.lookup.index import Index
from fastsm.types import LogId, Recovery

READ_ATTEMPTS = 10
EMPTY_LOG_BYTES = headers.LOG_HEADER_BYTES

logger = logging.getLogger("fastsm")


@dataclass(frozen=True, slots=True)
class Generation:
    """A base, a log, and their index, as recovered by opening."""

    log: Log
    index: Index
    durable: LogId
    recovery: Recovery
    verified: bool


def open_current(
    directory: Directory, expect_applied: LogId | None, verify: bool, published: Published | None = None
) -> Generation:
    """Recovers the directory's state, or makes a new one in an empty directory. ``verify``: first checks every byte.

    ``published``: what readers were last told; a log that ends before that is not cut.
    """
    if not directory.unfinished:
        with storage_errors(directory.path, "removing what a restore or a load left"):
            remove_unfinished(directory)
    current = read_current(directory)
    if current is None:
        expected = expect_applied or LogId()
        if expected.index:
            # Raised before a state is made here, which would be in the way of the one to be restored.
            raise CorruptionError(
                directory.path_of(CURRENT), None, f"entries up to {expected} (expect_applied)", "no state",
                "acknowledged entries are lost: restore the directory from a snapshot or a replica")
        log = create_first(directory)
        current = current_of(log)
    else:
        log = Log.open(directory, current)
    try:
        opened = recover(log, current, expect_applied, verify, published)
        with storage_errors(directory.path, "opening"):
            # A process that replaced CURRENT may have been killed before this sync, so the replacement may not be
            # durable.
            directory.sync_directory()
        remove_others(directory, current.generation)
    except BaseException:
        log.close()
        raise
    return opened


def open_read_only(directory: Directory, expect_applied: LogId | None, verify: bool) -> Generation:
    """Returns the present state, next to an owner that may keep writing. Writes and locks nothing."""
    with storage_errors(directory.path, "looking for an unfinished restore"):
        if is_unfinished(directory):
            raise CorruptionError(
                directory.path_of(UNFINISHED), None, "a complete state", "a restore or a load that did not finish",
                "wait for it, or run it again")
    for attempt in range(READ_ATTEMPTS):
        current = read_current(directory)
        if current is None:
            raise CorruptionError(
                directory.path_of(CURRENT), None, "the file CURRENT of a state directory", "no file",
                "check the path; if the directory had a state, restore it from a snapshot or a replica")
        try:
            log = Log.open(directory, current, read_only=True)
        except CorruptionError:
            # The owner may have moved to a new generation after CURRENT was read.
            if attempt + 1 == READ_ATTEMPTS or read_current(directory) == current:
                raise
            continue
        try:
            return recover(log, current, expect_applied, verify)
        except BaseException:
            log.close()
            raise
    raise AssertionError("unreachable")


def recover(
    log: Log,
    current: headers.CurrentFile,
    expect_applied: LogId | None,
    verify: bool,
    published: Published | None = None,
) -> Generation:
    """Builds the index of a log and its base, from the saved table if it is valid, and the frames after it."""
    with storage_errors(log.directory.path_of(table_name(log.head.generation)), "reading the saved table"):
        loaded = load_table(log.directory, log)
    saved, read_to = None, EMPTY_LOG_BYTES
    if loaded is not None:
        index, saved = loaded
        read_to = saved.log_offset
    else:
        index = Index()
        if log.base is not None:
            index.read_base(log.mapping, log.base)
    start = LogId(index.terms.seen, index.terms.last_term(log.head.base_term))
    verified = loaded is None and log.base is None  # otherwise some bytes are not checked here
    verify = verify and not verified
    recovery = log.recover(
        index.terms, current, expect_applied, saved=saved, metadata=index.metadata,
        verify=(lambda: Verification(log).run()) if verify else None,
        not_below=published.end if published is not None and published.identity == log.head.identity else 0,
    )  # fmt: skip
    verified = verified or verify
    index.read_log(log.mapping, read_to, log.end)
    return Generation(log, index, log.last_durable(*start, read_to), recovery, verified)


def read_current(directory: Directory) -> headers.CurrentFile | None:
    """Returns the content of CURRENT, or None if it was never written."""
    path = directory.path_of(CURRENT)
    with storage_errors(path, "reading"):
        content = directory.read_file(CURRENT, 4096)
        if content is not None:
            return headers.unpack_current(content, path)
        # Without CURRENT there may only be the first log of an unfinished creation.
        first = log_name(first_number(directory))
        for name in own_names(directory):
            if not name.endswith(".tmp"):
                fd = directory.open_file(name, os.O_RDONLY)
                try:
                    size = directory.size(fd)
                finally:
                    directory.close_file(fd)
                if name != first or size > EMPTY_LOG_BYTES:
                    raise CorruptionError(path, None, f"CURRENT, since {name} holds {size} bytes", "no file")
    return None


def first_number(directory: Directory) -> int:
    """Returns the first generation of a new directory: 1, or the first whose file names are all unused or ours."""
    taken = {number_of(name) for name in directory.names() if NAMES.fullmatch(name) and not is_own(directory, name)}
    return next(number for number in itertools.count(1) if number not in taken)


def refuse_raft_log(directory: Directory) -> None:
    """Raises ``CorruptionError`` if the directory has files of a Raft log, so that no state is begun among them."""
    with storage_errors(directory.path, "listing"):
        if holds_raft_log(directory):
            raise CorruptionError(
                directory.path, None, "a directory of a state machine, or an empty one", "the files of a Raft log",
                "give state and log a directory each")


def create_first(directory: Directory) -> Log:
    refuse_raft_log(directory)
    with storage_errors(directory.path, "listing"):
        number = first_number(directory)
    log = Log.create(directory, number)
    try:
        with storage_errors(directory.path, "creating the directory's files"):
            directory.sync_parent()
            directory.sync_directory()
            write_current(directory, log)
    except BaseException:
        log.close()
        raise
    return log


def current_of(log: Log) -> headers.CurrentFile:
    if not log.last_frame:
        return headers.CurrentFile(log.head.generation, log.head.identity, log.end)
    return headers.CurrentFile(log.head.generation, log.head.identity, log.end, log.last_frame, log.chain)


def write_current(directory: Directory, log: Log) -> None:
    """Names ``log`` as the state, durable up to its present end. The log and its name must be synced."""
    with storage_errors(directory.path_of(CURRENT), "replacing"):
        directory.replace_file(CURRENT, headers.pack_current(current_of(log)))


def prepared_name(generation: int) -> str:
    return f"{CURRENT}-{generation}.tmp"


def prepare_next(directory: Directory, log: Log) -> None:
    """Does everything for the step to ``log`` (synced) that can be done ahead of the writer's turn.

    On return, the names of the log's files are durable, and the file that will replace CURRENT is next to it. That
    file records how far ``log`` is durable by now.
    """
    write_next(directory, log)
    with storage_errors(directory.path, "preparing a new generation"):
        directory.sync_directory()


def write_next(directory: Directory, log: Log) -> None:
    """Writes the file that will replace CURRENT, or rewrites it: ``log`` is durable up to its present end."""
    name = prepared_name(log.head.generation)
    with storage_errors(directory.path_of(name), "writing"):
        directory.write_file(name, headers.pack_current(current_of(log)))


def name_next(directory: Directory, old: Log, log: Log) -> None:
    """Makes CURRENT name ``log``, which is prepared and synced, instead of ``old``; durable on return.

    On an error before CURRENT is replaced, ``old`` remains the state, unchanged. After a later error it is unknown
    which of the two the disk names, so ``old`` is poisoned.
    """
    try:
        with storage_errors(directory.path_of(CURRENT), "replacing"):
            directory.rename(prepared_name(log.head.generation), CURRENT)
            directory.sync_directory()
    except BaseException as error:
        untouched = False
        try:
            untouched = still_current(directory, old)
        except FastsmError:
            pass  # then it is unknown; the first error is the one to raise
        finally:
            if not untouched:
                old.poison(error)
        raise


def discard(directory: Directory, log: Log | None, generation: int) -> None:
    """Closes and removes the prepared files of a generation that did not become the state."""
    if log is not None:
        log.close()
    with contextlib.suppress(FastsmError, OSError):  # what remains is removed by the next opening
        current = read_current(directory)
        if current is not None and current.generation != generation:
            remove_generation(directory, generation)


def still_current(directory: Directory, log: Log) -> bool:
    """Returns whether CURRENT, as the system shows it, still names this log."""
    current = read_current(directory)
    return current is not None and current.identity == log.head.identity


def remove_generation(directory: Directory, generation: int) -> None:
    """Removes the files of a generation that is no longer, or not yet, the state."""
    for name in list(own_names(directory, generation)):
        directory.unlink(name)


def is_known_own(directory: Directory, name: str) -> bool:
    """Returns whether this library made a file; an unreadable file does not count, and does not stop the opening."""
    try:
        return is_own(directory, name)
    except OSError as error:
        logger.warning("%s: not removed, since it cannot be read: %s", directory.path_of(name), error)
        return False


def remove_others(directory: Directory, generation: int) -> None:
    """Removes files of other generations that a crash may have left. Files not made by this library stay."""
    with storage_errors(directory.path, "listing"):
        names = [name for name in directory.names() if NAMES.fullmatch(name)]
    for name in names:
        if (name.endswith(".tmp") or number_of(name) != generation) and is_known_own(directory, name):
            with storage_errors(directory.path_of(name), "removing"):
                directory.unlink(name)
            logger.info("%s: removed, it belongs to another generation", directory.path_of(name))

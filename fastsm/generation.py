"""Generations: which log is the state, and the one atomic step from one to the next.

    CURRENT  ──►  log-1          reset: log-2 is written and synced, then CURRENT is replaced,
                                 then log-1 is removed. A crash leaves the one or the other.
"""

from __future__ import annotations

import logging
import re

from fastsm import format
from fastsm.errors import CorruptionError
from fastsm.files import Directory, storage_errors
from fastsm.log import Log, log_name
from fastsm.terms import Terms
from fastsm.types import LogId, Recovery

CURRENT = "CURRENT"
READ_ATTEMPTS = 10
EMPTY_LOG_BYTES = format.LOG_HEADER_BYTES
NAMES = re.compile(r"(log|base|table)-\d+|CURRENT\.tmp")

logger = logging.getLogger("fastsm")


def open_current(directory: Directory, expect_applied: LogId | None) -> tuple[Log, Terms, Recovery]:
    """The directory's log, recovered; a new one in an empty directory."""
    current = read_current(directory)
    if current is None:
        log = create_first(directory)
        current = format.CurrentFile(log.head.generation, log.head.identity, log.end)
    else:
        log = Log.open(directory, current)
    try:
        terms = Terms(log.head.base_index)
        recovery = log.recover(terms, current.durable_offset, expect_applied)
        with storage_errors(directory.path, "opening"):
            # Whoever replaced CURRENT may have been killed before this sync, without which it may still be undone.
            directory.sync_directory()
        remove_others(directory, current.generation)
    except BaseException:
        log.close()
        raise
    return log, terms, recovery


def open_read_only(directory: Directory, expect_applied: LogId | None) -> tuple[Log, Terms, Recovery]:
    """The state as it is now, beside an owner who may go on writing. Nothing is written, nothing is locked."""
    for attempt in range(READ_ATTEMPTS):
        current = read_current(directory)
        if current is None:
            raise CorruptionError(directory.path_of(CURRENT), None, "a state directory", "no file")
        try:
            log = Log.open(directory, current, read_only=True)
        except CorruptionError:
            # The owner may have started a new generation between our two looks.
            if attempt + 1 == READ_ATTEMPTS or read_current(directory) == current:
                raise
            continue
        try:
            terms = Terms(log.head.base_index)
            return log, terms, log.recover(terms, current.durable_offset, expect_applied)
        except BaseException:
            log.close()
            raise
    raise AssertionError("unreachable")


def read_current(directory: Directory) -> format.CurrentFile | None:
    """What CURRENT says, or None when it was never written."""
    path = directory.path_of(CURRENT)
    with storage_errors(path, "reading"):
        content = directory.read_file(CURRENT, 4096)
        if content is not None:
            return format.unpack_current(content, path)
        # Without CURRENT there may be the first log of a creation that did not finish, and nothing more.
        for name in directory.names():
            if NAMES.fullmatch(name) and name != "CURRENT.tmp":
                fd = directory.open_file(name)
                try:
                    size = directory.size(fd)
                finally:
                    directory.close_file(fd)
                if name != log_name(1) or size > EMPTY_LOG_BYTES:
                    raise CorruptionError(path, None, f"CURRENT, since {name} holds {size} bytes", "no file")
    return None


def create_first(directory: Directory) -> Log:
    log = Log.create(directory, 1)
    try:
        with storage_errors(directory.path, "creating the directory's files"):
            directory.sync_parent()
            directory.sync_directory()
            write_current(directory, log)
    except BaseException:
        log.close()
        raise
    return log


def write_current(directory: Directory, log: Log) -> None:
    """Names ``log`` as the state, and its present end as durable. The log is synced, its name too."""
    current = format.CurrentFile(log.head.generation, log.head.identity, log.end)
    with storage_errors(directory.path_of(CURRENT), "replacing"):
        directory.replace_file(CURRENT, format.pack_current(current))


def start_next(directory: Directory, old: Log) -> Log:
    """A new, empty log in place of ``old``, in one atomic step that is durable on return.

    On an error before the step, ``old`` is the state and untouched. On an error in it, which of the two the
    disk names is unknown: ``old`` is poisoned.
    """
    generation = old.head.generation + 1
    log = Log.create(directory, generation)
    switching = False
    try:
        with storage_errors(directory.path, "starting a new generation"):
            directory.sync_directory()
            switching = True
            write_current(directory, log)
    except BaseException as error:
        log.close()
        if not switching or still_current(directory, old):
            directory.unlink(log_name(generation))
        else:
            old.poison(error)
        raise
    return log


def still_current(directory: Directory, log: Log) -> bool:
    """Whether CURRENT, as the system shows it, names this log still."""
    current = read_current(directory)
    return current is not None and current.identity == log.head.identity


def remove_others(directory: Directory, generation: int) -> None:
    """Removes what a crash may have left of other generations."""
    with storage_errors(directory.path, "listing"):
        names = directory.names()
    for name in names:
        if NAMES.fullmatch(name) and not name.endswith(f"-{generation}"):
            with storage_errors(directory.path_of(name), "removing"):
                directory.unlink(name)
            logger.info("%s: removed, it belongs to another generation", directory.path_of(name))

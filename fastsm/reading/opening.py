"""Opening a state from outside: by a process that takes no lock, next to an owner that may keep changing it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.headers import CurrentFile
from fastsm.disk.published import Publication, Published
from fastsm.errors import CorruptionError, StorageError
from fastsm.generation import current
from fastsm.generation.log import Log
from fastsm.generation.unfinished import is_unfinished
from fastsm.lookup.index import Index
from fastsm.types import LogId

ATTEMPTS = 100  # the owner may take one step after another in the meantime


class Opened(NamedTuple):
    """A state, as it was when it was opened."""

    generation: current.Generation
    applied: LogId
    durable: LogId
    incarnation: int  # of the owner that publishes it; 0: none


def open_directory(path: str) -> Directory:
    """Opens the directory at a path, without a lock; ``StorageError`` if it does not exist."""
    with storage_errors(path, "opening the directory"):
        return Directory(path, create=False)


def open_publication(directory: Directory) -> Publication | None:
    """Opens what the directory's owner publishes; None if no owner has published anything yet."""
    with storage_errors(directory.path, "opening the owner's publication"):
        return Publication.open(directory)


def recover_state(log: Log, named: CurrentFile) -> current.Generation:
    """Recovers the whole state. O(keys + bytes of log after it) from a saved table, else O(bytes of base and log)."""
    return current.recover(log, named, None, False)


def recover_frames(log: Log, named: CurrentFile) -> current.Generation:
    """Recovers the log's frames and their terms, without keys. O(bytes of the log)."""
    index, base = Index(), LogId(log.head.base_index, log.head.base_term)
    if base.index:
        index.terms.extend(*base)
    recovery = log.recover(index.terms, named)
    return current.Generation(log, index, log.last_durable(*base), recovery, False)


Recover = Callable[[Log, CurrentFile], current.Generation]


def open_state(
    directory: Directory, publication: Publication | None, recover: Recover = recover_state
) -> Opened:
    """Opens the state that an owner has published; without an owner, the state that an opening would recover.

    ``StorageError`` (ENOENT) if there is no state. Takes as long as ``recover`` does.
    """
    for attempt in range(ATTEMPTS):
        published = None if publication is None else publication.read()
        named = None
        try:
            named = read_current(directory)
            owned = is_owned(directory)
            opened = open_named(directory, named, publication, published, owned, recover)
        except CorruptionError:
            # The owner may have moved to another generation after CURRENT was read.
            if attempt + 1 == ATTEMPTS or (named is not None and read_current(directory) == named):
                raise
            continue
        after = None if publication is None else publication.read()
        # Without an owner, all complete frames were taken: that is right only if no owner has come and written since.
        if after == published or (owned and published and after and after.incarnation == published.incarnation):
            return opened
        opened.generation.log.close()
    raise StorageError(
        errno.EAGAIN, "the owner replaces the state faster than a reader can open it: try again", directory.path)


def read_current(directory: Directory) -> CurrentFile:
    """Returns what CURRENT names; ``StorageError`` (ENOENT) if it names nothing yet."""
    with storage_errors(directory.path, "looking for an unfinished restore"):
        unfinished = is_unfinished(directory)
    named = None if unfinished else current.read_current(directory)
    if named is None:
        found = "a directory without CURRENT"
        if unfinished:
            found = "a restore or a load that is running, or did not finish"
        raise StorageError(errno.ENOENT, f"expected a state, found {found}", directory.path)
    return named


def open_named(
    directory: Directory,
    named: CurrentFile,
    publication: Publication | None,
    published: Published | None,
    owned: bool,
    recover: Recover,
) -> Opened:
    """Opens the state that CURRENT names, up to the end that its owner has published."""
    incarnation = 0
    if publication is not None and published is not None:
        if not publication.is_of_this_run(published):
            published = None
        elif published.identity == named.identity:
            incarnation = published.incarnation
        else:  # an owner is in the step between the two, or was killed in it
            step = publication.step()
            if step is not None and step[:2] == (published.identity, named.identity):
                incarnation = step[2]
            published = None
    # An owner's log ends where the owner says, whatever follows: a chunk being written, or one whose sync failed. Until
    # the owner publishes, it ends where CURRENT says. Without an owner, all complete frames count.
    up_to = 0
    if owned:
        up_to = max(named.durable_offset, published.end if published is not None else 0)
    log = Log.open(directory, named, True, up_to)
    try:
        generation = recover(log, named)
    except BaseException:
        log.close()
        raise
    terms = generation.index.terms
    applied = LogId(terms.seen, terms.last_term(log.head.base_term))
    if published is None:
        return Opened(generation, applied, generation.durable, incarnation)
    if published.applied_index > applied.index and published.end <= log.end:
        # An entry without a command, which is in no frame
        applied = LogId(published.applied_index, published.applied_term)
    return Opened(generation, applied, generation.durable, incarnation)


def is_owned(directory: Directory) -> bool:
    """Returns whether an owner has the directory open; also True if its lock may not be examined."""
    try:
        return directory.owner() is not None
    except PermissionError:
        return True
    except OSError as error:
        raise StorageError.wrap(error, directory.path, "looking for the directory's owner") from error


"""A node's directory: its parts, and how they are made consistent, however the node ended.

    state      the FastStateMachine: what was applied
    journal    the FastJournal: the entries, term and vote
    snapshot   the node's own newest dump
    incoming   the newest snapshot from a leader

The invariant, which is checked before PySyncObj starts: the journal has every entry after the newest snapshot (or, if
there is no state besides the state machine's, after the last applied entry), the snapshot is not newer than the state,
and all of them agree on the terms of the entries.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from fastsm.disk.files import Directory, absolute_path, make_directory, storage_errors
from fastsm.errors import CorruptionError, SnapshotError
from fastsm.integrations.pysyncobj.errors import DivergedError
from fastsm.integrations.pysyncobj.journal import FastJournal
from fastsm.machine import FastStateMachine
from fastsm.snapshot.file import SNAPSHOT, Snapshot, copy_checked, open_snapshot
from fastsm.types import LogId

logger = logging.getLogger("fastsm")

MARK = 0x46  # the first byte of the state machine's entries; PySyncObj's own begin with 0 to 3
SENTINEL = b"\x01"  # PySyncObj's entry without effect, with which a journal begins

Files = Callable[[str], type[Directory]]


class Places:
    """The four parts of a node's directory."""

    def __init__(self, directory: str | os.PathLike[str], files: Files) -> None:
        self.path = absolute_path(directory)
        self.files = files
        with storage_errors(self.path, "opening the node's directory"):
            make_directory(directory).close()
        self.state, self.journal, self.snapshot, self.incoming = (
            os.path.join(self.path, name) for name in ("state", "journal", "snapshot", "incoming")
        )

    def open_newest(self) -> Snapshot | None:
        """Returns the newest existing snapshot, with its header checked; None if there is none."""
        found: list[Snapshot] = []
        try:
            for directory in (self.snapshot, self.incoming):
                path = os.path.join(directory, SNAPSHOT)
                if os.path.lexists(path):
                    found.append(open_snapshot(path))
        except BaseException:
            for snapshot in found:
                snapshot.close()
            raise
        found.sort(key=lambda snapshot: snapshot.metadata.last_included)
        for snapshot in found[:-1]:
            snapshot.close()
        return found[-1] if found else None

    def keep(self, snapshot: Snapshot) -> None:
        """Makes a snapshot's name durable: the process that put it in place may have been killed before it did so."""
        path = os.path.dirname(snapshot.path)
        with storage_errors(path, "making a snapshot's name durable"):
            directory = self.files(os.path.basename(path))(path)
            try:
                directory.sync_directory()
            finally:
                directory.close()

    def remove_incoming(self) -> None:
        """Removes a leader's snapshot, after a newer dump of the node's own."""
        if os.path.isdir(self.incoming):
            directory = self.files("incoming")(self.incoming)
            try:
                with storage_errors(self.incoming, "removing an older snapshot"):
                    directory.unlink(SNAPSHOT)
            finally:
                directory.close()


class Restart(NamedTuple):
    """A node's parts, made consistent, and the entry after which PySyncObj continues."""

    machine: FastStateMachine
    journal: FastJournal
    snapshot: LogId
    snapshot_bytes: int
    attachment: bytes | None
    last_applied: int
    commit_index: int
    others: list[tuple[int, bytes]]  # PySyncObj's own entries between the snapshot and last_applied


def restart(places: Places, *, durable: bool, has_others: bool, options: dict[str, Any]) -> Restart:
    """Opens, verifies and repairs the node's directory. After an error, which names the damage, nothing is left open.

    ``has_others``: whether there is state besides the state machine's, which only snapshots and entries contain.
    """
    machine = FastStateMachine(places.state, _files=places.files("state"), **options)
    journal = None
    try:
        snapshot, size, attachment = _take_snapshot(places, machine)
        journal = FastJournal(places.journal, durable=durable, _files=places.files("journal"))
        last_applied = _repair(journal, machine.last_applied(), snapshot, durable, has_others)
        commit_index = min(max(journal.commit_index, last_applied, 1), journal.last_index)
        journal.set_commit_index(commit_index)
        indexes = journal.without_marks(snapshot.index + 1, last_applied + 1, bytes([MARK, SENTINEL[0]]))
        others = [(index, journal.entries(index, 1)[0][0]) for index in indexes]
        if durable:
            journal.sync()
    except BaseException:
        if journal is not None:
            journal.abandon()
        machine.close()
        raise
    logger.info(
        "%s: continues at entry %d, with a snapshot as of %s, %r", places.path, last_applied, tuple(snapshot), journal)
    return Restart(machine, journal, snapshot, size, attachment, last_applied, commit_index, others)


def _take_snapshot(places: Places, machine: FastStateMachine) -> tuple[LogId, int, bytes | None]:
    """Returns the newest snapshot, after checking it; completes an install that was cut short."""
    snapshot = places.open_newest()
    if snapshot is None:
        return LogId(), 0, None
    with snapshot:
        copy_checked(snapshot.descriptor, snapshot.head, snapshot.path)
        places.keep(snapshot)  # the journal may go on from it
        included = snapshot.metadata.last_included
        if included > machine.last_applied():
            machine.install_snapshot(snapshot.metadata, snapshot.path)
        elif machine.entry_term(included.index) not in (None, included.term):
            raise SnapshotError(
                f"{snapshot.path}: expected a snapshot of this node's state, which is at {machine.last_applied()}, "
                f"found one as of {included} from another history; remove the node's directory: it recovers from its "
                "leader's snapshot")
        return included, snapshot.size, snapshot.attachment


def _repair(journal: FastJournal, applied: LogId, snapshot: LogId, durable: bool, has_others: bool) -> int:
    """Makes the journal fit snapshot and state. Returns the entry after which PySyncObj continues."""
    if snapshot.index and journal.term_at(snapshot.index) != snapshot.term and journal.first_index <= snapshot.index:
        # The install ended here, or the journal has lost its end: earlier entries are part of the snapshot.
        journal.rebase(SENTINEL, *snapshot)
    if not len(journal):
        journal.add(SENTINEL, 1, 0)
    last = journal.last_index
    if last < applied.index:
        if durable:
            raise CorruptionError(
                journal.path, None, f"entries up to {applied}, which were applied", f"entries up to {last}",
                "remove the node's directory: it recovers from its leader's snapshot")
        if has_others:
            return last  # the state machine skips entries that it has; other consumers need them
        logger.warning("%s: ends at entry %d, and continues after the state's, %d", journal.path, last, applied.index)
        journal.rebase(SENTINEL, *applied)
    term = journal.term_at(applied.index)
    needed = (snapshot if has_others else applied).index + 1
    if needed < journal.first_index:
        raise CorruptionError(
            journal.path, None, f"entries from {needed} on",
            f"entries from {journal.first_index} on",
            "remove the node's directory: it recovers from its leader's snapshot")
    if term is not None and term != applied.term:
        raise DivergedError(
            f"{journal.path}: expected entry {applied.index} of term {applied.term}, which was applied, found one of "
            f"term {term}; remove the node's directory and start it again")
    return applied.index

"""Taking snapshots: the state as of an entry is written to a file, and its metadata is recorded durably."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from fastsm.core.engine import Engine
from fastsm.core.jobs import Jobs, Progress
from fastsm.core.verifying import Verifying
from fastsm.disk.files import NO_ROOM, Directory
from fastsm.errors import StorageError
from fastsm.snapshot.capture import Capture
from fastsm.snapshot.file import metadata_of
from fastsm.snapshot.writer import look_at_present, prepare, state_checksum
from fastsm.types import LogId, SnapshotMetadata

Attachment = bytes | Callable[[LogId], bytes] | None

logger = logging.getLogger("fastsm")


class Taken(NamedTuple):
    """The state as of an entry, held still, and the metadata of the last snapshot put in place before the capture."""

    capture: Capture
    named: SnapshotMetadata | None


class Snapshots:
    """Writes snapshots of one machine, whose engine is passed to each call.

    ``compress`` and ``attachment`` are the defaults for snapshots that specify none. Thread safe.
    """

    __slots__ = ("_attachment", "_compress", "_files", "_jobs", "_path", "_verifying")

    def __init__(
        self, path: str, files: type[Directory], jobs: Jobs, verifying: Verifying, compress: str, attachment: Attachment
    ) -> None:
        self._path = path
        self._files = files
        self._jobs = jobs
        self._verifying = verifying
        self._compress = compress
        self._attachment = attachment

    def take(self, engine: Engine, last_included: LogId | tuple[int, int] | None) -> Taken:
        """Captures the state as of an entry, for a later :meth:`write`."""
        named = self._jobs.named  # before the capture, so that a newer snapshot put in place later is noticed
        return Taken(engine._capture(last_included), named)

    def write(
        self,
        engine: Engine,
        taken: Taken,
        directory: str | os.PathLike[str],
        compress: str | None,
        attachment: bytes | None,
        progress: Progress | None = None,
    ) -> SnapshotMetadata:
        """Writes what was captured to a file, puts the file in place, and records its metadata durably."""
        capture = taken.capture
        compress = self._compress if compress is None else compress
        seen = look_at_present(directory, self._files)
        if seen is not None and self._jobs.named is not taken.named and metadata_of(seen) == self._jobs.named:
            seen = None  # it was put in place after the capture
        with self._jobs.run("snapshot", capture.last_included, progress) as job:
            job.total = capture.estimated_size
            engine._refuse_replaced(capture.epoch, job.what)
            self._verifying.ensure(engine, job)
            if attachment is None:
                attachment = self._attachment(capture.last_included) if callable(self._attachment) else self._attachment
            prepared = prepare(
                directory, capture, compress=compress, attachment=b"" if attachment is None else attachment,
                tick=job.tick, files=self._files, seen=seen)
            with prepared:
                with engine._turns.waited_for(), self._jobs.committing(job, prepared.metadata):
                    engine._require(True)
                    engine._refuse_replaced(capture.epoch, job.what)
                    if not engine._log.read_only:
                        engine._log.check_writable()
                    prepared.commit()
                with engine._turns:
                    if not engine._is_same_state(capture.epoch):
                        return prepared.metadata  # the snapshot was complete before a reset or an install
                    record(engine, prepared.metadata, self._path)
                    mark = engine._position()
        engine._sync_to(mark)
        logger.info("%s: wrote %s as of %s", self._path, prepared.path, tuple(capture.last_included))
        return prepared.metadata

    def state_checksum(self, engine: Engine, taken: Taken) -> tuple[LogId, bytes]:
        """Returns the id and the state checksum of a snapshot of what was captured, without writing one."""
        capture = taken.capture
        with self._jobs.run("checksum", capture.last_included) as job:
            engine._refuse_replaced(capture.epoch, job.what)
            self._verifying.ensure(engine, job)
            return capture.last_included, state_checksum(capture, job.tick)


def record(engine: Engine, metadata: SnapshotMetadata, path: str) -> None:
    """Writes a frame of a snapshot's metadata, if newer, and of what no frame carries yet; in the writer's turn.

    If there is no room for the metadata alone, only a warning is logged.
    """
    if engine._log.read_only:
        return
    known = engine.snapshot_metadata()
    if known is None or known.last_included < metadata.last_included:
        engine._note_metadata(metadata)
    try:
        engine._write_state(True)
    except StorageError as error:
        if error.errno not in NO_ROOM or engine._has_unwritten(False):
            raise
        # Not an error: the snapshot's file is complete, and the entries that it covers are in the log.
        logger.warning(
            "%s: there is no room to record the snapshot as of %s; the next call that saves metadata will: %s",
            path, metadata.last_included, error)

"""What the log carries beyond commands: last applied, the latest snapshot's metadata, and how much is durable."""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastsm.core.chunk cimport unsigned_slowly
from fastsm.disk.format cimport (
    FRAME_RUNS, RECORD_CLOSE, RECORD_SNAPSHOT, RUN_SIZE, frame_size, record_size, write_record,
)

from fastsm.arguments import bytes_of, pair_of
from fastsm.errors import OrderError, SnapshotFormatError, SnapshotRangeError
from fastsm.types import LogId, SnapshotMetadata

cdef enum:
    CHECKSUM_BYTES = 32    # the size of a snapshot's BLAKE3 checksum


cdef class HardState(Timed):
    """The state's hard state: what is applied, what is written of it, and what is durable.

    Thread safety: every method, from any thread; writers take turns.
    """

    def __cinit__(self, *args, **options):
        self._turns = Turns()

    cdef void tell_readers(self) noexcept:
        """Publishes what is applied by now, all of which is in the log. Runs no Python code."""
        if self.publisher is not None:
            self.publisher.publish(
                self._log.identity, self._index.end - self._log.start, self.applied_index, self.applied_term,
                self.durable_index)

    cdef void publish_runs(self) noexcept:
        """Moves the runs that a frame now contains into the terms, where room is reserved: they are applied."""
        self.terms_take_runs()
        self._index.end = self._log.start + self._log.end
        self.runs.count = self.runs_in_terms = 0
        self.applied_index, self.applied_term = self.runs.index, self.runs.term
        self.framed_index, self.framed_term = self.runs.index, self.runs.term

    cdef void terms_take_runs(self) noexcept:
        """Adds new runs to the terms; of the runs they already have, only the last one may have grown."""
        cdef uint32_t i
        for i in range(self.runs_in_terms - 1 if self.runs_in_terms else 0, self.runs.count):
            self._terms.append(self.runs.runs[i].last, self.runs.runs[i].term)
        self.runs_in_terms = self.runs.count

    def _note_applied(self, log_id):
        """Sets last applied to an entry without a command, in the writer's turn; the next frame records it."""
        cdef RunList runs = self.runs
        given_index, given_term = pair_of(log_id, "last applied")
        cdef uint64_t index = unsigned_slowly(given_index, "index")
        cdef uint64_t term = unsigned_slowly(given_term, "term")
        if index == runs.index and term == runs.term:
            return
        if index <= runs.index or term < runs.term:
            raise OrderError(
                f"last applied is {LogId(runs.index, runs.term)}, cannot become {LogId(index, term)}: "
                "indexes rise and terms never fall", index=index)
        self._terms.reserve(2)
        runs.note(index, term)
        self.terms_take_runs()
        self.applied_index, self.applied_term = index, term
        self.tell_readers()
        self.awaited.note_applied(index)

    def _note_metadata(self, metadata):
        if not isinstance(metadata, SnapshotMetadata):
            raise TypeError(f"expected a SnapshotMetadata, found {type(metadata).__name__}")
        given_index, given_term = pair_of(metadata.last_included, "last_included")
        cdef uint64_t index = unsigned_slowly(given_index, "index")
        cdef uint64_t term = unsigned_slowly(given_term, "term")
        cdef bytes checksum = bytes_of(metadata.checksum, "checksum")
        checked = SnapshotMetadata(LogId(index, term), checksum)
        if len(checksum) != CHECKSUM_BYTES:
            raise SnapshotFormatError(
                f"{self._log.path}: expected a snapshot's checksum of {CHECKSUM_BYTES} bytes, found {len(checksum)}")
        if index > self.applied_index:  # no directory is opened whose state is older than its own snapshot
            raise SnapshotRangeError(
                f"{self._log.path}: a snapshot as of {LogId(index, term)} cannot be of this state: last applied is "
                f"{LogId(self.applied_index, self.applied_term)}; apply the entries, or install the snapshot, first")
        self.metadata = checked
        self.metadata_unsaved = True

    def _write_state(self, bint with_metadata=False, bint closing=False):
        """Writes a frame of what no frame carries yet, if there is anything; in the writer's turn."""
        metadata = self.metadata if with_metadata and self.metadata_unsaved else None
        if not (self.runs.count or metadata is not None or closing):
            return
        self._terms.reserve(self.runs.count)
        append_state(self._log, self.runs, metadata, closing)
        self.take_arena()
        if metadata is not None:
            self._index.metadata, self.metadata_unsaved = metadata, False
        self.publish_runs()
        self.tell_readers()

    def _note_durable(self):
        """Writes an empty frame, whose watermark says that all before it is durable; in the writer's turn."""
        append_state(self._log, None, None, False)
        self.take_arena()
        self._index.end = self._log.start + self._log.end
        self.tell_readers()

    def _has_unwritten(self, bint with_metadata):
        """Returns whether something that is applied, or metadata to be saved, is in no frame yet."""
        return self.runs.count > 0 or (with_metadata and self.metadata_unsaved)

    def _position(self):
        """Returns, as of one moment: the log, its end, and the last entry that its frames carry."""
        cdef Log log = self._log
        cdef uint64_t end = log.end
        cdef uint64_t index = self.framed_index
        cdef uint64_t term = self.framed_term
        return log, end, LogId(index, term)

    def _mark(self, bint with_metadata):
        """Writes what no frame carries yet; returns the log, its end, and the last applied entry, which is in it."""
        if self._has_unwritten(with_metadata):
            with self._turns:
                self._require(True)
                self._write_state(with_metadata)
        return self._position()

    def _sync_to(self, mark):
        """Makes a log durable up to a position; does nothing if the state has moved to another log.

        Returns whether an unclean end had left much that the sync made durable, and no frame records that yet.
        """
        cdef Log log
        cdef uint64_t offset
        cdef GroupCommit commit = self._group_commit
        log, offset, applied = mark
        if commit.log is not log or log.read_only:
            return False
        commit.sync_up_to(offset)
        if log.durable < offset and self._group_commit is commit:  # a close came first and did not sync
            log.check_writable()
            self._require()
        self._note_synced(log, applied)
        return log.unnoted

    def _note_synced(self, Log log, applied):
        """Records that a sync of this log has covered everything up to an entry."""
        if log is self._log and applied.index > self.durable_index:
            self.durable_index, self.durable_term = applied
            if self._watchers.durable.armed:
                self._watchers.ring()
            self.tell_readers()


def append_metadata(Log log, metadata):
    """Writes a frame of a snapshot's metadata alone, to a log that is not the state's log yet."""
    append_state(log, None, metadata, False)


cdef int append_state(Log log, RunList runs, metadata, bint closing) except -1:
    """Writes a frame of hard state: runs, a snapshot's metadata, a clean close, or any combination of these."""
    cdef bytes value = b""
    cdef uint32_t count = 0 if runs is None else runs.count
    cdef uint64_t length = frame_size(count, 0)
    cdef uint8_t *frame
    cdef uint8_t *p
    if metadata is not None:
        value = metadata.last_included.term.to_bytes(8, "little") + metadata.checksum
        length += record_size(0, len(value))
    if closing:
        length += record_size(0, 0)
    frame = log.begin_frame(length)
    if count:
        memcpy(frame + FRAME_RUNS, runs.runs, count * RUN_SIZE)
    p = frame + frame_size(count, 0)
    if metadata is not None:
        p = write_record(
            p, RECORD_SNAPSHOT, metadata.last_included.index, p, 0,
            <const uint8_t *>PyBytes_AS_STRING(value), len(value))
    if closing:
        write_record(p, RECORD_CLOSE, runs.index, p, 0, p, 0)
    return log.commit_frame(frame, length, count)

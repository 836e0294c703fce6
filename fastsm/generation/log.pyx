"""The log: a file of frames on top of a base, which compaction copies from, and recovery reads back."""

import os
import time

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastsm.disk.format cimport (
    FRAME_RUNS, LOG_HEADER_SIZE, frame_length, frame_run_count, seal_frame,
)
from fastsm.disk.mapping cimport Mapping, log_start
from fastsm.generation.framefile cimport FrameFile, STAGING_KEPT
from fastsm.generation.recovery cimport Scan
from fastsm.lookup.terms cimport Run, Terms

from fastsm.disk import headers
from fastsm.disk.base import Base
from fastsm.errors import CorruptionError, NotRunningError
from fastsm.disk.files import storage_errors
from fastsm.generation.recovery import judge_expected, known_frames, whole_frames
from fastsm.types import LogId, Recovery


def log_name(generation):
    """Returns the file name of a generation's log."""
    return f"log-{generation}"


cdef class Log(FrameFile):
    """One log file, open for appending.

    Thread safety: `begin_frame` to `commit_frame` under the writer's turn; `sync` from any thread; reads
    of what is below `end` from any thread, without the GIL, for as long as `mapping` is held.
    """

    def __cinit__(self, directory, head, descriptor, base=None, bint read_only=False):
        self.base = base
        self.base_bytes = head.base_size
        self.start = log_start(head.base_size)
        self.name = log_name(head.generation)
        self.path = directory.path_of(self.name)

    @staticmethod
    def create(directory, generation, base=None, changes=None):
        """Creates an empty log on top of a base, or of the empty state. On return the file is durable, its name is not.

        The log owns the base, and closes it with itself. `changes`: how many changes the base's last entry made, if
        known.
        """
        identity = int.from_bytes(os.urandom(8), "little")
        head = headers.LogHead(generation, identity)
        if base is not None:
            head = headers.LogHead(generation, identity, *base.last_included, base.size, base.head.checksum)
            if changes is not None:
                head = head._replace(base_changes=min(changes, headers.MOST_CHANGES) + 1)
        name = log_name(generation)
        with storage_errors(directory.path_of(name), "creating the log"):
            descriptor = directory.create_file(name)
            try:
                directory.write(descriptor, headers.pack_log_head(head), 0)
                directory.sync(descriptor)
                log = Log.adopt(directory, head, descriptor, LOG_HEADER_SIZE, base)
            except BaseException:
                directory.close_file(descriptor)
                raise
        # Outside the block: Cython loses a return value if leaving the block raises.
        return log

    @staticmethod
    def open(directory, current, bint read_only=False, up_to=None):
        """Returns the log that CURRENT names, and its base, with both headers checked; call `recover` next.

        Read-only, next to an owner that appends and trims: only frames that are complete now are mapped. `up_to`: only
        frames before this offset, which are complete; 0: the end is searched for from the point that CURRENT names.
        """
        name = log_name(current.generation)
        path = directory.path_of(name)
        base = None
        with storage_errors(path, "opening the log"):
            try:
                descriptor = directory.open_file(name, os.O_RDONLY if read_only else os.O_RDWR)
            except FileNotFoundError:
                raise CorruptionError(path, None, "the log that CURRENT names", "no file") from None
            try:
                size = directory.size(descriptor)
                head = headers.unpack_log_head(os.pread(descriptor, LOG_HEADER_SIZE, 0), path)
                if (head.generation, head.identity) != (current.generation, current.identity):
                    raise CorruptionError(
                        path, 16, f"generation {current.generation}, identity {current.identity:#x}, as CURRENT says",
                        f"generation {head.generation}, identity {head.identity:#x}")
                base = Base.open(directory, head)
                if read_only and up_to is None:
                    size = whole_frames(descriptor, head, size)[0]
                elif read_only:
                    size = min(size, up_to) if up_to else whole_frames(
                        descriptor, head, size, known=known_frames(descriptor, head, current))[0]
                log = Log.adopt(directory, head, descriptor, size, base, read_only)
            except BaseException:
                directory.close_file(descriptor)
                if base is not None:
                    base.close()
                raise
        return log

    @staticmethod
    def adopt(directory, head, descriptor, uint64_t size, base=None, bint read_only=False):
        cdef Log log = Log(directory, head, descriptor, base, read_only)
        log.attach(headers.pack_log_head(head), size)
        return log

    cdef int lay_base(self, Mapping mapping) except -1:
        if self.base is not None:
            mapping.lay_base(self.base.descriptor, self.base.size)
        return 0

    def close(self):
        """Closes the descriptors, including the base's. Idempotent."""
        try:
            FrameFile.close(self)
        finally:
            if self.base is not None:
                self.base.close()

    # ---- copy ------------------------------------------------------------------------------------------

    def copy_from(self, Log source, uint64_t first, uint64_t stop):
        """Appends the frames in [first, stop) of another log, sealed for their new place. O(bytes).

        Frames that applied nothing are left out: what they record of snapshots and syncs is true of the other log only.
        """
        cdef Mapping mapping = source.mapping  # held: stays valid even if `source` is mapped again meanwhile
        if mapping is None:
            raise NotRunningError(f"{source.path}: the log was closed in the meantime: open the directory again")
        while first < stop:
            first = self.copy_piece(mapping.address + mapping.start, first, stop)

    cdef uint64_t copy_piece(self, const uint8_t *source, uint64_t first, uint64_t stop) except 0:
        """Appends the next frames, up to STAGING_KEPT bytes or one larger frame; returns where the next one starts.

        Appends nothing if all frames up to `stop` applied nothing.
        """
        cdef uint64_t offset = first
        cdef uint64_t size = 0
        while offset < stop:
            if frame_run_count(source + offset):
                if size and size + frame_length(source + offset) > STAGING_KEPT:
                    break
                size += frame_length(source + offset)
            offset += frame_length(source + offset)
        if size == 0:
            return offset
        self.check_writable()
        if self.end + size > self.allocated:
            self.grow(self.end + size)
        self.settle()
        self.reserve_staging(size)
        with nogil:
            self.copy_and_seal(source, first, offset)
        self.write_staged(size)
        self.end += size
        return offset

    cdef void copy_and_seal(self, const uint8_t *source, uint64_t first, uint64_t stop) noexcept nogil:
        cdef uint8_t *frame = self.staging
        cdef uint64_t length
        while first < stop:
            length = frame_length(source + first)
            if frame_run_count(source + first):
                self.frames += 1
                memcpy(frame, source + first, length)
                self.last_frame = self.end + (frame - self.staging)
                self.chain = seal_frame(
                    frame, length, frame_run_count(frame), self.identity, self.last_frame, self.durable, self.chain)
                frame += length
            first += length

    # ---- recover ---------------------------------------------------------------------------------------

    def recover(
        self, Terms terms, current, expect_applied=None, *, saved=None, metadata=None, verify=None, not_below=0,
    ):
        """Finds the end of the log, adds its entries to `terms`, and cuts a torn tail. Returns a `Recovery`.

        `current`: the content of CURRENT. `saved`: a saved table's header; the frames that it covers are skipped, and
        `terms` and `metadata` (of the newest snapshot) already contain theirs. `verify()` is called once the end is
        known, to check more. A log that ends before `not_below` is not cut. Raises `CorruptionError`; the file is then
        unchanged.
        """
        cdef Scan scan
        cdef uint64_t known_durable = current.durable_offset
        cdef uint64_t torn_end
        if saved is None:
            scan = Scan(self.mapping, self.allocated, self.head, self.path, terms)
        else:
            scan = Scan(
                self.mapping, self.allocated, self.head, self.path, terms, saved.log_offset, saved.frames,
                saved.last_frame, saved.last_checksum)
            known_durable = max(known_durable, <uint64_t>saved.log_offset)  # since it was saved after a sync
        self.known_frame, self.known_chain = scan.end, scan.chain
        scan.whole_frames_only = self.read_only
        started = time.perf_counter()
        scan.read_frames()
        scan.judge_durable(known_durable)
        self.judge_current(current)
        torn_end = scan.end if self.read_only else scan.end_of_torn_tail(self.descriptor)
        scan.judge_snapshot(metadata)
        judge_expected(self.path, scan.end, expect_applied, scan.last_applied(), terms)
        self.found(scan.end, scan.watermark)
        self.frames, self.last_frame, self.chain = scan.frames, scan.last_frame, scan.chain
        if verify is not None:
            verify()
        if not self.read_only and self.end >= not_below:
            self.cut(self.end, torn_end, self.durable)
        return Recovery(
            clean=self.end == self.durable and torn_end == self.end, frames=scan.frames, log_bytes=self.end,
            torn_bytes=torn_end - self.end, suspect_bytes=self.end - self.durable,
            seconds=time.perf_counter() - started)

    def judge_current(self, current):
        """Raises `CorruptionError` if the log lacks the frame that CURRENT names: their histories differ."""
        if current.last_frame and not self.is_frame(current.last_frame, current.durable_offset, current.last_checksum):
            raise CorruptionError(
                self.path, current.last_frame,
                f"the frame of checksum {current.last_checksum:#018x} up to offset {current.durable_offset}, which "
                "CURRENT names", "another frame: CURRENT and this log belong to different histories",
                "restore both from one copy of the directory")

    def damage_at(self, uint64_t place):
        """Returns the error for a record of the arena whose length cannot be right."""
        path, offset = self.path, place
        if place >= self.start:
            offset -= self.start
        elif self.base is not None:
            path = self.base.path
        return CorruptionError(path, offset, "a record within the file", "a length that goes beyond it")

    def last_frame_up_to(self, uint64_t index, uint64_t at_least=0):
        """Returns the end of the last frame whose entries are all <= index, and the last entry up to there.

        Frames that start before the offset `at_least` are included whatever they apply. O(frames), without the GIL.
        """
        cdef uint64_t offset = LOG_HEADER_SIZE
        cdef uint64_t end = self.end
        cdef uint64_t last = self.head.base_index
        cdef uint64_t term = self.head.base_term
        cdef const uint8_t *frame
        cdef const Run *run
        cdef Mapping mapping = self.mapping
        if mapping is None:
            raise NotRunningError(f"{self.path}: the log was closed in the meantime: open the directory again")
        with nogil:
            while offset < end:
                frame = mapping.address + mapping.start + offset
                if frame_run_count(frame):
                    run = <const Run *>(frame + FRAME_RUNS) + (frame_run_count(frame) - 1)
                    if run.last > index and offset >= at_least:
                        break
                    last, term = run.last, run.term
                offset += frame_length(frame)
        return offset, LogId(last, term)

    def last_durable(self, uint64_t index, uint64_t term, uint64_t start=LOG_HEADER_SIZE):
        """Returns the last entry in durable frames; `index` and `term`: of the last entry before `start`."""
        cdef const Run *runs
        cdef uint32_t count
        cdef uint64_t offset = start
        while offset < self.end and offset + frame_length(self.address + offset) <= self.durable:
            count = frame_run_count(self.address + offset)
            runs = <const Run *>(self.address + offset + FRAME_RUNS)
            if count:
                index, term = runs[count - 1].last, runs[count - 1].term
            offset += frame_length(self.address + offset)
        return LogId(index, term)

    def verification(self):
        """Returns what `verify_file` needs to read the log as it is now, even if it is closed in the meantime."""
        descriptor = self.descriptor.duplicate()
        cdef uint64_t end = self.end       # together with the checksum, without Python code in between
        cdef uint64_t chain = self.chain
        return descriptor, self.head, self.path, end, chain

"""The log: frames appended to a mapped file, made durable by syncs, and read back after any end.

How a frame gets into the file is chosen by the rhythm of flushes (measured: docs/design.md):

- small frames between rare flushes are stored into pages that were populated ahead;
- while flushes come often, into as many pages as were written between the last two, which the flush populates;
- large frames, and what does not fit into those pages, go by `pwrite` into prepared blocks.

Both are read through one mapping, which is coherent with `pwrite`. Nothing counts before its frame is
whole; nothing counts as durable before a sync that began after it was written has succeeded. When a sync
fails, the log is *poisoned*: what the disk holds is unknown, so nothing more is written to it.
"""

import errno
import logging
import os
import time

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from fastsm.disk.format cimport (
    ARENA_LIMIT, FRAME_RUNS, LOG_HEADER_SIZE, VALID, frame_checksum, frame_length, frame_run_count, look_at_frame,
    look_at_header, seal_frame,
)
from fastsm.disk.mapping cimport Mapping, log_start
from fastsm.generation.recovery cimport Scan
from fastsm.lookup.terms cimport Run

from fastsm.disk import format
from fastsm.disk.base import Base
from fastsm.errors import CorruptionError, NotRunningError, ReadOnlyError, StorageError
from fastsm.disk.files import PIECE, storage_errors
from fastsm.generation.recovery import judge_expected, whole_frames
from fastsm.types import LogId, Recovery

logger = logging.getLogger("fastsm")

cdef enum:
    PAGE = 4096
    SMALLEST_GROWTH = 256 << 10
    LARGEST_GROWTH = 16 << 20
    SMALLEST_WINDOW = 64 << 10
    LEAST_PREPARED = 8 << 10
    LARGEST_WINDOW = 512 << 10
    ZEROED_AHEAD = 1 << 20
    STORED_BELOW = 12 << 10      # a larger frame costs less by `pwrite` than the pages that it would be stored into
    PACED_FRAMES = 64            # at most so many frames, and
    PACED_BYTES = 256 << 10      # so many bytes, between two flushes: flushes come often
    STAGING_KEPT = 1 << 20
    NOTED_ABOVE = 64 << 10       # bytes that were suspect: fewer are read and written again in no time
    WRITEBACK_BEHIND = 4 << 20   # bytes that wait for a sync before the system is told to begin with them


def log_name(generation):
    """The file name of a generation's log."""
    return f"log-{generation}"


cdef class Log:
    """One log file, open for appending.

    Thread safety: `begin_frame` to `commit_frame` under the writer's turn; `sync` from any thread; reads
    of what is below `end` from any thread, without the GIL, for as long as `mapping` is held.
    """

    def __cinit__(self, directory, head, descriptor, base=None, bint read_only=False):
        self.read_only = read_only
        self.base = base
        self.base_bytes = head.base_size
        self.start = log_start(head.base_size)
        self.directory = directory
        self.head = head
        self.identity = head.identity
        self.name = log_name(head.generation)
        self.path = directory.path_of(self.name)
        self.descriptor = descriptor
        self.window = SMALLEST_WINDOW
        self.end = self.durable = LOG_HEADER_SIZE

    cdef int begin_chain(self, bytes packed_head) except -1:
        """The first frame is chained to the header's checksum."""
        self.chain = self.known_chain = format.head_checksum(packed_head)
        self.known_frame = LOG_HEADER_SIZE
        return 0

    def __dealloc__(self):
        free(self.staging)

    def __repr__(self):
        return f"<Log {self.path!r}: {self.end} bytes, {self.durable} durable>"

    @staticmethod
    def create(directory, generation, base=None):
        """A new, empty log behind a base, or behind the empty state. The file is durable on return, its name is not.

        It takes the base, and closes it when it is closed.
        """
        identity = int.from_bytes(os.urandom(8), "little")
        head = format.LogHead(generation, identity)
        if base is not None:
            head = format.LogHead(generation, identity, *base.last_included, base.size, base.head.checksum)
        name = log_name(generation)
        with storage_errors(directory.path_of(name), "creating the log"):
            descriptor = directory.create_file(name)
            try:
                directory.write(descriptor, format.pack_log_head(head), 0)
                directory.sync(descriptor)
                log = Log.adopt(directory, head, descriptor, LOG_HEADER_SIZE, base)
            except BaseException:
                directory.close_file(descriptor)
                raise
        # Not from within the block: Cython loses what is being returned when the block's end raises.
        return log

    @staticmethod
    def open(directory, current, bint read_only=False):
        """The log that CURRENT names, with its base, the headers checked; `recover` comes next.

        Read-only, beside an owner who appends and trims: only the frames that are whole now are mapped.
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
                head = format.unpack_log_head(os.pread(descriptor, LOG_HEADER_SIZE, 0), path)
                if (head.generation, head.identity) != (current.generation, current.identity):
                    raise CorruptionError(
                        path, 16, f"generation {current.generation}, identity {current.identity:#x}, as CURRENT says",
                        f"generation {head.generation}, identity {head.identity:#x}")
                base = Base.open(directory, head)
                if read_only:
                    size = whole_frames(descriptor, head, size)[0]
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
        log.stores = not read_only and directory.stores_are_safe(descriptor)
        log.begin_chain(format.pack_log_head(head))
        log.allocated = size
        log.map_up_to(size)
        return log

    def close(self):
        """Gives the descriptors back. The pages go with the last reference to `mapping`. Idempotent."""
        descriptor, self.descriptor = self.descriptor, None
        try:
            if descriptor is not None:
                self.directory.close_file(descriptor)
        finally:
            if self.base is not None:
                self.base.close()

    def let_go(self):
        """Behind `close`: drops the mapping, which nobody reads through this log any more."""
        _old = self.mapping  # until it is nobody's any more: its end lets other threads run
        self.mapping = None
        self.address = NULL

    # ---- append ----------------------------------------------------------------------------------------

    cdef uint8_t *begin_frame(self, uint64_t length) except NULL:
        """Where to build a frame of `length` bytes: in the file's own pages, or aside.

        Afterwards there is room for it: a full disk is an error here, and never later.
        """
        cdef uint64_t stop = self.end + length
        self.require_writable()
        self.settle()  # not behind a frame: an error there would be one of a chunk that counts
        if stop > self.allocated:
            self.grow(stop)
        if self.stores and not self.syncing and length < STORED_BELOW:
            if stop <= self.window_end:
                return self.address + self.end
            if not self.paced:
                self.window_end = min(self.allocated, stop + self.window)
                if self.mapping.populate(self.start + self.end, self.start + self.window_end):
                    self.window = min(2 * self.window, <uint64_t>LARGEST_WINDOW)
                    return self.address + self.end
        if stop > self.window_end:
            self.window_end = 0
        return self.reserve_staging(length)

    def has_room(self, uint64_t length):
        """Whether a frame of `length` bytes goes into pages that are prepared: nothing is asked of the system."""
        cdef uint64_t stop = self.end + length
        return (
            self.stores and not self.syncing and length < STORED_BELOW
            and stop <= self.window_end and stop - self.settled_end < SETTLED_PIECE)

    cdef uint8_t *reserve_staging(self, uint64_t length) except NULL:
        """Memory to build frames in, aside."""
        if self.staging_room < length:
            free(self.staging)
            self.staging_room = max(length, <uint64_t>STAGING_KEPT)
            self.staging = <uint8_t *>malloc(self.staging_room)
            if self.staging == NULL:
                self.staging_room = 0
                raise MemoryError(f"no memory for a frame of {length} bytes")
        return self.staging

    cdef int commit_frame(self, uint8_t *frame, uint64_t length, uint32_t run_count) except -1:
        """Seals the frame and puts it into the file. It counts from here on; on an error it does not."""
        cdef uint64_t chain = seal_frame(
            frame, length, run_count, self.identity, self.end, self.durable, self.chain)
        if frame == self.staging:
            self.write_staged(length)
        self.last_frame, self.chain = self.end, chain
        self.end += length
        self.frames += 1
        self.frames_unsynced += 1
        if self.paced and (
            self.frames_unsynced > PACED_FRAMES or self.end - self.durable > PACED_BYTES
        ):
            self.paced = False
        return 0

    cdef int settle_piece(self) except -1:
        """What was written with `pwrite` becomes present in the mapping, before a read takes a page fault for it.

        And behind much that no sync has covered, the disk works while more is appended, so that a sync is short.
        """
        cdef uint64_t stop = self.end & ~<uint64_t>(PAGE - 1)
        cdef uint64_t first
        self.mapping.populate_read(self.start + self.settled_end, self.start + stop)
        self.settled_end = stop
        if stop > self.durable + WRITEBACK_BEHIND:
            first = max(self.writeback_end, self.durable & ~<uint64_t>(PAGE - 1))
            self.directory.start_writeback(self.descriptor, first, stop - first)
            self.writeback_end = stop
        return 0

    cdef int write_staged(self, uint64_t length) except -1:
        """Writes the frame that was built aside. No Python code, and so no signal handler, runs once it is written."""
        try:
            # A frame that ends this rhythm by its size alone is written once: zeros first would double the work.
            if self.paced and length <= PACED_BYTES and self.end + length > self.zeroed_end:
                self.zero_ahead(length)
            piece = PyMemoryView_FromMemory(<char *>self.staging, length, PyBUF_READ)
            self.directory.write(self.descriptor, piece, self.end)
        except BaseException as error:
            self.void_frame()
            if isinstance(error, OSError):
                raise StorageError.wrap(error, self.path, "writing a frame") from error
            raise
        if self.staging_room > STAGING_KEPT:
            free(self.staging)
            self.staging = NULL
            self.staging_room = 0
        return 0

    def zero_ahead(self, uint64_t length):
        """Writes zeros where the next frames go: a sync is faster over blocks that were written before.

        They are stored into these pages, where stores are safe: the pages are in memory, and dirty, anyway.
        """
        cdef uint64_t stop = min(self.allocated, self.end + length + ZEROED_AHEAD)
        self.directory.write(self.descriptor, bytes(stop - self.end), self.end)
        self.zeroed_end = stop
        if self.stores and self.mapping.populate(self.start + self.end, self.start + stop):
            self.window_end = stop

    def void_frame(self):
        """A frame that its caller is told failed must not be found by a recovery: its header is zeroed."""
        try:
            self.directory.write(self.descriptor, bytes(FRAME_RUNS), self.end)
        except OSError as error:
            self.poison(StorageError.wrap(error, self.path, "taking back a frame"))

    cdef int grow(self, uint64_t needed) except -1:
        """Allocates blocks, for `needed` bytes in all and some ahead, and maps them."""
        cdef uint64_t ahead = min(max(self.allocated / 4, <uint64_t>SMALLEST_GROWTH), <uint64_t>LARGEST_GROWTH)
        cdef uint64_t size = (needed + ahead + PAGE - 1) & ~<uint64_t>(PAGE - 1)
        if self.start + needed > ARENA_LIMIT:
            raise StorageError(errno.EFBIG, f"base and log take at most {ARENA_LIMIT} bytes", self.path)
        with storage_errors(self.path, f"allocating {needed - self.allocated} bytes"):
            try:
                self.directory.allocate(self.descriptor, self.allocated, size)
            except OSError:
                size = (needed + PAGE - 1) & ~<uint64_t>(PAGE - 1)
                self.directory.allocate(self.descriptor, self.allocated, size)
            self.map_up_to(size)
        self.allocated = size
        return 0

    cdef int map_up_to(self, uint64_t size) except -1:
        cdef Mapping mapping
        if self.mapping is None or not self.mapping.fits(size):
            # Whoever reads through the old mapping keeps it; both show the same pages.
            mapping = Mapping(self.start + 2 * size, self.read_only)
            if self.base is not None:
                mapping.lay_base(self.base.descriptor, self.base.size)
            mapping.extend(self.descriptor, size)
            self.mapping = mapping
            self.address = mapping.address + self.start
            self.window_end = 0
        else:
            self.mapping.extend(self.descriptor, size)
        return 0

    # ---- copy ------------------------------------------------------------------------------------------

    def copy_from(self, Log source, uint64_t first, uint64_t stop):
        """Appends the frames in [first, stop) of another log, sealed for their new place. O(bytes).

        Frames that applied nothing are left out: what they say of snapshots and syncs holds for the other log.
        """
        cdef Mapping mapping = source.mapping  # stays, even if `source` is mapped anew meanwhile
        if mapping is None:
            raise NotRunningError(f"{source.path}: the log was closed meanwhile")
        while first < stop:
            first = self.copy_piece(mapping.address + mapping.start, first, stop)

    cdef uint64_t copy_piece(self, const uint8_t *source, uint64_t first, uint64_t stop) except 0:
        """Appends frames of about STAGING_KEPT bytes, at least one; returns where the next one starts."""
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

    # ---- sync ------------------------------------------------------------------------------------------

    def sync(self):
        """Makes all that was appended before the call durable; on failure the log is poisoned."""
        cdef uint64_t target = self.end
        cdef uint64_t written
        cdef bint prepare
        if self.read_only:
            return
        self.check_writable()
        if target == self.durable:
            return
        written = target - self.durable
        self.paced = self.frames_unsynced <= PACED_FRAMES and target - self.durable <= PACED_BYTES
        prepare = self.paced and self.stores and written < self.frames_unsynced * <uint64_t>STORED_BELOW
        self.frames_unsynced = 0
        self.window = min(max(target - self.durable, <uint64_t>SMALLEST_WINDOW), <uint64_t>LARGEST_WINDOW)
        self.window_end = 0
        self.syncing += 1
        started = time.perf_counter()
        try:
            if self.suspect_end:
                self.write_suspect()
            self.directory.sync(self.descriptor)
        except OSError as error:
            failure = StorageError.wrap(error, self.path, "syncing the log")
            self.poison(failure)
            raise failure from error
        except BaseException as error:
            # Nobody knows whether the sync went through.
            self.poison(error)
            raise
        finally:
            self.syncing -= 1
            self.window_end = 0  # the sync has cleaned the pages: a store would be a fault again
        self.check_writable()  # a sync beside this one may have failed: the system reports an error only once
        self.durable = max(self.durable, target)
        self.sync_count += 1
        self.sync_seconds += time.perf_counter() - started
        if prepare:
            self.prepare(written + written // 2)

    cdef int prepare(self, uint64_t size) except -1:
        """Populates zeroed pages for what comes before the next sync, so that the writer neither faults nor asks."""
        cdef Mapping mapping = self.mapping
        cdef uint64_t start = self.start
        cdef uint64_t first = self.end
        cdef uint64_t stop = min(
            self.zeroed_end, first + max(<uint64_t>LEAST_PREPARED, min(size, <uint64_t>SMALLEST_WINDOW)))
        cdef bint populated
        if mapping is None or stop <= first:
            return 0
        with nogil:
            populated = mapping.populate(start + first, start + stop)
        if populated and mapping is self.mapping and self.paced and not self.syncing:  # still so: others ran meanwhile
            self.window_end = stop
        return 0

    def write_suspect(self):
        """Writes again what an earlier life of this log appended, but no sync is known to cover.

        After a failed sync the page cache holds bytes that the disk does not, and calls them clean: only
        bytes written again are sure to be part of the next sync, and on ext4 only those written past the cache.
        """
        cdef uint64_t offset = self.durable
        pages = memoryview(self.mapping)[self.start:]
        while offset < self.suspect_end:
            stop = min(self.suspect_end, offset + (1 << 20))
            self.directory.write(self.descriptor, bytes(pages[offset:stop]), offset)
            offset = stop
        # The last piece was written past the cache before anything could be appended to it (`cut`).
        self.directory.write_past_cache(
            self.descriptor, self.name, self.durable, self.suspect_end - self.suspect_end % PIECE)
        self.check_suspect()
        # The next frame's watermark says it; where there is much, that is worth a frame of its own.
        self.unnoted = self.suspect_end - self.durable > NOTED_ABOVE
        self.suspect_end = 0

    cdef int check_suspect(self) except -1:
        """Raises unless these are still the frames that recovery found: the cache may have lost them meanwhile."""
        cdef uint64_t offset = self.known_frame
        cdef uint64_t chain = self.known_chain
        while offset < self.durable:
            chain = frame_checksum(self.address + offset)
            offset += frame_length(self.address + offset)
        while offset < self.suspect_end:
            if look_at_frame(
                self.address + offset, self.suspect_end - offset, self.identity, offset, chain
            ) != VALID:
                raise OSError(errno.EIO, f"the frame at offset {offset} was there, and is not any more")
            chain = frame_checksum(self.address + offset)
            offset += frame_length(self.address + offset)
        return 0

    cpdef int check_writable(self) except -1:
        """Raises what every write meets after a failed sync, or read-only."""
        if self.read_only:
            raise ReadOnlyError(f"{self.path}: opened with read_only=True; nothing is written")
        if self.poisoned is None:
            return 0
        raise StorageError(
            self.poisoned.errno,
            f"poisoned: an earlier sync failed ({self.poisoned.strerror}), so what the disk holds is unknown; "
            "close this state machine and open the directory again", self.path)

    def poison(self, error):
        """Refuses every write from here on."""
        if self.poisoned is None:
            told = error.strerror if isinstance(error, StorageError) else f"interrupted: {error!r}"
            # Not the error itself: with its traceback it would keep alive whatever its frames hold.
            self.poisoned = StorageError(getattr(error, "errno", None), told, self.path)
            logger.error("%s: poisoned, nothing more is written: %s", self.path, error)

    def trim(self):
        """Gives back what was allocated ahead."""
        with storage_errors(self.path, "trimming the log"):
            self.directory.truncate(self.descriptor, self.end)
            self.allocated = self.end
            self.mapping.shrink(self.end)
        self.window_end = self.zeroed_end = 0

    # ---- recover ---------------------------------------------------------------------------------------

    def recover(
        self, Terms terms, current, expect_applied=None, *, saved=None, metadata=None, verify=None,
    ):
        """Find the end of the log, add to `terms`, and cut a torn tail. Return a `Recovery`.

        `current`: what CURRENT says. With a saved table's head, the frames that it covers are not looked at: `terms`
        and `metadata`, of the newest snapshot, hold what they say. `verify()` may look at more, when the end is known.
        Raises `CorruptionError`; then nothing was touched.
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
            known_durable = max(known_durable, <uint64_t>saved.log_offset)  # it was saved after a sync
        self.known_frame, self.known_chain = scan.end, scan.chain
        scan.whole_frames_only = self.read_only
        started = time.perf_counter()
        scan.read_frames()
        scan.judge_durable(known_durable)
        self.judge_current(current)
        torn_end = scan.end if self.read_only else scan.look_behind(self.descriptor)
        scan.judge_snapshot(metadata)
        judge_expected(self.path, scan.end, expect_applied, scan.last_applied(), terms)
        self.found(scan.end, scan.watermark)
        self.frames, self.last_frame, self.chain = scan.frames, scan.last_frame, scan.chain
        if verify is not None:
            verify()
        if not self.read_only:
            self.cut(self.end, torn_end, self.durable)
        return Recovery(
            clean=self.end == self.durable and torn_end == self.end, frames=scan.frames, log_bytes=self.end,
            torn_bytes=torn_end - self.end, suspect_bytes=self.end - self.durable,
            seconds=time.perf_counter() - started)

    def found(self, uint64_t end, uint64_t durable):
        """Where its frames end, and up to where they are known durable: its first sync writes the rest again."""
        self.end = self.settled_end = self.writeback_end = end
        self.durable = max(durable, <uint64_t>LOG_HEADER_SIZE)
        self.suspect_end = end if end > self.durable else 0

    def judge_current(self, current):
        """Raise `CorruptionError` unless the frame that CURRENT names is there: the log is of another history then."""
        if current.last_frame and not self.is_frame(current.last_frame, current.durable_offset, current.last_checksum):
            raise CorruptionError(
                self.path, current.last_frame,
                f"the frame of checksum {current.last_checksum:#018x} up to offset {current.durable_offset}, which "
                "CURRENT names", "another one: CURRENT and this log are of different histories",
                "restore both from one copy of the directory")

    cdef bint is_frame(self, uint64_t offset, uint64_t end, uint64_t checksum) noexcept:
        """Whether the frame at an offset ends where it should, and is that of a checksum: then all before it are, too.

        It is not hashed. O(1).
        """
        cdef const uint8_t *frame = self.address + offset
        return (
            <uint64_t>LOG_HEADER_SIZE <= offset < self.allocated and not offset & 7
            and look_at_header(frame, self.allocated - offset, self.identity, offset) == VALID
            and offset + frame_length(frame) == end and frame_checksum(frame) == checksum)

    def damage_at(self, uint64_t place):
        """The error for a record of the arena that says that it is longer than it can be."""
        path, offset = self.path, place
        if place >= self.start:
            offset -= self.start
        elif self.base is not None:
            path = self.base.path
        return CorruptionError(path, offset, "a record within the file", "one that says it is longer")

    def last_frame_up_to(self, uint64_t index, uint64_t at_least=0):
        """Return the end of the last frame that applied nothing after an index, and the last entry up to there.

        Frames that begin before the offset `at_least` count whatever they applied. O(frames), without the GIL.
        """
        cdef uint64_t offset = LOG_HEADER_SIZE
        cdef uint64_t end = self.end
        cdef uint64_t last = self.head.base_index
        cdef uint64_t term = self.head.base_term
        cdef const uint8_t *frame
        cdef const Run *run
        cdef Mapping mapping = self.mapping
        if mapping is None:
            raise NotRunningError(f"{self.path}: the log was closed meanwhile")
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

    def last_durable(self, uint64_t index, uint64_t term, uint64_t behind=LOG_HEADER_SIZE):
        """The last entry of the frames that are durable; `index` and `term` are of the last one before `behind`."""
        cdef const Run *runs
        cdef uint32_t count
        cdef uint64_t offset = behind
        while offset < self.end and offset + frame_length(self.address + offset) <= self.durable:
            count = frame_run_count(self.address + offset)
            runs = <const Run *>(self.address + offset + FRAME_RUNS)
            if count:
                index, term = runs[count - 1].last, runs[count - 1].term
            offset += frame_length(self.address + offset)
        return LogId(index, term)

    def cut(self, uint64_t end, uint64_t torn_end, uint64_t durable):
        """Ends the file at `end`. Durable before anything is appended, so that a torn frame never returns.

        The sync is not spared when there is nothing to cut: an opening before this one may have been killed
        between its cut and its sync.
        """
        with storage_errors(self.path, "cutting the log's tail"):
            if self.allocated > end:
                self.directory.truncate(self.descriptor, end)
            if end > durable:
                self.directory.write_past_cache(self.descriptor, self.name, max(durable, end - end % PIECE), end)
            self.directory.sync(self.descriptor)
        if torn_end > end:
            logger.warning(
                "%s: cut a torn tail of %d bytes at offset %d: it was being written when the process "
                "or the machine stopped", self.path, torn_end - end, end)
        self.allocated = end
        with storage_errors(self.path, "mapping the log without its tail"):
            self.mapping.shrink(end)

    def verification(self):
        """What `verify_file` needs to read the log as it is now, even when it is closed meanwhile."""
        descriptor = self.descriptor.duplicate()
        cdef uint64_t end = self.end       # in one step with the checksum
        cdef uint64_t chain = self.chain
        return descriptor, self.head, self.path, end, chain

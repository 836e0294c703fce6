"""A file of frames: appended to through a mapping, made durable by syncs, cut where a torn tail begins.

A state machine's log and a segment of the journal are such files. They differ in their headers, and in the content of
their frames.

On file systems where stores through a mapping are not safe, `pwrite` writes all frames. Elsewhere, how a frame is
written depends on how often the file is flushed (measurements: docs/design.md):

- between infrequent flushes, small frames are stored into pages that were populated ahead;
- while flushes are frequent, they are stored into pages as well, but each flush populates only about as many pages as
  were written since the flush before it;
- large frames, and frames that do not fit into those pages, are written by `pwrite` into allocated blocks.

All are read through one mapping, which is coherent with `pwrite`. A frame counts only once it is complete, and counts
as durable only once a sync that began after it was written has succeeded. If a sync fails, the file is *poisoned*: it
is unknown what the disk holds, so nothing more is written to it.
"""

import errno
import logging
import os
import time

from cpython.buffer cimport PyBUF_READ
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from fastsm.disk.format cimport (
    ARENA_LIMIT, FRAME_RUNS, LARGE, LOG_HEADER_SIZE, VALID, frame_checksum, frame_length, look_at_frame, look_at_header,
    seal_frame,
)
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.parts cimport write_frame

from fastsm.disk import headers
from fastsm.errors import ReadOnlyError, StorageError
from fastsm.disk.files import PIECE, storage_errors
from fastsm.disk.descriptors import write_at

logger = logging.getLogger("fastsm")

cdef enum:
    PAGE = 4096
    SMALLEST_GROWTH = 256 << 10
    LARGEST_GROWTH = 16 << 20
    SMALLEST_WINDOW = 64 << 10
    LEAST_PREPARED = 8 << 10
    LARGEST_WINDOW = 512 << 10
    ZEROED_AHEAD = 1 << 20
    STORED_BELOW = 12 << 10      # storing a larger frame into pages costs more than `pwrite`
    PACED_FRAMES = 64            # flushes are frequent: at most this many frames, and
    PACED_BYTES = 256 << 10      # this many bytes, were written between two flushes
    FAULTED_ABOVE = 128 << 10    # longer frames in parts are not settled: a page fault maps 16 of their pages
    NOTED_ABOVE = 64 << 10       # bytes; smaller suspect parts are quickly read and rewritten
    WRITEBACK_ABOVE = 4 << 20   # unsynced bytes after which the system is told to start writing back
    CHECKED_PIECE = 16 << 20     # bytes of frames that are checked between two checks for signals


cdef bytes NO_FRAME = bytes(FRAME_RUNS)  # the header of no frame


cdef uint64_t seal_frames(
    uint8_t *frames, uint64_t total, uint64_t identity, uint64_t offset, uint64_t durable, uint64_t *chain
) noexcept nogil:
    """Seals consecutive frames, which have no runs; returns the offset of the last one."""
    cdef uint64_t done = 0
    cdef uint64_t length = 0
    while done < total:
        length = frame_length(frames + done)
        chain[0] = seal_frame(frames + done, length, 0, identity, offset + done, durable, chain[0])
        done += length
    return offset + total - length


cdef class FrameFile:
    """One file of frames, open for appending. Subclasses define the content of its frames and of its header.

    Thread safety: `begin_frame` to `commit_frame` under the writer's turn; `sync` from any thread; reads
    of what is below `end` from any thread, without the GIL, for as long as `mapping` is held.
    """

    def __cinit__(self, directory, head, descriptor, base=None, bint read_only=False):
        self.read_only = read_only
        self.directory = directory
        self.head = head
        self.identity = head.identity
        self.descriptor = descriptor
        self.window = SMALLEST_WINDOW
        self.end = self.durable = LOG_HEADER_SIZE

    def __dealloc__(self):
        free(self.staging)

    def __repr__(self):
        return f"<{type(self).__name__} {self.path!r}: {self.end} bytes, {self.durable} durable>"

    cdef int attach(self, bytes packed_head, uint64_t size) except -1:
        """Maps all of an open file of `size` bytes. The first frame is chained to the checksum of the file's header."""
        self.chain = self.known_chain = headers.head_checksum(packed_head)
        self.known_frame = LOG_HEADER_SIZE
        self.stores = not self.read_only and self.directory.stores_are_safe(self.descriptor)
        self.allocated = size
        self.map_up_to(size)
        return 0

    def close(self):
        """Closes the descriptor. The pages stay mapped as long as `mapping` is referenced. Idempotent."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            self.directory.close_file(descriptor)

    def let_go(self):
        """Drops the mapping, which is not read through this object any more. To be called after `close`."""
        _old = self.mapping  # held until all is changed: freeing it lets other threads run
        self.mapping = None
        self.address = NULL

    # ---- append ----------------------------------------------------------------------------------------

    cdef uint8_t *begin_frame(self, uint64_t length) except NULL:
        """Returns where to build a frame of `length` bytes: in the file's own pages, or in staging memory.

        Reserves room in the file for it: if the disk is full, that is an error here, and never later.
        """
        cdef uint64_t stop = self.end + length
        self.require_writable()
        self.settle()  # before the frame is written: a later error would seem to come from a chunk that counts
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
        """Returns whether a frame of `length` bytes fits into prepared pages, so that it needs no system call."""
        cdef uint64_t stop = self.end + length
        return (
            self.stores and not self.syncing and length < STORED_BELOW
            and stop <= self.window_end and stop - self.settled_end < SETTLED_PIECE)

    cdef uint8_t *reserve_staging(self, uint64_t length) except NULL:
        """Returns staging memory, in which frames are built before they are written."""
        if self.staging_room < length:
            free(self.staging)
            self.staging_room = max(length, <uint64_t>STAGING_KEPT)
            self.staging = <uint8_t *>malloc(self.staging_room)
            if self.staging == NULL:
                self.staging_room = 0
                raise MemoryError(f"not enough memory for a frame of {length} bytes")
        return self.staging

    cdef int commit_frame(self, uint8_t *frame, uint64_t length, uint32_t run_count) except -1:
        """Seals the frame and writes it to the file. It counts from here on, unless this raises."""
        cdef uint64_t chain = self.chain
        cdef uint64_t end = self.end
        cdef uint64_t durable = self.durable
        if length > LARGE:
            with nogil:
                chain = seal_frame(frame, length, run_count, self.identity, end, durable, chain)
        else:
            chain = seal_frame(frame, length, run_count, self.identity, end, durable, chain)
        if frame == self.staging:
            self.write_staged(length)
        return self.note_frames(end, length, 1, chain)

    cdef int note_frames(self, uint64_t last, uint64_t total, size_t count, uint64_t chain) except -1:
        """Counts frames that were written, the last of which starts at `last`.

        They are one write, so they count as one frame when the rhythm of flushes is determined.
        """
        self.last_frame, self.chain = last, chain
        self.end += total
        self.frames += count
        self.frames_unsynced += 1
        if self.paced and (
            self.frames_unsynced > PACED_FRAMES or self.end - self.durable > PACED_BYTES
        ):
            self.paced = False
        return 0

    # ---- frames in parts: large values are written without being copied -----------------------------------

    cdef bint takes_parts(self, uint64_t length) except -1:
        """Returns whether a frame of `length` bytes may be written in parts.

        That is not so while frames are written into blocks that are zeroed first, nor with a custom directory class,
        which gets each frame in one piece.
        """
        return not (self.paced and length <= PACED_BYTES) and self.directory.write is write_at

    cdef uint8_t *begin_parts(self, uint64_t length, uint64_t staged) except NULL:
        """Reserves room in the file for a frame of `length` bytes; returns memory to build `staged` of them in."""
        self.require_writable()
        self.settle()
        if self.end + length > self.allocated:
            self.grow(self.end + length)
        if self.end + length > self.window_end:
            self.window_end = 0
        return self.reserve_staging(staged)

    cdef int commit_parts(self, Part *parts, size_t count, uint64_t length, uint32_t run_count) except -1:
        """Does what `commit_frame` does, for a frame in parts, which the caller keeps alive. Works without the GIL."""
        cdef int descriptor = self.descriptor.number
        cdef uint64_t durable = self.durable  # a sync may move it meanwhile
        cdef uint64_t chain = self.chain
        cdef int failure
        try:
            with nogil:
                failure = write_frame(
                    descriptor, parts, count, length, run_count, self.identity, self.end, durable, &chain)
            if failure:
                raise OSError(failure, os.strerror(failure))
        except BaseException as error:
            self.void_frame()
            if isinstance(error, OSError):
                raise StorageError.wrap(error, self.path, "writing a frame") from error
            raise
        if length > FAULTED_ABOVE:
            self.faulted_end = self.end + length
        return self.note_frames(self.end, length, 1, chain)

    cdef int commit_frames(self, uint8_t *frames, uint64_t total, size_t count) except -1:
        """Commits consecutive frames whose lengths are filled in, all of them or none, as `commit_frame` does one."""
        cdef uint64_t durable = self.durable
        cdef uint64_t offset = self.end
        cdef uint64_t chain = self.chain
        cdef uint64_t last
        if total > LARGE:
            with nogil:
                last = seal_frames(frames, total, self.identity, offset, durable, &chain)
        else:
            last = seal_frames(frames, total, self.identity, offset, durable, &chain)
        if frames == self.staging:
            self.write_staged(total)
        return self.note_frames(last, total, count, chain)

    cdef int settle_piece(self) except -1:
        """Makes written pages present in the mapping for reads alone, so that reading them takes no page fault.

        Pages of values so large that a fault does not matter are left out. If much is unsynced, this also starts
        writing it back: the disk works during further appends, and a sync stays short.
        """
        cdef uint64_t stop = self.end & ~<uint64_t>(PAGE - 1)
        cdef uint64_t first = max(self.settled_end, self.faulted_end)
        if first < stop:
            self.mapping.settle(self.start + first, self.start + stop)
        self.settled_end = stop
        if stop > self.durable + WRITEBACK_ABOVE:
            first = max(self.writeback_end, self.durable & ~<uint64_t>(PAGE - 1))
            self.directory.start_writeback(self.descriptor, first, stop - first)
            self.writeback_end = stop
        return 0

    cdef int write_staged(self, uint64_t length) except -1:
        """Writes a frame from staging memory. Once it is written, no Python code runs, and so no signal handler."""
        try:
            # A frame whose size alone makes flushes infrequent is written once: zeros first would double the work.
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
        """Writes zeros where the next frames will go: a sync is faster over blocks that were written before.

        If stores are safe, frames are then stored into these pages, which are in memory and dirty anyway.
        """
        cdef uint64_t stop = min(self.allocated, self.end + length + ZEROED_AHEAD)
        self.directory.write(self.descriptor, bytes(stop - self.end), self.end)
        self.zeroed_end = stop
        if self.stores and self.mapping.populate(self.start + self.end, self.start + stop):
            self.window_end = stop

    def void_frame(self):
        """Zeroes the header of a failed frame: its caller is told that it failed, so recovery must not find it."""
        cdef bint voided = False
        try:
            self.directory.write(self.descriptor, NO_FRAME, self.end)
            voided = True
        except OSError as error:
            self.poison(StorageError.wrap(error, self.path, "taking back a frame"))
        finally:
            if not voided:
                self.failed = True

    cdef int grow(self, uint64_t needed) except -1:
        """Allocates blocks for `needed` bytes in total, plus some ahead, and maps them."""
        cdef uint64_t ahead = min(max(self.allocated / 4, <uint64_t>SMALLEST_GROWTH), <uint64_t>LARGEST_GROWTH)
        cdef uint64_t size = (needed + ahead + PAGE - 1) & ~<uint64_t>(PAGE - 1)
        if self.start + needed > ARENA_LIMIT:
            raise StorageError(
                errno.EFBIG,
                f"expected at most {ARENA_LIMIT} bytes of base and log, found {self.start + needed} bytes; compact, or "
                "write less at a time", self.path)
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
            # Readers of the old mapping keep it; both show the same pages.
            mapping = Mapping(self.start + 2 * size, self.read_only)
            self.lay_base(mapping)
            mapping.extend(self.descriptor, size)
            self.mapping = mapping
            self.address = mapping.address + self.start
            self.window_end = 0
        else:
            self.mapping.extend(self.descriptor, size)
        return 0

    cdef int lay_base(self, Mapping mapping) except -1:
        """Maps what precedes the file in a new mapping: nothing for this class."""
        return 0

    # ---- sync ------------------------------------------------------------------------------------------

    def sync(self):
        """Makes everything appended before the call durable; if the sync fails, the log is poisoned."""
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
                self.repeat_suspect()
            self.ask_sync()
        finally:
            self.syncing -= 1
            self.window_end = 0  # the sync has made the pages clean, so a store would fault again
        self.check_writable()  # another sync may have failed meanwhile: the system reports an error only once
        self.durable = max(self.durable, target)
        self.sync_count += 1
        self.sync_seconds += time.perf_counter() - started
        if prepare:
            self.prepare(written + written // 2)

    cdef int ask_sync(self) except -1:
        """Syncs the file; poisons it on any error, even a lack of memory: what the disk holds is then unknown."""
        cdef bint synced = False
        try:
            self.directory.sync(self.descriptor)
            synced = True
        except OSError as error:
            failure = StorageError.wrap(error, self.path, "syncing the log")
            self.poison(failure)
            raise failure from error
        except BaseException as error:
            self.poison(error)
            raise
        finally:
            if not synced:
                self.failed = True
        return 0

    cdef int repeat_suspect(self) except -1:
        """Writes the suspect part again. If interrupted, all of it stays suspect, and the next sync starts over."""
        try:
            self.write_suspect()
        except OSError as error:
            failure = StorageError.wrap(error, self.path, "rewriting bytes that an earlier process may not have synced")
            self.poison(failure)
            raise failure from error
        return 0

    cdef int prepare(self, uint64_t size) except -1:
        """Populates zeroed pages for writes before the next sync, so that the writer takes no faults."""
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
        # Unchanged, although other threads ran
        if populated and mapping is self.mapping and self.paced and not self.syncing:
            self.window_end = stop
        return 0

    def write_suspect(self):
        """Rewrites what an earlier process appended to this log, and no sync is known to cover.

        After a failed sync, the page cache may hold bytes that the disk does not, yet consider them clean: only
        rewritten bytes are sure to be part of the next sync, and on ext4 only if they are written past the cache.
        """
        cdef uint64_t offset = self.durable
        pages = memoryview(self.mapping)[self.start:]
        while offset < self.suspect_end:
            stop = min(self.suspect_end, offset + (1 << 20))
            self.directory.write(self.descriptor, bytes(pages[offset:stop]), offset)
            offset = stop
        # The last piece was written past the cache before anything could be appended to it (see `cut`).
        self.directory.write_past_cache(
            self.descriptor, self.name, self.durable, self.suspect_end - self.suspect_end % PIECE)
        self.check_suspect()
        # The next frame's watermark records this; if the part is large, it is worth a frame of its own.
        self.unnoted = self.suspect_end - self.durable > NOTED_ABOVE
        self.suspect_end = 0

    cdef int check_suspect(self) except -1:
        """Raises unless the suspect frames are as recovery found them: the cache may have lost them in the meantime.

        Works without the GIL, in pieces; signal handlers run between them.
        """
        cdef Mapping mapping = self.mapping  # held: its pages stay valid, whatever is appended meanwhile
        cdef const uint8_t *file = mapping.address + self.start
        cdef uint64_t durable = self.durable
        cdef uint64_t end = self.suspect_end
        cdef uint64_t offset = self.known_frame
        cdef uint64_t chain = self.known_chain
        cdef uint64_t stop
        cdef bint sound = True
        while offset < end:
            stop = offset + CHECKED_PIECE
            with nogil:
                while offset < min(stop, end):
                    if offset >= durable:
                        sound = look_at_frame(file + offset, end - offset, self.identity, offset, chain) == VALID
                        if not sound:
                            break
                    chain = frame_checksum(file + offset)
                    offset += frame_length(file + offset)
            if not sound:
                raise OSError(errno.EIO, f"the frame at offset {offset}, which recovery had found, is no longer there")
            PyErr_CheckSignals()
        return 0

    cpdef int check_writable(self) except -1:
        """Raises if the file is opened read-only, or poisoned by a failed sync."""
        if self.read_only:
            raise ReadOnlyError(f"{self.path}: opened with read_only=True; to write, open it without that option")
        if not self.failed:
            return 0
        reason = self.poisoned or StorageError(None, "there was no memory to tell why", self.path)
        raise StorageError(
            reason.errno,
            f"poisoned: an earlier sync failed ({reason.strerror}), so what the disk holds is unknown; "
            "close it and open the directory again", self.path)

    def poison(self, error):
        """Makes every later write fail. Needs memory only to say why."""
        self.failed = True
        if self.poisoned is None:
            try:
                told = error.strerror if isinstance(error, StorageError) else f"interrupted: {error!r}"
                # Not the error itself: its traceback would keep alive whatever its frames refer to.
                self.poisoned = StorageError(getattr(error, "errno", None), told, self.path)
            finally:
                if self.waiters is not None:
                    self.waiters.end_poisoned()
            logger.error("%s: poisoned, nothing more is written: %s", self.path, error)

    def trim(self):
        """Frees the space that was allocated ahead."""
        with storage_errors(self.path, "trimming the log"):
            self.directory.truncate(self.descriptor, self.end)
            self.allocated = self.end
            self.mapping.shrink(self.end)
        self.window_end = self.zeroed_end = 0

    # ---- recover ---------------------------------------------------------------------------------------

    def found(self, uint64_t end, uint64_t durable):
        """Takes over the end and the durable offset that recovery found; the first sync rewrites what is between."""
        self.end = self.settled_end = self.faulted_end = self.writeback_end = end
        self.durable = max(durable, <uint64_t>LOG_HEADER_SIZE)
        self.suspect_end = end if end > self.durable else 0

    cdef bint is_frame(self, uint64_t offset, uint64_t end, uint64_t checksum) noexcept:
        """Returns whether the frame at an offset has this end and this checksum; if so, all frames before it match too.

        O(1): the frame is not hashed.
        """
        cdef const uint8_t *frame = self.address + offset
        return (
            <uint64_t>LOG_HEADER_SIZE <= offset < self.allocated and not offset & 7
            and look_at_header(frame, self.allocated - offset, self.identity, offset) == VALID
            and offset + frame_length(frame) == end and frame_checksum(frame) == checksum)

    def cut(self, uint64_t end, uint64_t torn_end, uint64_t durable):
        """Ends the file at `end`, durably, before anything is appended, so that a torn frame never reappears.

        The sync is made even if there is nothing to cut: an earlier opening may have been killed between its cut and
        its sync.
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

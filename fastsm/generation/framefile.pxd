from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.descriptors cimport Part
from fastsm.disk.mapping cimport Mapping

cdef enum:
    SETTLED_PIECE = 1 << 20
    STAGING_KEPT = 1 << 20       # bytes of staging memory that are kept for later frames


cdef class FrameFile:
    # Invariant: LOG_HEADER_SIZE <= durable <= end <= allocated; [0, end) is mapped and never changes again.
    cdef readonly object directory
    cdef readonly str name
    cdef readonly str path
    cdef readonly object head
    cdef readonly Mapping mapping
    cdef readonly uint64_t start         # where the file starts in the mapping
    cdef uint8_t *address                # of the file's first byte
    cdef object descriptor               # None: closed
    cdef readonly bint read_only
    cdef uint64_t identity
    cdef readonly uint64_t end           # where the next frame will start
    cdef readonly uint64_t durable       # everything below is known to survive a power loss
    cdef readonly uint64_t allocated     # the file's size: every byte has a block
    cdef uint64_t window_end             # pages of [end, window_end) are populated
    cdef uint64_t window                 # how many bytes to populate ahead
    cdef uint64_t zeroed_end             # blocks of [end, zeroed_end) contain written zeros
    cdef uint64_t settled_end            # pages below were made present in the mapping
    cdef uint64_t faulted_end            # the end of the last long frame in parts, whose pages are not
    cdef uint64_t writeback_end          # the system was told to start writing back everything below
    cdef bint stores                     # small frames are stored through the mapping
    cdef bint paced                      # flushes are frequent: frames are written into zeroed blocks
    cdef int syncing
    cdef readonly uint64_t frames
    cdef readonly uint64_t last_frame    # where the last frame starts; 0: there is none
    cdef readonly uint64_t chain         # its checksum, or the header's, to which the next frame is chained
    cdef uint32_t frames_unsynced
    cdef uint64_t suspect_end            # [durable, suspect_end) is rewritten by the first sync
    # A sync has covered a large suspect part, which no frame records as durable yet
    cdef public bint unnoted
    cdef uint64_t known_frame            # a frame starts here, at or before the first suspect frame,
    cdef uint64_t known_chain            # and is chained to this checksum
    cdef uint8_t *staging
    cdef uint64_t staging_room
    cdef bint failed                     # nothing more is written: set first, since it needs no memory
    cdef readonly object poisoned        # the StorageError that says why; None: not failed, or no memory for it
    cdef public object waiters           # `end_poisoned` is called on it when the file is poisoned, unless None
    cdef readonly uint64_t sync_count
    cdef readonly double sync_seconds

    cpdef int check_writable(self) except -1

    cdef inline int require_writable(self) except -1:
        """Raises if the file is read-only or poisoned: the fast path of `check_writable`."""
        return self.check_writable() if self.read_only or self.failed else 0

    cdef inline int settle(self) except -1:
        """Calls `settle_piece` for each mebibyte or so of new frames."""
        return self.settle_piece() if self.end - self.settled_end >= SETTLED_PIECE else 0

    cdef int attach(self, bytes packed_head, uint64_t size) except -1
    cdef int lay_base(self, Mapping mapping) except -1
    cdef int ask_sync(self) except -1
    cdef int repeat_suspect(self) except -1
    cdef int check_suspect(self) except -1
    cdef bint is_frame(self, uint64_t offset, uint64_t end, uint64_t checksum) noexcept
    cdef uint8_t *begin_frame(self, uint64_t length) except NULL
    cdef int commit_frame(self, uint8_t *frame, uint64_t length, uint32_t run_count) except -1
    cdef bint takes_parts(self, uint64_t length) except -1
    cdef uint8_t *begin_parts(self, uint64_t length, uint64_t staged) except NULL
    cdef int commit_parts(self, Part *parts, size_t count, uint64_t length, uint32_t run_count) except -1
    cdef int note_frames(self, uint64_t last, uint64_t total, size_t count, uint64_t chain) except -1
    cdef int commit_frames(self, uint8_t *frames, uint64_t total, size_t count) except -1
    cdef int write_staged(self, uint64_t length) except -1
    cdef int settle_piece(self) except -1
    cdef int prepare(self, uint64_t size) except -1
    cdef int grow(self, uint64_t needed) except -1
    cdef int map_up_to(self, uint64_t size) except -1
    cdef uint8_t *reserve_staging(self, uint64_t length) except NULL

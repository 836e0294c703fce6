"""The frames of a log that its owner keeps writing, as far as they are published. No byte after that is touched."""

import os

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.format cimport (
    FRAME_RUNS, LARGE, VALID, frame_checksum, frame_length, look_at_frame, look_at_header,
)
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.published cimport Publication
from fastsm.generation.log cimport Log

from fastsm.disk.files import storage_errors
from fastsm.errors import CorruptionError

cdef enum:
    # A mapping extends this far past what is published, so that it need not grow with each frame
    MAPPED_AHEAD = 16 << 20
    MAPPING_UNIT = 64 << 10


cdef class Lookout:
    """Where a reader (or its tail) looks for news: a publication, and the time to check its file's name again.

    Thread safety: everything but reads is for the thread that follows.
    """

    def turn_to(self, Publication publication=None):
        """Looks at this publication from here on; everything in it counts as new."""
        self.publication = publication
        self.look_at = now() + LOOK_INTERVAL
        if publication is not None:
            publication.forget()

    def is_due(self):
        """Begins a look; returns whether to check the name of the publication's file, which may have been replaced."""
        self.again = False
        if now() < self.look_at:
            return False
        self.look_at = now() + LOOK_INTERVAL
        return True

    def look_again(self):
        """Makes a waiting read look again after RETRY_INTERVAL, even without news; others look at once."""
        self.again = True
        self.look_at = now() + RETRY_INTERVAL

    cpdef bint is_worth_a_look(self) noexcept:
        """Returns whether a waiting read should look. `again` does not count, or it would look as often as it can."""
        return now() >= self.look_at or (self.publication is not None and self.publication.is_new())

    def may_lead_elsewhere(self):
        """Returns whether a look may find the state in another file, which may have to be opened."""
        return self.publication is None or now() >= self.look_at


cdef uint64_t reach(Log log, uint64_t end, uint64_t file_size) except? 0:
    """Maps a log at least up to `end`; `file_size` is the known size of its file; returns it, updated if too small.

    The file may end before the mapping does; those pages are never touched.
    """
    cdef uint64_t size = (end + MAPPED_AHEAD + MAPPING_UNIT - 1) & ~<uint64_t>(MAPPING_UNIT - 1)
    if end > file_size:
        with storage_errors(log.path, "reading the size of the log"):
            file_size = os.fstat(log.descriptor).st_size
        if end > file_size:
            raise not_published(log, end, f"a file of {file_size} bytes")
    if log.start + end > log.mapping.mapped:
        log.map_up_to(size if log.mapping.fits(size) else end)
    if end > log.end + LARGE:
        log.mapping.populate_read(log.start + log.end, log.start + end)
    return file_size


cdef object not_published(Log log, uint64_t end, str found):
    return CorruptionError(
        log.path, log.end, f"complete frames up to offset {end}, as its owner has published", found,
        "restart the owner, or run `fastsm verify`")


cdef int check_next(Mapping mapping, Log log, uint64_t end) except -1:
    """Returns VALID if a frame starts at the end of the log, and is complete before offset `end`."""
    cdef const uint8_t *frame = mapping.address + mapping.start + log.end
    cdef uint64_t identity = log.identity
    cdef uint64_t offset = log.end
    cdef uint64_t chain = log.chain
    cdef int finding = look_at_header(frame, end - offset, identity, offset)
    if finding != VALID:
        return finding
    if frame_length(frame) > LARGE:
        with nogil:
            finding = look_at_frame(frame, end - offset, identity, offset, chain)
        return finding
    return look_at_frame(frame, end - offset, identity, offset, chain)


def is_in(Log log not None, Log other not None):
    """Returns whether `other`, a log of the same identity, has all frames that were taken from `log`."""
    if other.end < log.end:
        return False
    if log.last_frame == 0:
        return other.head == log.head
    return other.is_frame(log.last_frame, log.end, log.chain)


def is_still_there(Log log not None):
    """Returns whether a log's file still has its name, and the last frame that was taken, hence all frames before it.

    Reads the file instead of the mapping, since the file may have been cut.
    """
    cdef bytes found
    with storage_errors(log.path, "comparing the file with the open log"):
        try:
            if not os.path.samestat(os.fstat(log.descriptor), os.stat(log.path, follow_symlinks=False)):
                return False
        except FileNotFoundError:
            return False
        found = os.pread(log.descriptor, FRAME_RUNS, log.last_frame)
    if log.last_frame == 0 or len(found) < FRAME_RUNS:
        return log.last_frame == 0
    frame = <const uint8_t *>PyBytes_AS_STRING(found)
    return log.last_frame + frame_length(frame) == log.end and frame_checksum(frame) == log.chain

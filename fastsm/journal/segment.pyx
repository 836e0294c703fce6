"""One file of the journal: frames appended and synced as in a state machine's log, and read back after any end."""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport LARGE, LOG_HEADER_SIZE, VALID, look_at_frame
from fastsm.journal.format cimport ITEM_STATE, item_kind, item_length, look_at_item, write_item
from fastsm.generation.log cimport Log

from fastsm.journal import format as journal_format
from fastsm.errors import CorruptionError
from fastsm.disk.files import storage_errors
from fastsm.journal.format import SegmentHead
from fastsm.disk.tail import data_ranges, torn_tail_end


def segment_name(number):
    """The file name of a segment."""
    return f"journal-{number}"


cdef class Segment(Log):
    """One file of the journal: what `Log` does for appending and syncing, under another header.

    `begin` is the least index of an entry that may lie in it.
    """

    def __cinit__(self, directory, head, descriptor, *_):
        self.name = segment_name(head.generation)
        self.path = directory.path_of(self.name)
        self.mappings = []

    @staticmethod
    def adopt_file(directory, head, descriptor, uint64_t size):
        """The segment in an open file of so many bytes, all of which are mapped."""
        cdef Segment segment = Segment(directory, head, descriptor)
        segment.stores = directory.stores_are_safe(descriptor)
        segment.begin_chain(journal_format.pack_segment_head(head))
        segment.allocated = size
        segment.map_up_to(size)
        segment.hold_mapping()
        return segment

    @staticmethod
    def create_file(directory, number):
        """A new segment without frames, durable, its name too."""
        head = SegmentHead(number, int.from_bytes(os.urandom(8), "little"))
        with storage_errors(directory.path_of(segment_name(number)), "creating a segment of the journal"):
            descriptor = directory.create_file(segment_name(number))
            try:
                directory.write(descriptor, journal_format.pack_segment_head(head), 0)
                directory.sync(descriptor)
                directory.sync_directory()
                segment = Segment.adopt_file(directory, head, descriptor, LOG_HEADER_SIZE)
            except BaseException:
                directory.close_file(descriptor)
                raise
        return segment

    cdef int hold_mapping(self) except -1:
        """Entries are pointers into the mapping, so each that there was is kept as long as the segment."""
        if not self.mappings or self.mappings[-1] is not self.mapping:
            self.mappings.append(self.mapping)
        return 0

    cdef const uint8_t *append(
        self, uint32_t kind, uint64_t index, uint64_t term, const uint8_t *data, uint64_t size
    ) except NULL:
        """Appends a frame; returns where it lies. On an error it does not count."""
        cdef uint64_t offset = self.end
        cdef uint64_t length = item_length(size)
        cdef uint8_t *frame = self.begin_frame(length)
        self.hold_mapping()
        if length > LARGE:
            with nogil:
                write_item(frame, kind, index, term, data, <uint32_t>size)
        else:
            write_item(frame, kind, index, term, data, <uint32_t>size)
        self.commit_frame(frame, length, 0)
        return self.address + offset

    # ---- recover ---------------------------------------------------------------------------------------

    @staticmethod
    def open_file(directory, number):
        """The segment of a number, its header checked; None when its creation was cut short."""
        name = segment_name(number)
        path = directory.path_of(name)
        with storage_errors(path, "opening a segment of the journal"):
            descriptor = directory.open_file(name)
            try:
                size = directory.size(descriptor)
                try:
                    head = journal_format.unpack_segment_head(os.pread(descriptor, LOG_HEADER_SIZE, 0), path)
                except CorruptionError:
                    if any(os.pread(descriptor, stop - start, start).strip(b"\0")
                           for start, stop in data_ranges(descriptor, min(size, LOG_HEADER_SIZE), size)):
                        raise
                    directory.close_file(descriptor)
                    return None
                if head.generation != number:
                    raise CorruptionError(path, 16, f"segment {number}", f"segment {head.generation}")
                segment = Segment.adopt_file(directory, head, descriptor, size)
            except BaseException:
                directory.close_file(descriptor)
                raise
        return segment

    cdef const uint8_t *frame_of(self, uint64_t offset, uint64_t previous) except? NULL:
        """The valid frame at an offset, chained to the previous one's checksum, or NULL.

        Raises `CorruptionError` for one whose content makes no sense.
        """
        cdef const uint8_t *frame = self.address + offset
        if look_at_frame(frame, self.allocated - offset, self.identity, offset, previous) != VALID:
            return NULL
        if look_at_item(frame, self.allocated - offset) != VALID or (
            (item_kind(frame) == ITEM_STATE) != (offset == LOG_HEADER_SIZE)
        ):
            raise CorruptionError(
                self.path, offset, "a frame whose content adds up",
                "one with a matching checksum whose content does not")
        return frame

    def corrupt(self, uint64_t offset, expected):
        """The error for what is not right at an offset."""
        return CorruptionError(self.path, offset, expected, "bytes that are no frame of the journal, or the file's end")

    cdef uint64_t look_behind(self, uint64_t end) except? 0:
        """Return where the torn tail after the last valid frame, which ends at `end`, ends itself.

        Raises `CorruptionError` when it proves that the segment was durable beyond `end`.
        """
        return torn_tail_end(self.descriptor, self.identity, end, self.allocated, self.path)

    def finish_recovery(self, uint64_t end, uint64_t durable, uint64_t torn_end):
        """Ends the segment at `end`, for good: nothing torn comes back."""
        self.cut(end, torn_end, max(durable, <uint64_t>LOG_HEADER_SIZE))
        self.found(end, durable)

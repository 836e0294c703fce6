"""One file of the journal: frames appended and synced as in a state machine's log, and read back after any end."""

import os

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport (
    FRAME_RUNS, LARGE, LOG_HEADER_SIZE, VALID, frame_is_sealed, frame_length, frame_watermark, look_at_frame,
)
from fastsm.disk.hashing cimport load64
from fastsm.journal.format cimport ITEM_STATE, item_kind, item_length, look_at_item, write_item
from fastsm.generation.log cimport Log

from fastsm.journal import format as journal_format
from fastsm.errors import CorruptionError
from fastsm.disk.files import storage_errors
from fastsm.journal.format import SegmentHead
from fastsm.generation.recovery import data_ranges

cdef uint64_t SLICE = 16 << 20    # bytes between two looks at signals


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

    cdef const uint8_t *frame_of(self, uint64_t offset) except? NULL:
        """The valid frame at an offset, or NULL. Raises `CorruptionError` for one whose content makes no sense."""
        cdef const uint8_t *frame = self.address + offset
        if look_at_frame(frame, self.allocated - offset, self.identity, offset) != VALID:
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
        """Where the last byte that is not zero ends behind the last valid frame, at `end`.

        A valid frame there that says that the segment was durable beyond `end` proves corruption.
        """
        cdef uint64_t torn_end = end
        cdef uint64_t offset, stop, pause
        cdef int64_t budget = 4 * <int64_t>(self.allocated - end) + (64 << 20)
        for start, limit in data_ranges(self.descriptor, end, self.allocated):
            offset, stop = max(end, <uint64_t>start & ~<uint64_t>7), limit
            while offset < stop:
                pause = min(stop, offset + SLICE)
                with nogil:
                    offset = self.search(offset, pause, end, &torn_end, &budget)
                PyErr_CheckSignals()
                if offset < pause:
                    raise self.corrupt(
                        end, f"a frame, for the one at offset {offset} says that the segment was durable behind it")
            if budget < 0:
                raise self.corrupt(end, "a torn tail, not bytes made to look like many frames that overlap")
        return torn_end

    cdef uint64_t search(
        self, uint64_t offset, uint64_t stop, uint64_t end, uint64_t *torn_end, int64_t *budget
    ) noexcept nogil:
        """The first valid frame in [offset, stop) whose watermark is beyond `end`, or `stop`."""
        cdef const uint8_t *frame
        while offset < stop:
            frame = self.address + offset
            if self.allocated - offset < FRAME_RUNS:
                while offset < stop:
                    if self.address[offset]:
                        torn_end[0] = offset + 1
                    offset += 1
                return stop
            if load64(frame):
                torn_end[0] = offset + 8
                if (
                    frame_is_sealed(frame, self.identity, offset)
                    and look_at_item(frame, self.allocated - offset) == VALID
                    and frame_watermark(frame, offset) > end and budget[0] >= 0
                ):
                    budget[0] -= frame_length(frame)
                    if look_at_frame(frame, self.allocated - offset, self.identity, offset) == VALID:
                        return offset
            offset += 8
        return stop

    def finish_recovery(self, uint64_t end, uint64_t durable, uint64_t torn_end):
        """Ends the segment at `end`, for good: nothing torn comes back."""
        self.cut(end, torn_end, max(durable, <uint64_t>LOG_HEADER_SIZE))
        self.found(end, durable)

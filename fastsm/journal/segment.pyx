"""One file of a Raft log: frames appended and synced as in a state machine's log, and read back by recovery."""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport LARGE, LOG_HEADER_SIZE, VALID, look_at_frame
from fastsm.disk.descriptors cimport Part
from fastsm.generation.framefile cimport FrameFile
from fastsm.journal.format cimport (
    ITEM_CUT, ITEM_DATA, ITEM_ENTRY, ITEM_STATE, ITEM_VOTE, Item, item_kind, item_length, look_at_item, write_item,
    write_item_head,
)

from fastsm.disk import headers
from fastsm.generation.recovery import whole_frames
from fastsm.journal import format as journal_format
from fastsm.errors import CorruptionError
from fastsm.disk.files import storage_errors
from fastsm.journal.format import SegmentHead
from fastsm.disk.torn_tail import data_ranges, torn_tail_end

cdef enum:
    SMALL_FRAME = ITEM_DATA      # the size of an item without data
    LARGE_ENTRY = 128 << 10      # bytes; a command of this size or more is not copied once more


cdef void write_items(uint8_t *frames, const Item *items, size_t count) noexcept nogil:
    cdef size_t i
    for i in range(count):
        write_item(frames, &items[i])
        frames += item_length(items[i].size)


cdef bint leaves_room(uint32_t kind) noexcept nogil:
    """Returns whether a frame of this kind must not take the last room of a full disk, which a compaction needs."""
    return kind == ITEM_ENTRY or kind == ITEM_VOTE or kind == ITEM_CUT


def segment_name(number):
    """Returns the file name of a segment."""
    return f"journal-{number}"


cdef class Segment(FrameFile):
    """One file of a Raft log, open for appending.

    `begin` is the lowest index of an entry that may be in it.
    """

    def __cinit__(self, directory, head, descriptor, *_):
        self.name = segment_name(head.generation)
        self.path = directory.path_of(self.name)
        self.mappings = []

    @staticmethod
    def adopt(directory, head, descriptor, uint64_t size, bint read_only=False):
        """Returns the segment in an open file of `size` bytes, all of which are mapped."""
        cdef Segment segment = Segment(directory, head, descriptor, None, read_only)
        segment.attach(journal_format.pack_segment_head(head), size)
        segment.hold_mapping()
        return segment

    @staticmethod
    def create(directory, number):
        """Makes a new segment without frames; the file and its name are durable on return."""
        head = SegmentHead(number, int.from_bytes(os.urandom(8), "little"))
        with storage_errors(directory.path_of(segment_name(number)), "creating a segment of the log"):
            descriptor = directory.create_file(segment_name(number))
            try:
                directory.write(descriptor, journal_format.pack_segment_head(head), 0)
                directory.sync(descriptor)
                directory.sync_directory()
                segment = Segment.adopt(directory, head, descriptor, LOG_HEADER_SIZE)
            except BaseException:
                directory.close_file(descriptor)
                raise
        return segment

    cdef int hold_mapping(self) except -1:
        """Keeps the current mapping as long as the segment, since entries are pointers into it."""
        if not self.mappings or self.mappings[-1] is not self.mapping:
            self.mappings.append(self.mapping)
        return 0

    cdef int rest(self) except -1:
        """Closes the descriptor until the next write: a log may have more segments than a process may open files."""
        self.descriptor = None
        return 0

    cdef int wake(self) except -1:
        """Opens the file again, if it was closed by `rest`."""
        if self.descriptor is None:
            with storage_errors(self.path, "opening a segment of the log"):
                self.descriptor = self.directory.open_file(self.name, os.O_RDONLY if self.read_only else os.O_RDWR)
        return 0

    cdef const uint8_t *append(self, const Item *items, size_t count) except NULL:
        """Appends frames, all or none; returns where the first one is. After a crash, a prefix of them may remain.

        After entries, votes and cuts there is always room for one more small frame, so that a log can be compacted even
        on a full disk.
        """
        cdef uint64_t offset = self.end
        cdef uint64_t total = 0
        cdef size_t i
        cdef uint8_t *frames
        for i in range(count):
            total += item_length(items[i].size)
        if count == 1 and items[0].kind == ITEM_ENTRY and items[0].size >= LARGE_ENTRY and self.takes_parts(total):
            return self.append_large(items, total)
        frames = self.begin_frame(total + (SMALL_FRAME if leaves_room(items[0].kind) else 0))
        self.hold_mapping()
        if total > LARGE:
            with nogil:
                write_items(frames, items, count)
        else:
            write_items(frames, items, count)
        self.commit_frames(frames, total, count)
        return self.address + offset

    cdef const uint8_t *append_large(self, const Item *item, uint64_t length) except NULL:
        """Appends one entry whose command is written from where it is, so that only the system copies it.

        The caller holds the command, which is read without the GIL.
        """
        cdef uint64_t offset = self.end
        cdef uint64_t padding = length - ITEM_DATA - item.size
        cdef uint8_t *head = self.begin_parts(length + SMALL_FRAME, ITEM_DATA + 8)
        cdef Part[3] parts
        self.hold_mapping()
        write_item_head(head, item)
        (<uint64_t *>(head + ITEM_DATA))[0] = 0
        parts[0] = Part(head, ITEM_DATA)
        parts[1] = Part(item.data, item.size)
        parts[2] = Part(head + ITEM_DATA, padding)
        self.commit_parts(parts, 3 if padding else 2, length, 0)
        return self.address + offset

    # ---- recover ---------------------------------------------------------------------------------------

    @staticmethod
    def open(directory, number, bint read_only=False):
        """Opens the segment of a number, and checks its header; None if its creation was cut short.

        `read_only`: maps only complete frames, since an owner may cut the file after them.
        """
        name = segment_name(number)
        path = directory.path_of(name)
        with storage_errors(path, "opening a segment of the log"):
            descriptor = directory.open_file(name, os.O_RDONLY if read_only else os.O_RDWR)
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
                if read_only:
                    chain = headers.head_checksum(journal_format.pack_segment_head(head))
                    size, _ = whole_frames(descriptor.number, head, size, None, chain)
                segment = Segment.adopt(directory, head, descriptor, size, read_only)
            except BaseException:
                directory.close_file(descriptor)
                raise
        return segment

    cdef const uint8_t *frame_of(self, uint64_t offset, uint64_t previous) except? NULL:
        """Returns the valid frame at an offset, chained to the previous one's checksum, or NULL.

        Raises `CorruptionError` if its content is malformed.
        """
        cdef const uint8_t *frame = self.address + offset
        if look_at_frame(frame, self.allocated - offset, self.identity, offset, previous) != VALID:
            return NULL
        if look_at_item(frame, self.allocated - offset) != VALID or (
            (item_kind(frame) == ITEM_STATE) != (offset == LOG_HEADER_SIZE)
        ):
            raise CorruptionError(
                self.path, offset, "a frame with well-formed content",
                "a frame whose checksum matches, but whose content is malformed")
        return frame

    def corrupt(self, uint64_t offset, expected):
        """Returns the error for damage at an offset."""
        return CorruptionError(
            self.path, offset, expected, "bytes that are not a frame of the log, or the end of the file")

    cdef uint64_t end_of_torn_tail(self, uint64_t end) except? 0:
        """Returns the end of the torn tail after the last valid frame, which ends at `end`.

        Raises `CorruptionError` if the tail proves that the segment was durable beyond `end`.
        """
        cdef uint64_t size = self.allocated
        if self.read_only:
            if self.directory.owner() is not None:
                return end  # an owner is writing it
            with storage_errors(self.path, "reading a segment of the log"):
                size = max(end, <uint64_t>self.directory.size(self.descriptor))
        return torn_tail_end(self.descriptor, self.identity, end, size, self.path)

    def finish_recovery(self, uint64_t end, uint64_t durable, uint64_t torn_end):
        """Ends the segment at `end`, durably: a torn frame never reappears."""
        self.cut(end, torn_end, max(durable, <uint64_t>LOG_HEADER_SIZE))
        self.found(end, durable)

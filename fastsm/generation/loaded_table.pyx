"""Loading a saved table: the file is mapped into memory, and its pages are the index's from then on.

The table is used only if everything matches: its own checksum; the base, and the log up to the offset at which the
table was made; and each slot's place, which must be within the arena. A mismatch is no error: the table can be made
again.
"""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from posix.mman cimport munmap

from fastsm.lookup.dead cimport WORD_BITS
from fastsm.disk.format cimport (
    RECORD_CLOCK, RECORD_CONFIG, RECORD_KEY, RECORD_TOUCH, VALID, look_at_record, record_length, record_operation,
)
from fastsm.lookup.index cimport Index
from fastsm.generation.log cimport Log
from fastsm.generation.saved_order cimport take_order
from fastsm.generation.saved_table cimport body_checksum, map_file, tables_of
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.table cimport PLACE_MASK, SEGMENT_SIZE, SEGMENT_SLOTS, SEGMENTS_PER_BLOCK, Segment, Table

from fastsm.disk import format, headers
from fastsm.errors import CorruptionError, FormatVersionError
from fastsm.generation.saved_table import table_name, unpack_metadata


def load_table(directory, Log log):
    """Returns `(Index, SavedTable)` from a log's saved table, or None if there is none that is readable and valid.

    The index covers what precedes the offset `SavedTable.log_offset` of the log. O(slots), without the GIL.
    """
    name = table_name(log.head.generation)
    try:
        descriptor = directory.open_file(name, os.O_RDONLY)
    except (OSError, CorruptionError):
        return None
    loaded = None
    try:
        loaded = load(directory, descriptor, log, directory.path_of(name))
    except (OSError, CorruptionError, FormatVersionError):
        pass  # it can be made again from base and log
    finally:
        directory.close_file(descriptor)
    # Outside the block: Cython loses a return value if leaving the block raises.
    return loaded


cdef object load(directory, descriptor, Log log, path):
    size = directory.size(descriptor)
    saved = headers.unpack_saved_table(os.pread(descriptor.number, headers.TABLE_HEADER_BYTES, 0), path, size)
    sections = saved.sections
    if (saved.identity, saved.log_start) != (log.head.identity, log.start):
        return None
    if not headers.LOG_HEADER_BYTES <= saved.log_offset <= log.allocated or saved.log_offset & 7:
        return None
    if not is_of_these_frames(log, saved) or not may_be_of(saved, log.start + saved.log_offset):
        return None
    cdef uint64_t stop = log.start + saved.log_offset
    cdef bytes front = read_front(descriptor.number, size, saved)
    cdef Index index = Index(Table((saved.seed0, saved.seed1)))
    cdef bytes words
    if front is None or not index.terms.unpack(front[:format.TERM_RUN_BYTES * saved.runs]):
        return None
    index.sessions = Table((saved.sessions.seed0, saved.sessions.seed1))
    index.touches = Table((saved.touches.seed0, saved.touches.seed1))
    for table, part, directory_at, offset in zip(
        tables_of(index), saved.parts, sections.directories, sections.segments, strict=True
    ):
        if not load_part(table, part, front[directory_at - sections.runs:], descriptor.number, offset, stop):
            return None
    for place, operation in (
        (saved.config_place, RECORD_CONFIG), (saved.touch_place, RECORD_TOUCH), (saved.clock_place, RECORD_CLOCK),
    ):
        if place and not is_record(log.mapping, operation, place, stop):
            return None
    words = front[sections.dead - sections.runs:sections.directories[0] - sections.runs]
    index.dead.reserve(stop + 1)
    index.dead.fill(<const uint64_t *><const char *>words, saved.dead_words)
    if not load_deadlines(index, saved, front, stop):
        return None
    index.live_bytes, index.config_place, index.end = saved.live_bytes, saved.config_place, stop
    index.clock, index.clock_place, index.touch_place = saved.clock, saved.clock_place, saved.touch_place
    index.timed = index.deadlines.count or index.touches.count
    index.loaded = True
    metadata = front[sections.metadata - sections.runs:][:saved.metadata_size]
    if metadata:
        index.metadata = unpack_metadata(metadata)
    gaps = [
        front[sections.metadata - sections.runs + saved.metadata_size:sections.dead - sections.runs],
        front[sections.front_end - sections.runs:]]
    for part, directory_at in zip(saved.parts, sections.directories, strict=True):
        used = directory_at - sections.runs + (4 << part.depth if part.segments else 0)
        gaps.append(front[used:used + (4 if part.segments and part.depth == 0 else 0)])
    if b"".join(gaps).strip(b"\0") or not load_order(index, log.mapping, saved, descriptor.number, size, stop):
        return None
    return index, saved


cdef bytes read_front(int descriptor, size_t size, saved):
    """Returns the bytes between the header and the segments, or None if the body's checksum does not match."""
    cdef void *file = map_file(descriptor, size, size, 0)
    cdef uint64_t found
    try:
        with nogil:
            found = body_checksum(<const uint8_t *>file, size)
        if found != saved.body_checksum:
            return None
        return (<const char *>file)[saved.sections.runs:min(saved.sections.segments)]
    finally:
        munmap(file, size)


cdef bint load_part(Table table, part, bytes numbers, int descriptor, uint64_t offset, uint64_t stop) except -1:
    """Loads a saved table into an empty one; returns False if it is not valid."""
    if part.segments == 0:
        return part.entries == 0 and part.depth == 0
    lay_out(table, descriptor, part.segments, offset)
    return load_segments(table, part, <const uint32_t *><const char *>numbers, stop)


cdef bint load_deadlines(Index index, saved, bytes front, uint64_t stop) except -1:
    """Loads the deadlines into the index; returns False if they are not valid."""
    cdef const uint8_t *data = <const uint8_t *><const char *>front
    cdef uint64_t runs = saved.sections.runs
    cdef uint64_t keys, sessions
    keys, sessions = saved.sections.deadlines
    if not index.deadlines.take_saved(data + (keys - runs), saved.key_deadlines, stop):
        return False
    return index.session_deadlines.take_saved(data + (sessions - runs), saved.session_deadlines, stop)


cdef bint load_order(Index index, Mapping mapping, saved, int descriptor, size_t size, uint64_t stop) except -1:
    """Loads the order of the keys, if there is one, into the index; returns False if it is not valid."""
    cdef void *file
    cdef uint64_t offset = saved.sections.order
    if saved.ordered == 0:
        return True
    if saved.ordered != saved.keys:
        return False
    file = map_file(descriptor, size, size, 0)
    try:
        return take_order(index, mapping, <const uint64_t *>(<const char *>file + offset), saved.ordered, stop)
    finally:
        munmap(file, size)


cdef bint is_of_these_frames(Log log, saved) except -1:
    """Returns whether the table was made from this log's frames up to the table's offset.

    A log may have been restored from an earlier copy, or be a copy itself, and have continued differently under the
    same identity. The last frame's checksum tells: it is chained to all earlier frames, and to the log's header, which
    names the base.
    """
    if saved.last_frame == 0:
        return saved.log_offset == headers.LOG_HEADER_BYTES and saved.last_checksum == log.known_chain
    return log.is_frame(saved.last_frame, saved.log_offset, saved.last_checksum)


cdef bint may_be_of(saved, uint64_t stop) except -1:
    """Returns whether a table of these sizes is possible with an arena of `stop` bytes; if not, it is not even read.

    A segment splits when it has some 3,000 keys. With maliciously chosen keys, some segments may be empty, but few: a
    segment is at most SPARE_DEPTH deeper than the average.
    """
    records = stop // RECORD_KEY
    return (
        saved.dead_words <= (stop >> WORD_BITS) + 1 and max(saved.metadata_size, saved.live_bytes) <= stop
        and max(saved.runs, saved.key_deadlines, saved.session_deadlines) <= records
        and saved.clock <= format.MAX_DEADLINE and part_may_be_of(saved.parts[0], records)
        and part_may_be_of(saved.sessions, records) and part_may_be_of(saved.touches, records))


cdef bint part_may_be_of(part, records) except -1:
    return (
        part.entries <= records and part.segments <= 64 + records // 256
        and 1 << part.depth <= 64 * max(part.segments, 1))


cdef bint is_record(Mapping mapping, int operation, uint64_t place, uint64_t stop) noexcept:
    """Returns whether the arena has a complete record of an operation at a place."""
    cdef const uint8_t *record
    if place & 7 or place > stop - RECORD_KEY:
        return False
    record = mapping.address + place
    if record_length(record) > stop - place:
        return False
    return record_operation(record) == operation and look_at_record(record, record_length(record)) == VALID


cdef int lay_out(Table table, int descriptor, uint32_t segments, uint64_t offset) except -1:
    """Maps the segments at an offset of a file into the memory of an empty table."""
    cdef uint32_t blocks = (segments + SEGMENTS_PER_BLOCK - 1) // SEGMENTS_PER_BLOCK
    cdef size_t room = <size_t>blocks * SEGMENTS_PER_BLOCK * SEGMENT_SIZE
    cdef uint32_t i
    table.free_all()
    table.segments = NULL
    table.pool = NULL
    table.segment_count = table.segment_room = table.block_count = table.block_room = 0
    table.mapped = map_file(descriptor, <size_t>segments * SEGMENT_SIZE, room, offset)
    table.mapped_size = room
    table.pool = <void **>calloc(blocks + 1, sizeof(void *))
    if table.pool == NULL:
        raise MemoryError("not enough memory for a saved table's blocks")
    for i in range(blocks):
        table.pool[i] = <uint8_t *>table.mapped + <size_t>i * SEGMENTS_PER_BLOCK * SEGMENT_SIZE
    table.block_count = table.block_room = table.mapped_blocks = blocks
    table.segment_room = blocks * SEGMENTS_PER_BLOCK
    return 0


cdef bint load_segments(Table table, part, const uint32_t *numbers, uint64_t stop) except -1:
    """Makes mapped segments the table's own; returns False if they are not valid."""
    cdef uint32_t count = part.segments
    cdef size_t entries = <size_t>1 << part.depth
    cdef size_t i
    cdef bint sound
    for i in range(entries):
        if numbers[i] >= count:
            return False
    table.segments = <Segment **>calloc(entries, sizeof(Segment *))
    if table.segments == NULL:
        raise MemoryError("not enough memory for a saved table's directory")
    table.segment_count = count
    table.count = part.entries
    table.depth = part.depth
    for i in range(entries):
        table.segments[i] = table.segment_at(numbers[i])
    with nogil:
        sound = segments_are_sound(table, stop)
    return sound


cdef bint segments_are_sound(Table table, uint64_t stop) noexcept nogil:
    """Returns whether every probe ends, every place is within the arena below `stop`, and the counts are right."""
    cdef Segment *segment
    cdef uint64_t total = 0
    cdef uint64_t beyond = 0
    cdef uint64_t mask = PLACE_MASK  # local variables stay in registers
    cdef uint64_t greatest = (stop - RECORD_KEY) >> 3
    cdef uint64_t place, filled, leading
    cdef uint32_t number
    cdef size_t i
    for number in range(table.segment_count):
        segment = table.segment_at(number)
        filled = leading = 0
        for i in range(SEGMENT_SLOTS):
            # By sign bits, which the compiler can vectorize, unlike 64-bit comparisons.
            place = segment.slots[i] & mask
            beyond |= greatest - place
            filled += (segment.slots[i] | -segment.slots[i]) >> 63
            leading += (<uint64_t>(RECORD_KEY / 8 - 1) - place) >> 63
        for i in range(sizeof(segment.padding) / sizeof(uint64_t)):
            if segment.padding[i]:
                return False
        # An empty slot has no place; a filled one has a place after the arena's first bytes.
        if filled != leading or filled != segment.count or filled >= SEGMENT_SLOTS or segment.depth > table.depth:
            return False
        total += filled
    return total == table.count and beyond >> 63 == 0

"""The saved table: an index that is written to a file, and mapped back into memory, so that opening reads no log.

It contains what the index contains: the tables of keys, sessions and touches, deadlines, the dead map, terms, the
clock, and the order of the keys if that is in use.

The file is a copy of memory at one moment of a log's life. It is used only if everything matches: its own checksum, the
base and the log up to that moment, from which it was made, and each slot's place, which must be within the arena. The
log may have grown since: its frames never change, so later ones are read from the log.
"""

import os

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap as map_memory, munmap,
)

from fastsm.lookup.dead cimport WORD_BITS
from fastsm.disk.format cimport (
    RECORD_CLOCK, RECORD_CONFIG, RECORD_KEY, RECORD_TOUCH, VALID, look_at_record, record_length, record_operation,
)
from fastsm.disk.hashing cimport xxh64
from fastsm.lookup.deadlines cimport Deadlines, Due
from fastsm.lookup.index cimport Index
from fastsm.generation.log cimport Log
from fastsm.generation.saved_order cimport HeldOrder, hold_order, take_order
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.table cimport PLACE_MASK, SEGMENT_SIZE, SEGMENT_SLOTS, SEGMENTS_PER_BLOCK, Segment, Table, place_of

from fastsm.disk import format, headers
from fastsm.errors import CorruptionError, FormatVersionError
from fastsm.types import LogId, SnapshotMetadata


def table_name(generation):
    """Returns the file name of a generation's saved table."""
    return f"table-{generation}"


# ---- save ----------------------------------------------------------------------------------------------

def save_table(directory, Log log, Index index, tick):
    """Saves the index of all of a log's frames, which are synced, as the generation's table; durable on return.

    `tick()` is called between pieces of the work, and may raise. The index must not change meanwhile. O(slots). Raises
    OSError.
    """
    cdef HeldTable held = HeldTable(log)
    held.take(index, False, tick)
    with held.written(directory, tick):
        held.put_in_place(directory)
    directory.sync_directory()


def hold_table(Log log, Index index):
    """Returns a copy of the index of all of a log's frames, to be saved later; None if there is no memory for it."""
    cdef HeldTable held = HeldTable(log)
    try:
        held.take(index, True, None)
    except MemoryError:
        return None
    return held


cdef class HeldSegments:
    """The segments of a table: the table's own, or a copy."""
    cdef Table table             # None: the segments were copied
    cdef uint32_t count
    cdef uint8_t *copied

    def __cinit__(self, Table table):
        self.table = table
        self.count = table.segment_count

    def __dealloc__(self):
        free(self.copied)

    cdef int copy(self) except -1:
        """Copies the segments. O(slots), under the GIL, since the table must not change meanwhile."""
        cdef uint32_t number = 0
        self.copied = <uint8_t *>malloc(<size_t>self.count * SEGMENT_SIZE + 1)
        if self.copied == NULL:
            raise MemoryError("no memory to hold a table still")
        while number < self.count:
            memcpy(
                self.copied + <size_t>number * SEGMENT_SIZE, self.table.segment_at(number),
                <size_t>self.of_block(number) * SEGMENT_SIZE)
            number += self.of_block(number)
        self.table = None
        return 0

    cdef uint32_t of_block(self, uint32_t number) noexcept:
        """Returns how many segments, starting with this one, are contiguous in memory."""
        return min(self.count - number, <uint32_t>SEGMENTS_PER_BLOCK)

    cdef int write(self, directory, descriptor, uint64_t offset, tick) except -1:
        """Writes the segments, block by block."""
        cdef uint32_t number = 0
        cdef char *start
        while number < self.count:
            if self.table is None:
                start = <char *>self.copied + <size_t>number * SEGMENT_SIZE
            else:
                start = <char *>self.table.segment_at(number)
            piece = PyMemoryView_FromMemory(start, <ssize_t>self.of_block(number) * SEGMENT_SIZE, PyBUF_READ)
            offset = directory.write_paced(descriptor, piece, offset)
            number += self.of_block(number)
            tick()
        return 0


cdef class HeldTable:
    """The content of a saved table, for a log up to `end`.

    Thread safety: used by one thread.
    """
    cdef readonly Log log
    cdef readonly uint64_t end
    cdef list segments           # those of each table, in the order of the file
    cdef HeldOrder order         # None: not in use
    cdef object saved            # the header
    cdef bytes front             # the bytes between the header and the segments

    def __cinit__(self, Log log):
        self.log = log
        self.end = log.end
        self.segments = []

    cdef int take(self, Index index, bint copies, tick) except -1:
        cdef HeldSegments held
        self.saved, self.front = describe(self.log, index)
        for table in tables_of(index):
            held = HeldSegments(table)
            if copies and (<Table>table).count:
                held.copy()
            self.segments.append(held)
        self.order = hold_order(index, self.log.start + self.end, copies, tick)
        return 0

    def written(self, directory, tick):
        """Returns a context manager in which the table is in a synced temporary file. `tick()`: as in `save_table`."""
        return WrittenTable(self, directory, tick)

    def put_in_place(self, directory):
        """Renames the temporary file to its final name, which is not durable yet."""
        name = table_name(self.log.head.generation)
        directory.rename(f"{name}.tmp", name)

    cdef int write(self, directory, tick) except -1:
        cdef HeldSegments held
        saved = self.saved
        descriptor = directory.create_file(f"{table_name(self.log.head.generation)}.tmp")
        try:
            directory.write(descriptor, self.front, headers.TABLE_HEADER_BYTES)
            for held, part, offset in zip(self.segments, self.saved.parts, self.saved.sections.segments, strict=True):
                if part.segments:
                    held.write(directory, descriptor, offset, tick)
            if self.order is not None and self.order.gather(tick):
                saved = saved._replace(ordered=self.order.count)
                self.order.write(directory, descriptor, saved.sections.order, tick)
            saved = saved._replace(body_checksum=checksum_of(descriptor.number, saved.sections.end))
            directory.write(descriptor, headers.pack_saved_table(saved), 0)
            directory.sync(descriptor)
        finally:
            directory.close_file(descriptor)
        return 0


cdef class WrittenTable:
    """The context manager of `HeldTable.written`."""
    cdef HeldTable held
    cdef object directory, tick

    def __cinit__(self, HeldTable held, directory, tick):
        self.held = held
        self.directory = directory
        self.tick = tick

    def __enter__(self):
        try:
            self.held.write(self.directory, self.tick)
        except BaseException:
            self.remove()
            raise

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.remove()

    cdef int remove(self) except -1:
        self.directory.unlink(f"{table_name(self.held.log.head.generation)}.tmp")
        return 0


cdef tuple tables_of(Index index):
    """Returns the tables, in the order of the file."""
    return index.table, index.sessions, index.touches


cdef tuple describe(Log log, Index index):
    """Returns the header, and the bytes between it and the segments."""
    cdef uint64_t count = 0
    cdef uint64_t i
    cdef uint64_t *words = index.dead.copy(index.end)
    cdef bytes directories
    if words == NULL:
        raise MemoryError("no memory to save the table")
    try:
        for i in range((index.end >> WORD_BITS) + 1):
            if words[i]:
                count = i + 1
        index.drop_stale(log.mapping.address, index.deadlines)
        index.drop_stale(log.mapping.address, index.session_deadlines)
        runs = index.terms.pack(index.terms.seen, index.terms.last_term())
        metadata = b"" if index.metadata is None else pack_metadata(index.metadata)
        directories = directory_of(index.table) + directory_of(index.sessions) + directory_of(index.touches)
        keys = part_of(index.table)
        saved = headers.SavedTable(
            log.head.identity, log.end, log.start, keys.seed0, keys.seed1, keys.entries, index.live_bytes,
            index.config_place, keys.segments, keys.depth, len(runs) // format.TERM_RUN_BYTES, len(metadata), count,
            log.frames, log.last_frame, log.chain, index.clock, index.clock_place, index.touch_place,
            index.deadlines.count, index.session_deadlines.count, part_of(index.sessions), part_of(index.touches), 0, 0)
        front = b"".join((
            runs, metadata.ljust(saved.sections.dead - saved.sections.metadata, b"\0"),
            (<char *>words)[:8 * count], directories,
            bytes_of_deadlines(index.deadlines, log.mapping.address),
            bytes_of_deadlines(index.session_deadlines, log.mapping.address)))
        return saved, front.ljust(min(saved.sections.segments) - headers.TABLE_HEADER_BYTES, b"\0")
    finally:
        free(words)


cdef object part_of(Table table):
    """Describes a table for the header."""
    if table.count == 0:
        return headers.SavedPart(table.seed0, table.seed1, 0, 0, 0)
    return headers.SavedPart(table.seed0, table.seed1, table.count, table.segment_count, table.depth)


cdef bytes bytes_of_deadlines(Deadlines deadlines, const uint8_t *arena):
    cdef bytes made = PyBytes_FromStringAndSize(NULL, deadlines.count * sizeof(Due))
    cdef Due *due = <Due *>PyBytes_AS_STRING(made)
    cdef size_t i
    for i in range(deadlines.count):
        due[i].place = place_of(deadlines.items[i])
        due[i].deadline = deadlines.deadline_of(arena, due[i].place)
    return made


cdef bytes directory_of(Table table):
    """Returns the segment number of each entry in a table's directory; nothing for an empty table."""
    cdef size_t size = sizeof(uint32_t) << table.depth
    cdef uint32_t *numbers
    if table.count == 0:
        return b""
    numbers = <uint32_t *>calloc(1, size + 8)
    if numbers == NULL:
        raise MemoryError("no memory to save the table")
    try:
        number_segments(table, numbers)
        return (<char *>numbers)[:(size + 7) & ~<size_t>7]
    finally:
        free(numbers)


cdef void number_segments(Table table, uint32_t *numbers) noexcept:
    """Determines the segment number of each entry in a table's directory."""
    cdef uint32_t number
    cdef size_t i
    for number in range(table.segment_count):
        # The last field of the segment's header is unused in memory; it temporarily holds the number.
        table.segment_at(number).padding[6] = number
    for i in range(<size_t>1 << table.depth):
        numbers[i] = <uint32_t>table.segments[i].padding[6]
    for number in range(table.segment_count):
        table.segment_at(number).padding[6] = 0


def pack_metadata(metadata):
    index, term = metadata.last_included
    return index.to_bytes(8, "little") + term.to_bytes(8, "little") + metadata.checksum


cdef uint64_t checksum_of(int descriptor, size_t size) except? 0:
    """Returns the `body_checksum` of a file."""
    cdef void *file = map_file(descriptor, size, size)
    cdef uint64_t found
    with nogil:
        found = body_checksum(<const uint8_t *>file, size)
        munmap(file, size)
    return found


cdef uint64_t body_checksum(const uint8_t *file, size_t size) noexcept nogil:
    """Returns the XXH64 of everything after the header."""
    return xxh64(file + TABLE_HEADER, size - TABLE_HEADER, 0)


cdef size_t TABLE_HEADER = headers.TABLE_HEADER_BYTES


# ---- load ----------------------------------------------------------------------------------------------

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
    cdef void *file = map_file(descriptor, size, size)
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
    file = map_file(descriptor, size, size)
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


def unpack_metadata(data):
    """Reverses `pack_metadata`."""
    if len(data) < 16:
        raise CorruptionError("saved table", None, "an index and a term", f"{len(data)} bytes")
    index, term = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    return SnapshotMetadata(LogId(index, term), data[16:])


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
        raise MemoryError("no memory for a saved table's blocks")
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
        raise MemoryError("no memory for a saved table's directory")
    table.segment_count = count
    table.count = part.entries
    table.depth = part.depth
    for i in range(entries):
        table.segments[i] = table.segment_at(numbers[i])
    with nogil:
        sound = segments_are_sound(table, stop)
    return sound


cdef void *map_file(int descriptor, size_t size, size_t room, uint64_t offset=0) except NULL:
    """Returns `room` bytes of private memory that start with a copy-on-write mapping of `size` bytes of the file.

    The rest of the last mapped page is what the system makes it: zeros.
    """
    cdef void *memory = map_memory(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError("no memory for a saved table")
    if map_memory(memory, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, descriptor, offset) == MAP_FAILED:
        munmap(memory, room)
        raise MemoryError("a saved table could not be mapped")
    return memory


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

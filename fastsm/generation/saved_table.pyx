"""The saved table: an index that is written to a file, and mapped back into memory, so that opening reads no log.

It contains what the index contains: the tables of keys, sessions and touches, deadlines, the dead map, terms, the
clock, and the order of the keys if that is in use.

The file is a copy of memory at one moment of a log's life. `loaded_table` says when it is used. The log may have grown
since: its frames never change, so later ones are read from the log.
"""

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
from fastsm.disk.hashing cimport xxh64
from fastsm.lookup.deadlines cimport Deadlines, Due
from fastsm.lookup.index cimport Index
from fastsm.generation.log cimport Log
from fastsm.generation.saved_order cimport HeldOrder, hold_order
from fastsm.lookup.table cimport SEGMENT_SIZE, SEGMENTS_PER_BLOCK, Table, place_of

from fastsm.disk import format, headers
from fastsm.errors import CorruptionError
from fastsm.types import LogId, SnapshotMetadata


def table_name(generation):
    """Returns the file name of a generation's saved table."""
    return f"table-{generation}"


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
            raise MemoryError("not enough memory to hold a table still")
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
        raise MemoryError("not enough memory to save the table")
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
    """Returns what the header of a saved table says of one table."""
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
        raise MemoryError("not enough memory to save the table")
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


def unpack_metadata(data):
    """Reverses `pack_metadata`."""
    if len(data) < 16:
        raise CorruptionError("saved table", None, "an index and a term", f"{len(data)} bytes")
    index, term = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    return SnapshotMetadata(LogId(index, term), data[16:])


cdef uint64_t checksum_of(int descriptor, size_t size) except? 0:
    """Returns the `body_checksum` of a file."""
    cdef void *file = map_file(descriptor, size, size, 0)
    cdef uint64_t found
    with nogil:
        found = body_checksum(<const uint8_t *>file, size)
        munmap(file, size)
    return found


cdef uint64_t body_checksum(const uint8_t *file, size_t size) noexcept nogil:
    """Returns the XXH64 of everything after the header."""
    return xxh64(file + TABLE_HEADER, size - TABLE_HEADER, 0)


cdef size_t TABLE_HEADER = headers.TABLE_HEADER_BYTES


cdef void *map_file(int descriptor, size_t size, size_t room, uint64_t offset) except NULL:
    """Returns `room` bytes of private memory that start with a copy-on-write mapping of `size` bytes of the file.

    The system fills the rest of the last mapped page with zeros.
    """
    cdef void *memory = map_memory(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError("not enough memory for a saved table")
    if map_memory(memory, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, descriptor, offset) == MAP_FAILED:
        munmap(memory, room)
        raise MemoryError("a saved table could not be mapped")
    return memory

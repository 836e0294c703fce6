"""The headers of files: of a log, of CURRENT and of a saved table; for a snapshot's, see `snapshot_header`.

Each starts with a magic and a version, and has a checksum of its own. What follows the header in a log, frames and
records, is in `format`. Opens no files.
"""

import struct
from typing import NamedTuple

from fastsm.disk.format cimport (
    ARENA_LIMIT, CURRENT_SIZE, LOG_BASE_INDEX, LOG_BASE_SIZE, LOG_BASE_TERM, LOG_HEADER_SIZE, LOG_RESERVED,
    TERM_RUN_SIZE, align8,
)

from fastsm.disk.format import MAX_INDEX
from fastsm.disk.hashing import checksum
from fastsm.errors import CorruptionError, FormatVersionError

VERSION = 0
LOG_MAGIC_BYTES = b"FASTSM-L"
CURRENT_MAGIC_BYTES = b"FASTSM-C"
TABLE_MAGIC_BYTES = b"FASTSM-T"
LOG_HEADER_BYTES = LOG_HEADER_SIZE


class LogHead(NamedTuple):
    """The header of a log: its identity, the entry after which it starts, and the base with the state as of that entry.

    `base_size` is 0 if there is no base: the log starts with the empty state.
    """
    generation: int
    identity: int
    base_index: int = 0
    base_term: int = 0
    base_size: int = 0
    base_checksum: bytes = bytes(32)
    base_changes: int = 0     # how many changes of keys the base's last entry made, plus one; 0: unknown


class CurrentFile(NamedTuple):
    """CURRENT: the generation in use, its log's identity, and an offset up to which the log is durable."""
    generation: int
    identity: int
    durable_offset: int
    last_frame: int = 0       # the offset of the frame that ends there; 0: no frame, or unknown
    last_checksum: int = 0    # of that frame


class Sections(NamedTuple):
    """Offsets in a saved table: the start of each section, and the end of the file."""
    runs: int
    metadata: int
    dead: int
    directories: tuple        # of the tables of keys, sessions and touches
    deadlines: tuple          # of keys and of sessions
    front_end: int            # the end of the sections above
    segments: tuple           # of each table
    order: int                # the places of keys, sorted by key
    end: int


class SavedPart(NamedTuple):
    """One table of a saved table's file. An empty one has neither segments nor a directory."""
    seed0: int
    seed1: int
    entries: int
    segments: int
    depth: int


class SavedTable(NamedTuple):
    """The header of a saved table: the point in the log at which it was made, and the sizes of what follows."""
    identity: int         # of the log
    log_offset: int       # the end of the frames that it covers
    log_start: int        # where the log starts in the arena
    seed0: int
    seed1: int
    keys: int
    live_bytes: int
    config_place: int
    segments: int
    depth: int
    runs: int
    metadata_size: int
    dead_words: int
    frames: int
    last_frame: int       # the offset of the last of those frames; 0: none
    last_checksum: int    # of that frame, or of the log's header: covers base and log up to `log_offset`
    clock: int
    clock_place: int      # of the newest clock record; 0: none in the log
    touch_place: int      # of the newest touch; 0: none
    key_deadlines: int
    session_deadlines: int
    sessions: SavedPart
    touches: SavedPart
    # The number of places in the section `order`: the number of keys, or 0 if the order was not in use
    ordered: int
    body_checksum: int    # XXH64 of everything after the header

    @property
    def parts(self):
        """The three tables."""
        return SavedPart(self.seed0, self.seed1, self.keys, self.segments, self.depth), self.sessions, self.touches

    @property
    def sections(self):
        """The offset of each section."""
        runs = TABLE_HEADER_BYTES
        metadata = runs + TERM_RUN_SIZE * self.runs
        dead = metadata + align8(self.metadata_size)
        at = dead + 8 * self.dead_words
        directories, deadlines, segments = [], [], []
        for part in self.parts:
            directories.append(at)
            at += align8(4 << part.depth) if part.segments else 0
        for count in (self.key_deadlines, self.session_deadlines):
            deadlines.append(at)
            at += DUE_BYTES * count
        front_end = at
        for part in self.parts:
            if part.segments:
                at = (at + TABLE_PAGE - 1) // TABLE_PAGE * TABLE_PAGE
            segments.append(at)
            at += part.segments * SEGMENT_BYTES
        return Sections(
            runs, metadata, dead, tuple(directories), tuple(deadlines), front_end, tuple(segments), at,
            at + 8 * self.ordered)


# Magic, version, a word that is zero (in a log: `base_changes`), and the fields. A checksum follows.
LOG_STRUCT = struct.Struct("<8sIIQQQQQ32s")
CURRENT_STRUCT = struct.Struct("<8sIIQQQQQ")
TABLE_STRUCT = struct.Struct("<8sII33Q")
TABLE_HEADER_BYTES = TABLE_STRUCT.size + 8
TABLE_PAGE = 65536      # at least as large as the pages of any system: segments are mapped
SEGMENT_BYTES = 8 * 4096 + 64
DUE_BYTES = 16          # a deadline and a place
MOST_CHANGES = 2**31 - 2    # changes of one entry: higher counts are not distinguished


def pack_log_head(head):
    """Returns a log's header as bytes."""
    return with_checksum(LOG_STRUCT.pack(LOG_MAGIC_BYTES, VERSION, head.base_changes, *head[:-1]))


def head_checksum(packed):
    """Returns the checksum to which the first frame is chained: that of a packed header with a zero after its version.

    A lost header can be made again from CURRENT and the base, except for the word that is zeroed here.
    """
    return checksum(packed[:12] + bytes(4) + packed[16:-8])


def pack_saved_table(saved):
    """Returns a saved table's header as bytes."""
    *fields, sessions, touches, ordered, body_checksum = saved
    return with_checksum(TABLE_STRUCT.pack(
        TABLE_MAGIC_BYTES, VERSION, 0, *fields, *sessions, *touches, ordered, body_checksum))


def unpack_saved_table(data, path, size):
    """Returns the header of the saved table at `path`, a file of `size` bytes in which every section must lie."""
    fields = unpack(TABLE_STRUCT, TABLE_MAGIC_BYTES, data[:TABLE_HEADER_BYTES], path, 33)
    saved = SavedTable(
        *fields[:21], SavedPart(*fields[21:26]), SavedPart(*fields[26:31]), *fields[31:])
    counts = [saved.runs, saved.metadata_size, saved.dead_words, saved.key_deadlines, saved.session_deadlines]
    counts.append(saved.ordered)
    counts += [part.segments for part in saved.parts]
    depth = max(part.depth for part in saved.parts)
    if max(counts) > size or depth > 40 or saved.sections.end != size:
        raise CorruptionError(path, None, "sections that add up to the file's size", f"{size} bytes")
    return saved


def pack_current(current):
    """Returns the content of CURRENT."""
    return with_checksum(CURRENT_STRUCT.pack(CURRENT_MAGIC_BYTES, VERSION, 0, *current))


def unpack_log_head(data, path):
    """Returns the header of the log at `path`; raises `CorruptionError` or `FormatVersionError`."""
    base_changes, *fields = unpack(LOG_STRUCT, LOG_MAGIC_BYTES, data[:LOG_HEADER_SIZE], path, 6, True)
    head = LogHead(*fields, base_changes)
    if head.base_size == 0 and base_changes:
        raise CorruptionError(path, LOG_RESERVED, "zero, since there is no base", base_changes)
    for offset, number, limit in (
        (LOG_BASE_INDEX, head.base_index, MAX_INDEX), (LOG_BASE_TERM, head.base_term, MAX_INDEX),
        (LOG_BASE_SIZE, head.base_size, ARENA_LIMIT),
    ):
        if number > limit:
            raise CorruptionError(path, offset, f"at most {limit}", number)
    if head.base_size == 0 and (head.base_index or head.base_term or any(head.base_checksum)):
        raise CorruptionError(
            path, LOG_BASE_INDEX, "no entry, since there is no base", (head.base_index, head.base_term))
    return head


def unpack_current(data, path):
    """Parses the content of CURRENT; raises `CorruptionError` or `FormatVersionError`."""
    if len(data) != CURRENT_SIZE:
        raise CorruptionError(path, None, f"{CURRENT_SIZE} bytes", f"{len(data)} bytes")
    return CurrentFile(*unpack(CURRENT_STRUCT, CURRENT_MAGIC_BYTES, data, path, 5))


def with_checksum(bytes head):
    return head + struct.pack("<Q", checksum(head))


def unpack(layout, magic, bytes data, path, used, bint has_word=False):
    """Returns the first `used` fields, preceded by the word after the version if `has_word`; else that must be zero.

    All versions keep magic, version and checksum in the same places, so that damage can be told from another version.
    """
    if len(data) < layout.size + 8:
        raise CorruptionError(path, 0, f"a header of {layout.size + 8} bytes", f"{len(data)} bytes")
    if data[:8] != magic:
        raise CorruptionError(path, 0, f"magic {magic!r}", repr(data[:8]))
    found_sum = int.from_bytes(data[layout.size:], "little")
    expected_sum = checksum(data[:layout.size])
    _, version, reserved, *fields = layout.unpack(data[:layout.size])
    if found_sum != expected_sum:
        raise CorruptionError(path, layout.size, f"checksum {expected_sum:#018x}", f"{found_sum:#018x}")
    if version != VERSION:
        raise FormatVersionError(path, VERSION, version)
    if reserved and not has_word:
        raise CorruptionError(path, 12, "zero", reserved)
    for i in range(used, len(fields)):
        if fields[i]:
            raise CorruptionError(path, 16 + 8 * i, "zero", fields[i])
    return [reserved, *fields[:used]] if has_word else fields[:used]

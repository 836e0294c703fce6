"""A reader made from docs/format.md alone: nothing but that page is known here of the formats. Slow and strict."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import blake3
import xxhash

GAP = 2**64 - 1
SAYS_NOTHING = 2**32 - 1
LOG_HEADER = 96
FRAME_HEADER = 32
SNAPSHOT_HEADER = 160
TABLE_HEADER = 288
ALIGNMENT = 65_536
SLOTS = 4_096
SEGMENT = 32_832

Run = tuple[int, int, int]  # first, last, term


class Corrupt(Exception):
    pass


@dataclass
class Decoded:
    """A state, and how it lies in the arena."""

    items: dict[bytes, bytes] = field(default_factory=dict)
    sessions: dict[int, bytes] = field(default_factory=dict)
    clock: int = 0
    deadlines: dict[bytes, int | None] = field(default_factory=dict)  # of all keys
    touches: dict[bytes, int] = field(default_factory=dict)  # the places of those that count
    clock_place: int = 0
    touch_place: int = 0
    last_applied: tuple[int, int] = (0, 0)
    runs: list[Run] = field(default_factory=list)
    membership: tuple[tuple[int, int], bytes] | None = None
    metadata: tuple[tuple[int, int], bytes] | None = None
    end: int = LOG_HEADER
    known_durable: int = 0
    clean: bool = False
    frames: list[int] = field(default_factory=list)
    chain: int = 0  # the checksum of the last frame, or of the header
    log_start: int = 0  # in the arena
    places: dict[bytes | int, int] = field(default_factory=dict)  # of the newest records of keys and sessions
    puts: dict[int, int] = field(default_factory=dict)  # from the place of each record that may count to its size
    config_place: int = 0

    def term(self, index: int) -> int | None:
        for first, last, term in self.runs:
            if first <= index <= last:
                return term
        return None


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise Corrupt(what)


def up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def header(data: bytes, magic: bytes, size: int) -> tuple[int, int]:
    """The checks that CURRENT, log and table share; gives the first two fields."""
    demand(len(data) >= size, "a whole header")
    demand(data[:8] == magic, "magic")
    demand(xxhash.xxh64_intdigest(data[: size - 8]) == struct.unpack_from("<Q", data, size - 8)[0], "a checksum")
    version, zero, first, second = struct.unpack_from("<IIQQ", data, 8)
    demand(version == 0, "version")
    demand(zero == 0 or (magic == b"FASTSM-L" and any(data[48:56])), "a zero")
    return first, second


# ---- commands --------------------------------------------------------------------------------------------

Command = tuple[object, ...]  # kind, then what the page says of it, in the order of its bytes; lists of others
NONE = 2**32 - 1
NO_DEADLINE = 2**64 - 1
LARGEST_VALUE = 2**31 - 1
LARGEST_KEY = 65_535
IN_BATCH, IN_BRANCH = {1, 2, 3, 4, 7, 9, 15, 16, 17}, {1, 2, 7, 8, 9, 15, 17}
CONDITIONS = {128, 129, 130}
NUMBERS = {  # before the key
    3: "<I", 7: "<qq", 11: "<I", 12: "<Q", 14: "<Q", 15: "<Q", 16: "<IQ", 17: "<Q", 18: "<QQ", 130: "<Q",
}  # fmt: skip
LARGEST_ARENA = 2**39


def decode_command(data: bytes) -> Command:
    kind, _ = member_head(data)
    if kind != 13:
        return decode_listed(data)
    size, *numbers = unpack("<IQQQ", data, 4)
    demand(data[2:4] == bytes(2), "a zero")
    session, sequence, expires = numbers
    demand(sequence >= 1, "a sequence from 1 on")
    demand(expires < 2**63 or expires == NO_DEADLINE, "a deadline")
    demand(size == len(data) - 32, "nothing after the end")
    inner, _ = member_head(data[32:])
    demand(inner not in (5, 12, 13, 14, 18), "a command that may stand in a once")
    return 13, session, sequence, expires, decode_listed(data[32:])


def decode_listed(data: bytes) -> Command:
    """A command that holds others in lists, or none."""
    kind, _ = member_head(data)
    key_size, size = unpack("<HI", data, 2)
    if kind == 6:
        demand(key_size == 0, "a zero")
        members, data = take_members(data[8:], size, IN_BATCH)
        command: Command = (6, members)
    elif kind == 10:
        demand(key_size == 0, "a zero")
        first, second = unpack("<II", data, 8)
        demand(size + first + second <= len(data) // 8, "room for as many members")
        conditions, data = take_members(data[16:], size, CONDITIONS)
        then, data = take_members(data, first, IN_BRANCH)
        otherwise, data = take_members(data, second, IN_BRANCH)
        command = (10, conditions, then, otherwise)
    else:
        demand(kind not in CONDITIONS, "a kind")
        command, size = decode_member(data)
        data = data[size:]
    demand(data == b"", "nothing after the end")
    return command


def take_members(data: bytes, count: int, kinds: set[int]) -> tuple[list[Command], bytes]:
    demand(count <= len(data) // 8, "room for as many members")
    members = []
    for _ in range(count):
        demand(member_head(data)[0] in kinds, "a kind that may stand here")
        command, size = decode_member(data)
        members.append(command)
        data = data[size:]
    return members, data


def unpack(layout: str, data: bytes, offset: int) -> tuple[int, ...]:
    demand(len(data) >= offset + struct.calcsize(layout), "a whole header")
    return struct.unpack_from(layout, data, offset)


def member_head(data: bytes) -> tuple[int, int]:
    demand(data[:1] == b"\0", "version")
    return unpack("<BH", data, 1)


def decode_member(data: bytes) -> tuple[Command, int]:
    """The command that the bytes start with, and its size."""
    kind, key_size = member_head(data)
    (size,) = unpack("<I", data, 4)
    demand(kind in LAYOUTS, "a kind")
    numbers = unpack(NUMBERS[kind], data, 8) if kind in NUMBERS else ()
    offset = 8 + (struct.calcsize(NUMBERS[kind]) if kind in NUMBERS else 0)
    has_key, has_value, may_be_none = LAYOUTS[kind]
    demand(has_key or key_size == 0, "no key")
    demand(has_value or size == 0, "no value")
    sizes = [numbers[0], size] if kind in (3, 16) else [size]
    for each in sizes:
        demand(each <= (LARGEST_KEY if kind == 9 else LARGEST_VALUE) or (may_be_none and each == NONE), "a size")
    check_deadlines(kind, numbers)
    demand(kind != 16 or size != NONE, "a value for a deadline")
    key, offset = data[offset : offset + key_size], offset + key_size
    parts: list[bytes | None] = []
    for each in sizes:
        parts.append(None if may_be_none and each == NONE else data[offset : offset + each])
        offset += 0 if parts[-1] is None else each
    demand(offset <= len(data), "a whole command")
    if kind == 11:
        demand(is_text(key), "UTF-8")
    if kind in (3, 16):
        return (kind, *numbers[1:], key, *parts), offset
    return (kind, *numbers, *([key] if has_key else []), *(parts if has_value else [])), offset


def check_deadlines(kind: int, numbers: tuple[int, ...]) -> None:
    """All that are deadlines or like one; in some kinds there may be none."""
    deadlines = {12: numbers[:1], 15: numbers[:1], 16: numbers[1:], 17: numbers[:1], 18: numbers}.get(kind, ())
    for at, each in enumerate(deadlines):
        may_be_none = kind in (12, 17) or (kind, at) == (18, 1)
        demand(each < 2**63 or (may_be_none and each == NO_DEADLINE), "a deadline")


LAYOUTS = {  # kind: has a key, has a value, which may be none
    1: (True, True, False), 2: (True, False, False), 3: (True, True, True), 4: (False, False, False),
    5: (False, True, False), 7: (True, False, False), 8: (True, False, False), 9: (True, True, True),
    11: (True, True, False), 12: (False, False, False), 14: (False, False, False),
    15: (True, True, False), 16: (True, True, True), 17: (True, False, False), 18: (False, False, False),
    128: (True, True, True), 129: (True, False, False), 130: (True, False, False),
}  # fmt: skip


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


# ---- a directory -----------------------------------------------------------------------------------------

def decode_directory(path: Path) -> Decoded:
    current = (path / "CURRENT").read_bytes()
    demand(len(current) == 64, "size of CURRENT")
    generation, identity = header(current, b"FASTSM-C", 64)
    durable, *last = struct.unpack_from("<QQQ", current, 32)
    log = (path / f"log-{generation}").read_bytes()
    (base_size,) = struct.unpack_from("<Q", log, 48)
    base = (path / f"base-{generation}").read_bytes() if base_size else b""
    state = decode_log(log, generation, identity, durable, base=base, last=(last[0], last[1]))
    if (path / f"table-{generation}").exists():
        check_table((path / f"table-{generation}").read_bytes(), log, base)
    return state


def decode_log(
    log: bytes, generation: int, identity: int, durable_offset: int, *, base: bytes = b"", stop: int | None = None,
    last: tuple[int, int] = (0, 0),
) -> Decoded:  # fmt: skip
    """The state, or only that of the frames up to ``stop``. ``last``: the frame that CURRENT names, if it names one."""
    demand(header(log, b"FASTSM-L", LOG_HEADER) == (generation, identity), "the log that CURRENT names")
    state = decode_base(log, base)
    state.known_durable = durable_offset
    state.chain = xxhash.xxh64_intdigest(log[:12] + bytes(4) + log[16 : LOG_HEADER - 8])
    while state.end != stop and (watermark := valid_frame(log, state.end, identity, state.chain)) is not None:
        state.known_durable = max(state.known_durable, watermark)
        state.frames.append(state.end)
        state.chain, length = struct.unpack_from("<QQ", log, state.end)
        decode_frame(state, log[state.end : state.end + length])
        state.end += length
    if stop is not None:
        demand(state.end == stop, "a frame that ends there")
        return state
    demand(state.end >= state.known_durable, "durable bytes")
    demand(state.metadata is None or state.metadata[0][0] <= state.last_applied[0], "the entries of the last snapshot")
    for offset in range(state.end, len(log), 8):
        watermark = sealed_header(log, offset, identity)
        demand(watermark is None or watermark <= state.end, "durable bytes, says a later header")
    if last[0]:
        demand(last[0] in state.frames, "the frame that CURRENT names")
        checksum, length = struct.unpack_from("<QQ", log, last[0])
        demand((last[0] + length, checksum) == (durable_offset, last[1]), "the history that CURRENT names")
    return state


def decode_base(log: bytes, base: bytes) -> Decoded:
    """The state that the log starts after."""
    last_included = struct.unpack_from("<QQ", log, 32)
    (size,) = struct.unpack_from("<Q", log, 48)
    demand(size == len(base), "the base's size")
    if not size:
        demand(last_included == (0, 0) and log[56:88] == bytes(32), "a zero")
        return Decoded()
    demand(base[128:160] == log[56:88], "the base's checksum")
    demand(base[12:16] == bytes(4), "codec 0")
    state = decode_snapshot(base)
    demand(state.last_applied == last_included, "the base's last included entry")
    state.log_start = up_to(size + ALIGNMENT, ALIGNMENT)
    return state


def sealed_header(log: bytes, offset: int, identity: int) -> int | None:
    """The watermark of a frame whose header is right (0 when it says nothing), or None."""
    if len(log) - offset < FRAME_HEADER:
        return None
    length, lag, run_count, seal = struct.unpack_from("<QIIQ", log, offset + 8)
    if length % 8 or not FRAME_HEADER + 16 * run_count <= length <= LARGEST_ARENA:
        return None
    watermark = 0 if lag == SAYS_NOTHING else offset - 8 * lag
    if lag != SAYS_NOTHING and watermark < LOG_HEADER:
        return None
    if xxhash.xxh64_intdigest(log[offset + 8 : offset + 24], identity ^ offset) != seal:
        return None
    return watermark


def valid_frame(log: bytes, offset: int, identity: int, previous: int) -> int | None:
    """The watermark of a valid frame (0 when it says nothing), or None."""
    watermark = sealed_header(log, offset, identity)
    if watermark is None:
        return None
    checksum, length, seal = struct.unpack_from("<QQ8xQ", log, offset)
    content = log[offset + FRAME_HEADER : offset + length]
    if length > len(log) - offset or xxhash.xxh64_intdigest(content, seal ^ previous) != checksum:
        return None
    return watermark


def decode_frame(state: Decoded, frame: bytes) -> None:
    (run_count,) = struct.unpack_from("<I", frame, 20)
    before = after = state.last_applied[0]
    gaps = []
    for i in range(run_count):
        last, term = struct.unpack_from("<QQ", frame, FRAME_HEADER + 16 * i)
        decode_run(state, after, last, term)
        demand(term != GAP or i + 1 < run_count, "a gap is not last")
        gaps += [(after, last)] if term == GAP else []
        after = last
    offset = FRAME_HEADER + 16 * run_count
    while offset < len(frame):
        record = decode_record(frame[offset:])
        operation, index = record[:2]
        if operation not in (4, 5):
            demand(before < index <= state.last_applied[0], "an index of this frame")
            demand(not any(after < index <= last for after, last in gaps), "an index in no gap")
            before = index - 1
        take_record(state, record, state.log_start + state.end + offset)
        offset += record[-1]


def decode_run(state: Decoded, after: int, last: int, term: int) -> None:
    demand(after < last < GAP, "indexes that rise")
    if term == GAP:
        return
    demand(term >= state.last_applied[1], "terms that never fall")
    if state.runs and state.runs[-1][2] == term:
        state.runs[-1] = (state.runs[-1][0], last, term)
    else:
        state.runs.append((after + 1, last, term))
    state.last_applied = (last, term)


Record = tuple[int, int, bytes, bytes, "int | None", int]


def decode_record(data: bytes | memoryview) -> Record:
    """Operation, index, key, value, deadline and size of the record that the bytes start with."""
    demand(len(data) >= 16, "a whole record")
    index, value_size, key_size, operation, timed = struct.unpack_from("<QIHBB", data)
    size = up_to(16 + key_size + value_size, 8)
    record = bytes(data[: size + 8 * timed])
    demand(len(record) == size + 8 * timed, "a whole record")
    demand(timed == 0 or (timed == 1 and operation in (1, 8)), "a byte that tells of a deadline")
    demand(not any(record[16 + key_size + value_size : size]), "a zero")
    deadline = int.from_bytes(record[size:], "little") if timed else None
    demand(deadline is None or deadline < 2**63, "a deadline")
    key, value = record[16 : 16 + key_size], record[16 + key_size : 16 + key_size + value_size]
    return operation, index, key, value, deadline, len(record)


def take_record(state: Decoded, record: Record, place: int) -> None:
    operation, index, key, value, deadline, size = record
    state.clean = operation == 5
    if operation == 1:
        state.items.pop(key, None)
        state.items[key] = value
        state.places[key] = place
        state.puts[place] = size
        state.deadlines[key] = deadline
        state.touches.pop(key, None)
    elif operation == 2:
        demand(value == b"", "no value")
        state.items.pop(key, None)
        state.places.pop(key, None)
        state.deadlines.pop(key, None)
        state.touches.pop(key, None)
    elif operation == 8:
        demand(value == b"", "no value")
        state.touch_place = place
        state.puts[place] = size
        if key in state.items:  # no log of the library's says it of another
            state.deadlines[key] = deadline
            state.touches[key] = place
    elif operation == 9:
        demand(key == b"" and len(value) == 8, "a clock")
        state.clock, state.clock_place = int.from_bytes(value, "little"), place
        demand(0 < state.clock < 2**63, "a time")
    elif operation == 3:
        demand(key == b"", "no key")
        term = state.term(index)
        assert term is not None
        state.membership = ((index, term), value)
        state.config_place = place
    elif operation == 4:
        demand(key == b"" and len(value) >= 8, "a term and a checksum")
        state.metadata = ((index, *struct.unpack_from("<Q", value)), value[8:])
    elif operation == 5:
        demand(not key and not value, "no key and no value")
    else:
        demand(operation in (6, 7), "a known operation")
        demand(len(key) == 8, "the id of a session")
        session = int.from_bytes(key, "little")
        state.sessions.pop(session, None)
        state.places.pop(session, None)
        if operation == 7:
            demand(value == b"", "no value")
        else:
            check_session(value)
            state.sessions[session] = value
            state.puts[place] = size
            state.places[session] = place


def check_session(value: bytes) -> None:
    demand(16 <= len(value) <= 22 + (1 << 20), "a sequence, a deadline and a result")
    sequence, deadline = struct.unpack_from("<QQ", value)
    demand(deadline < 2**63 or deadline == NO_DEADLINE, "a deadline")
    result = value[16:]
    demand((sequence == 0) == (result == b""), "a result, from sequence 1 on")
    if result:
        demand(result[0] <= 10, "a known result")
        rest = result[1:] if result[0] < 2 else take_value(result[1:], 0)
        demand(rest == b"", "nothing after the value")


def take_value(data: bytes, depth: int) -> bytes:
    """What comes after the value that the bytes start with."""
    demand(data != b"" and data[0] <= 5, "a known value")
    if data[0] < 3:
        return data[1:]
    if data[0] == 3:
        unpack("<q", data, 1)
        return data[9:]
    (count,) = unpack("<I", data, 1)
    data, kind = data[5:], data[0]
    demand(count <= len(data), "as many bytes or members")
    if kind == 4:
        return data[count:]
    demand(depth < 8, "lists that are not too deep")
    for _ in range(count):
        data = take_value(data, depth + 1)
    return data


# ---- snapshots -------------------------------------------------------------------------------------------

def decode_snapshot(data: bytes) -> Decoded:
    """The state of a snapshot, both of whose checksums are right."""
    demand(len(data) >= SNAPSHOT_HEADER and data[:8] == b"FASTSM-S", "magic")
    version, codec, *last = struct.unpack_from("<IIQQ", data, 8)
    demand(version == 0, "version")
    keys, run_count, membership_size, records_size, sessions, clock = struct.unpack_from("<6Q", data, 32)
    attachment_size, stored_size = struct.unpack_from("<QQ", data, 112)
    demand(clock < 2**63, "a time")
    demand(last != [0, 0] or clock == 0, "no time in the empty state")
    demand(blake3.blake3(data[:128] + data[SNAPSHOT_HEADER:]).digest() == data[128:160], "checksum")
    start = SNAPSHOT_HEADER + up_to(attachment_size, 8)
    demand(not any(data[SNAPSHOT_HEADER + attachment_size : start]), "a zero")
    demand(start + stored_size == len(data), "sizes that add up")
    flat = flat_state(data[start:], codec, membership_size + 24 * run_count + records_size)
    demand(blake3.blake3(data[16:80] + flat).digest() == data[80:112], "state checksum")
    state = Decoded(clock=clock)
    state.runs = decode_runs(flat[membership_size : membership_size + 24 * run_count])
    state.last_applied = state.runs[-1][1:] if state.runs else (0, 0)
    demand(state.last_applied == tuple(last), "runs that end with the last included entry")
    records_at = membership_size + 24 * run_count
    configs = take_records(state, (3,), flat[:membership_size], start)
    demand(configs == (membership_size > 0), "one membership, or none")
    records = take_records(state, (1, 6, 8), flat[records_at:], start + records_at)
    demand(len(state.items) == keys and len(state.sessions) == sessions, "as many keys and sessions")
    demand(records == keys + sessions + len(state.touches), "one record for each, and one touch at most")
    return state


def take_records(state: Decoded, expected: tuple[int, ...], data: bytes, place: int) -> int:
    """Takes records of some operations; how many there were."""
    offset = count = before = 0
    while offset < len(data):
        record = decode_record(memoryview(data)[offset:])
        operation, index = record[:2]
        demand(operation in expected, "an operation")
        demand(index >= before and state.term(index) is not None, "indexes in runs, which do not fall")
        take_record(state, record, place + offset)
        offset, count, before = offset + record[-1], count + 1, index
    return count


def flat_state(stored: bytes, codec: int, size: int) -> bytes:
    demand(codec in (0, 1), "codec")
    if codec == 1:
        import zstandard  # noqa: PLC0415  # an extra

        demand(len(stored) <= size + size // 256 + 1024, "a size of what is stored")
        frame = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompressobj()
        stored = frame.decompress(stored)
        demand(frame.eof and not frame.unused_data, "one whole frame")
    demand(len(stored) == size, "the size of the flat state")
    return stored


def decode_runs(data: bytes) -> list[Run]:
    runs = list(struct.iter_unpack("<QQQ", data))
    for run, following in pairwise(runs):
        demand(run[1] < following[0] and run[2] < following[2], "runs and terms that rise")
    demand(all(0 < first <= last for first, last, _ in runs), "runs that are not empty")
    return runs


# ---- the saved table -------------------------------------------------------------------------------------

def check_table(table: bytes, log: bytes, base: bytes) -> Decoded:
    """Whether a saved table is what the log's frames up to its offset give; the state of these."""
    identity, stop = header(table, b"FASTSM-T", TABLE_HEADER)
    start, *seed, keys, live, config, segments, depth, run_count = struct.unpack_from("<9Q", table, 32)
    metadata_size, words, frames, last, chain = struct.unpack_from("<5Q", table, 104)
    clock, clock_place, touch_place, due_keys, due_sessions = struct.unpack_from("<5Q", table, 144)
    parts_in_head = [(*seed, keys, segments, depth), *struct.iter_unpack("<5Q", table[184:264])]
    ordered, checksum = struct.unpack_from("<QQ", table, 264)
    demand(xxhash.xxh64_intdigest(table[TABLE_HEADER:]) == checksum, "checksum of the sections")
    (generation,) = struct.unpack_from("<Q", log, 16)
    state = decode_log(log, generation, identity, 0, base=base, stop=stop)
    demand(start == state.log_start, "where the log starts")
    demand((last, chain) == (state.frames[-1] if state.frames else 0, state.chain), "the bytes that it was made from")
    demand((frames, config) == (len(state.frames), state.config_place), "counts")
    demand(
        (clock, clock_place, touch_place) == (state.clock, state.clock_place, state.touch_place), "clock and touches")
    newest = {*state.places.values(), *state.touches.values()}
    demand(live == sum(state.puts[place] for place in newest), "the live records' sizes")
    parts = Sections(table, TABLE_HEADER)
    demand(decode_runs(parts.take(24 * run_count, 8)) == state.runs, "the log's runs")
    metadata = parts.take(metadata_size, 8)
    expected = b"" if state.metadata is None else struct.pack("<QQ", *state.metadata[0]) + state.metadata[1]
    demand(metadata == expected, "the newest snapshot's metadata")
    dead = parts.take(8 * words, 8)
    marked = {16 * i for i in range(8 * len(dead)) if dead[i >> 3] >> (i & 7) & 1}
    demand(marked == {place & ~15 for place in state.puts if place not in newest}, "marks of exactly the dead records")
    demand(not dead or any(dead[-8:]), "a last word that is not zero")
    contents = [
        {key: place for key, place in state.places.items() if isinstance(key, bytes)},
        {struct.pack("<Q", key): place for key, place in state.places.items() if isinstance(key, int)}, state.touches]
    directories = []
    for (_, _, count, segments, depth), content in zip(parts_in_head, contents, strict=True):
        demand(count == len(content), "as many entries")
        demand(count > 0 or (segments, depth) == (0, 0), "no segments without entries")
        size = 4 << depth if segments else 0
        directories.append(struct.unpack(f"<{size // 4}I", parts.take(size, 8)))
    check_due(parts.take(16 * due_keys, 8), {
        (expires, state.touches.get(key, state.places[key])) for key, expires in state.deadlines.items()
        if expires is not None})
    expiring = {key: struct.unpack_from("<Q", value, 8)[0] for key, value in state.sessions.items()}
    check_due(parts.take(16 * due_sessions, 8), {
        (expires, state.places[key]) for key, expires in expiring.items() if expires != NO_DEADLINE})
    for (*seed, _, segments, depth), directory, content in zip(parts_in_head, directories, contents, strict=True):
        if segments:
            parts.take(0, ALIGNMENT)
            slots = parts.take(SEGMENT * segments, 1)
            check_segments(slots, directory, depth, (seed[0], seed[1]), content)
    demand(ordered in (0, len(contents[0])), "all keys in their order, or none")
    in_order = struct.unpack(f"<{ordered}Q", parts.take(8 * ordered, 1))
    demand(list(in_order) == [contents[0][key] for key in sorted(contents[0])[:ordered]], "places sorted by key")
    demand(parts.offset == len(table), "sections up to the end")
    return state


def check_due(data: bytes, expected: set[tuple[int, int]]) -> None:
    """Deadlines and places, as a heap."""
    found = list(struct.iter_unpack("<QQ", data))
    demand(len(found) == len(expected) and set(found) == expected, "the deadlines, each once")
    demand(all(found[i][0] >= found[(i - 1) // 4][0] for i in range(1, len(found))), "a heap")


class Sections:
    """Sections of a file, taken one after the other."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data = data
        self.offset = offset

    def take(self, size: int, multiple: int) -> bytes:
        """The next one; what is between it and the next multiple is zero."""
        start, stop = self.offset, self.offset + size
        self.offset = up_to(stop, multiple)
        demand(not any(self.data[stop : self.offset]), "a zero")
        return self.data[start:stop]


def check_segments(
    data: bytes, directory: tuple[int, ...], depth: int, seed: tuple[int, int], places: dict[bytes, int]
) -> None:
    """Every key is found where the page says, and nothing else is there."""
    slots = [struct.unpack_from(f"<{SLOTS}Q", data, SEGMENT * i) for i in range(len(data) // SEGMENT)]
    depths = []
    for number, segment in enumerate(slots):
        used, own = struct.unpack_from("<II56x", data, SEGMENT * number + 8 * SLOTS)
        demand(used == sum(slot != 0 for slot in segment) < SLOTS, "a count, and an empty slot")
        demand(not any(data[SEGMENT * (number + 1) - 56 : SEGMENT * (number + 1)]), "a zero")
        named = [i for i, entry in enumerate(directory) if entry == number]
        demand(len(named) == 1 << depth - own, "as many names as the depth says")
        demand(named[0] % len(named) == 0 and named[-1] - named[0] == len(named) - 1, "names that share their bits")
        depths.append(own)
    for key, place in places.items():
        hashed = siphash_1_3(seed, key)
        number = directory[hashed >> 64 - depth]
        following = hashed << depths[number] // 4 * 4 & GAP
        slot = (hashed & 0xFFFFFF) << 40 | following >> 60 << 36 | place // 8
        at = hashed >> 12 & 0xFFF
        while slots[number][at] != slot:
            demand(slots[number][at] != 0, "no empty slot before the key's")
            at = (at + 1) % SLOTS
    demand(sum(slot != 0 for segment in slots for slot in segment) == len(places), "no other slots in use")


def siphash_1_3(seed: tuple[int, int], data: bytes) -> int:
    """SipHash with one round for each word and three at the end (Aumasson and Bernstein)."""
    v = [seed[0] ^ 0x736F6D6570736575, seed[1] ^ 0x646F72616E646F6D,
         seed[0] ^ 0x6C7967656E657261, seed[1] ^ 0x7465646279746573]  # fmt: skip

    def half(a: int, b: int, bits: int) -> None:
        v[a] = (v[a] + v[b]) & GAP
        v[b] = (v[b] << bits | v[b] >> 64 - bits) & GAP ^ v[a]

    def sip_round() -> None:
        half(0, 1, 13)
        half(2, 3, 16)
        v[0] = (v[0] << 32 | v[0] >> 32) & GAP
        half(2, 1, 17)
        half(0, 3, 21)
        v[2] = (v[2] << 32 | v[2] >> 32) & GAP

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        sip_round()
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(3):
        sip_round()
    return v[0] ^ v[1] ^ v[2] ^ v[3]

"""Reading a log back: where its frames end, what is torn and what is corrupt.

The rule: bytes that are known to be durable, from CURRENT or from the watermark of any valid frame, must be intact;
otherwise the log is corrupt, and nothing is changed. Damage further on is torn: the bytes there were never promised.
"""

import os

from cpython.exc cimport PyErr_CheckSignals
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.format cimport (
    BROKEN, FRAME_RUNS, LOG_HEADER_SIZE, MALFORMED, NOTHING, VALID,
    frame_checksum, frame_length, frame_watermark, look_at_frame, look_at_header, look_inside_frame, record_index,
    record_key,
)
from fastsm.disk.hashing cimport load64
from fastsm.disk.mapping cimport Mapping
from fastsm.long_work cimport Work
from fastsm.lookup.terms cimport Terms

from fastsm.disk import headers
from fastsm.disk.torn_tail import torn_tail_end
from fastsm.errors import CorruptionError
from fastsm.long_work import no_tick, run_long
from fastsm.types import LogId

cdef enum:
    SLICE = 16 << 20         # bytes between two checks whether to go on: a few milliseconds
    PIECE = 64 << 20         # of a file that is read, not mapped: each piece takes the GIL twice
    INSIDE = 16              # a flag for findings inside a valid frame

FINDINGS = {
    NOTHING: "zeros",
    BROKEN: "bytes that are not a frame, or whose checksum does not match",
    MALFORMED: "a frame whose checksum matches, but whose content is malformed",
}


cdef class Scan:
    """A pass over the frames of a mapped log of `size` bytes, from the offset `start` on. It writes nothing.

    What precedes `start` is known already: `terms` contain its entries, `frames` is the number of its frames, the last
    of which starts at `last_frame`, and `chain` is the checksum to which the next frame is chained.
    """

    def __cinit__(
        self, Mapping mapping, uint64_t size, head, str path, Terms terms, uint64_t start=LOG_HEADER_SIZE,
        frames=0, last_frame=0, chain=None,
    ):
        self.mapping = mapping
        self.address = mapping.address + mapping.start
        self.size = size
        self.path = path
        self.identity = head.identity
        self.end = start
        self.frames = frames
        self.last_frame = last_frame
        self.chain = headers.head_checksum(headers.pack_log_head(head)) if chain is None else chain
        self.terms = terms
        self.progress.last_index = terms.seen
        self.progress.last_term = terms.last_term(head.base_term)
        self.progress.snapshot = NULL

    def read_frames(self):
        """Checks frames up to the first invalid one, and adds their runs to the terms."""
        if run_long(self._read_all, no_tick, self.size - self.end) != VALID:
            raise CorruptionError(self.path, self.end, "a frame with well-formed content", FINDINGS[MALFORMED])

    def _read_all(self, Work work):
        """Does the work of `read_frames`; returns MALFORMED if a frame has the right checksum, but bad content."""
        cdef int finding = VALID
        while finding == VALID:
            with nogil:
                finding = self.read_slice()
                while finding == VALID and work.goes_on(self.end):
                    finding = self.read_slice()
            work()
        return MALFORMED if finding & INSIDE else VALID

    cdef int read_slice(self) except -1 nogil:
        """Reads a slice of frames; returns VALID if there may be more to read."""
        cdef const uint8_t *frame
        cdef uint64_t pause = self.end + SLICE
        cdef int finding
        while self.end <= pause:
            finding = self.look(self.end)
            if finding != VALID:
                return finding
            frame = self.address + self.end
            if look_inside_frame(frame, &self.progress) != VALID:
                return INSIDE | MALFORMED
            self.terms.take_frame(frame)
            self.watermark = max(self.watermark, frame_watermark(frame, self.end))
            self.frames += 1
            self.last_frame, self.chain = self.end, frame_checksum(frame)
            self.end += frame_length(frame)
        return VALID

    cdef int look(self, uint64_t offset) noexcept nogil:
        return look_at_frame(self.address + offset, self.size - offset, self.identity, offset, self.chain)

    def judge_durable(self, uint64_t known_durable):
        """Raises if the frames end before what CURRENT or one of them says was durable."""
        self.watermark = max(self.watermark, known_durable)
        if self.end < self.watermark:
            raise self.corrupt(f"a frame, since the log is known durable up to offset {self.watermark}")

    def judge_snapshot(self, metadata):
        """Raises if the state is older than its own snapshot: the host may have dropped its log up to that snapshot.

        `metadata`: of the newest snapshot known before these frames were read.
        """
        included = metadata.last_included if metadata is not None else LogId()
        if self.progress.snapshot != NULL:
            included = LogId(record_index(self.progress.snapshot), load64(record_key(self.progress.snapshot)))
        if included.index > self.progress.last_index:
            raise CorruptionError(
                self.path, self.end, f"entries up to {included}, which the last snapshot includes",
                f"entries up to {self.last_applied()}",
                "install that snapshot, or restore the directory from a replica")

    def last_applied(self):
        """Returns the last entry of the frames."""
        return LogId(self.progress.last_index, self.progress.last_term)

    def corrupt(self, expected):
        """Returns the error for a file in which something other than `expected` follows the valid frames."""
        if self.end < self.size:
            found = FINDINGS[self.look(self.end)]
        else:
            found = "no whole frame" if self.whole_frames_only else "the end of the file"
        return CorruptionError(self.path, self.end, expected, found)

    def end_of_torn_tail(self, int descriptor):
        """Returns the end of the torn tail after the last valid frame; the end of the frames if there is no tail.

        Raises `CorruptionError` if the tail proves that bytes which are gone or damaged were once durable.
        """
        return torn_tail_end(descriptor, self.identity, self.end, self.size, self.path)


def judge_expected(path, end, expected, recovered, Terms terms):
    """Raises unless what was recovered contains the entry that the embedder knows was durable."""
    if expected is None:
        return
    expected = LogId(*expected)
    if recovered.index < expected.index:
        raise CorruptionError(
            path, end, f"entries up to {expected} (expect_applied)", f"entries up to {recovered}",
            "acknowledged entries are lost: restore the directory from a snapshot or a replica")
    term = terms.get(expected.index)
    if term is not None and term != expected.term:
        raise CorruptionError(
            path, end, f"entry {expected.index} of term {expected.term} (expect_applied)", f"term {term}",
            "this directory belongs to another history: restore it from a snapshot or a replica")


# ---- reading without the mapping ------------------------------------------------------------------------

def read_piece(int descriptor, size, offset):
    """Returns `size` bytes at `offset`, or fewer if the file ends before that."""
    pieces = []
    while size > 0:
        piece = os.pread(descriptor, min(size, PIECE), offset)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def known_frames(int descriptor, head, current):
    """Returns the end and the checksum of the frame that CURRENT names, if the file has that frame there.

    If CURRENT names no frame, or the file has another one, returns the end of the log's header, and its checksum.
    """
    cdef const uint8_t *frame
    nothing = LOG_HEADER_SIZE, headers.head_checksum(headers.pack_log_head(head))
    if not current.last_frame:
        return nothing
    cdef bytes header = os.pread(descriptor, FRAME_RUNS, current.last_frame)
    cdef uint64_t offset = current.last_frame
    cdef uint64_t identity = head.identity
    if len(header) < FRAME_RUNS:
        return nothing
    frame = <const uint8_t *>PyBytes_AS_STRING(header)
    length = frame_length(frame)
    if (
        look_at_header(frame, FRAME_RUNS, identity, offset) != VALID
        or offset + length != current.durable_offset or frame_checksum(frame) != current.last_checksum
    ):
        return nothing
    return current.durable_offset, current.last_checksum


def whole_frames(int descriptor, head, uint64_t size, progress=None, first_chain=None, known=None):
    """Returns the end of a log's valid frames, and the last one's checksum, read from the file, not the mapping.

    That makes it safe next to an owner that cuts the file, and turns read errors of the disk into exceptions.

    `first_chain`: the checksum to which the first frame is chained, if `head` is not that of a state machine's log.
    `known`: the end and the checksum of frames that need not be read.
    """
    if known is None:
        if first_chain is None:
            first_chain = headers.head_checksum(headers.pack_log_head(head))
        known = LOG_HEADER_SIZE, first_chain
    cdef uint64_t end = known[0]
    cdef uint64_t offset = end   # the offset of `piece` in the file
    cdef uint64_t left, length
    cdef uint64_t identity = head.identity
    cdef uint64_t chain = known[1]
    cdef const uint8_t *frame
    cdef uint64_t told = 0                   # the bytes last reported to `progress`
    cdef bytes piece = b""
    cdef int finding
    while True:
        left = offset + PyBytes_GET_SIZE(piece) - end
        frame = <const uint8_t *>PyBytes_AS_STRING(piece) + (end - offset)
        length = FRAME_RUNS
        if left >= FRAME_RUNS:
            if look_at_header(frame, left, identity, end) != VALID:
                break  # checked before the length is trusted, and that much is read
            length = frame_length(frame)
        if left < length and length <= size - end:
            piece = read_piece(descriptor, min(max(length, <uint64_t>PIECE), size - end), end)
            offset = end
            if <uint64_t>PyBytes_GET_SIZE(piece) < length:
                break  # the file was cut in the meantime
            continue
        with nogil:
            finding = look_at_frame(frame, left, identity, end, chain)
            while finding == VALID:
                chain = frame_checksum(frame)
                end += length
                left -= length
                frame += length
                if left < FRAME_RUNS or look_at_header(frame, left, identity, end) != VALID:
                    break
                length = frame_length(frame)
                if length > left:
                    break
                finding = look_at_frame(frame, left, identity, end, chain)
        if finding != VALID:
            break
        if end - told >= PIECE:
            told = end
            PyErr_CheckSignals()
            if progress is not None:
                progress(end, size)
    if progress is not None and end == size:
        progress(end, size)
    return end, chain


def verify_file(int descriptor, head, str path, uint64_t end, uint64_t chain, progress=None):
    """Raises `CorruptionError` unless the file has its header, and valid frames up to `end`.

    `chain`: the checksum of the last frame, which covers all of them.
    """
    found = headers.unpack_log_head(os.pread(descriptor, LOG_HEADER_SIZE, 0), path)
    if found != head:
        raise CorruptionError(path, 0, head, found)
    stop, last = whole_frames(descriptor, head, end, progress)
    if stop < end:
        raise CorruptionError(path, stop, "a valid frame", "bytes whose checksum does not match, or the end")
    if last != chain:
        raise CorruptionError(
            path, stop, f"a last frame of checksum {chain:#018x}", f"another one, of checksum {last:#018x}")

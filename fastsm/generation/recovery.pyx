"""Reading a log back: where its frames end, what is torn and what is corrupt.

The rule: bytes that are known durable, from CURRENT or from the watermark of any valid frame, must be there;
else they are corrupt, and nothing is touched. What is wrong behind them was never promised: it is torn.
"""

import errno
import os

from cpython.exc cimport PyErr_CheckSignals
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint64_t

from fastsm.disk.format cimport (
    BROKEN, FRAME_RUNS, LOG_HEADER_SIZE, MALFORMED, NOTHING, VALID,
    frame_is_sealed, frame_length, frame_run_count, frame_size, frame_watermark, look_at_frame, look_inside_frame,
    record_index,
    record_key, Progress,
)
from fastsm.disk.hashing cimport load64
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.terms cimport Terms

from fastsm.disk import format
from fastsm.errors import CorruptionError
from fastsm.types import LogId

cdef enum:
    SLICE = 16 << 20         # bytes between two looks at signals: some milliseconds
    PIECE = 4 << 20          # of a file that is read rather than mapped

FINDINGS = {
    NOTHING: "zeros",
    BROKEN: "bytes that are no frame, or whose checksum does not match",
    MALFORMED: "a frame with a matching checksum whose content does not add up",
}


cdef class Scan:
    """A pass over the frames of a mapped log of `size` bytes, from the offset `behind` on. It writes nothing.

    What lies before that is known already: `terms` hold its entries.
    """

    def __cinit__(
        self, Mapping mapping, uint64_t size, head, str path, Terms terms, uint64_t behind, frames, last_frame=0
    ):
        self.mapping = mapping
        self.address = mapping.address + mapping.start
        self.size = size
        self.path = path
        self.identity = head.identity
        self.end = behind
        self.frames = frames
        self.last_frame = last_frame
        self.terms = terms
        self.progress.last_index = terms.seen
        self.progress.last_term = terms.last_term(head.base_term)
        self.progress.snapshot = NULL

    def read_frames(self):
        """Checks frame after frame up to the first that is not valid; the terms take their runs."""
        cdef const uint8_t *frame
        cdef uint64_t pause = self.end + SLICE
        cdef int finding
        while True:
            with nogil:
                finding = self.look(self.end)
            if finding != VALID:
                return
            frame = self.address + self.end
            if look_inside_frame(frame, &self.progress) != VALID:
                raise CorruptionError(self.path, self.end, "a frame whose content adds up", FINDINGS[MALFORMED])
            self.terms.take_frame(frame)
            self.watermark = max(self.watermark, frame_watermark(frame, self.end))
            self.frames += 1
            self.last_frame = self.end
            self.end += frame_length(frame)
            if self.end > pause:
                PyErr_CheckSignals()
                pause = self.end + SLICE

    cdef int look(self, uint64_t offset) noexcept nogil:
        return look_at_frame(self.address + offset, self.size - offset, self.identity, offset)

    def judge_durable(self, uint64_t known_durable):
        """Raises when the frames end before what CURRENT or one of them says was durable."""
        self.watermark = max(self.watermark, known_durable)
        if self.end < self.watermark:
            raise self.corrupt(f"a frame, for the log is known durable up to offset {self.watermark}")

    def judge_snapshot(self, metadata):
        """Raises when the state is behind its own snapshot: the host may have dropped its log up to there.

        `metadata`: of the newest snapshot that was known before the frames which were read here.
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
        """The last entry of the frames."""
        return LogId(self.progress.last_index, self.progress.last_term)

    def corrupt(self, expected):
        """The error for what is at the end of the frames."""
        if self.end < self.size:
            found = FINDINGS[self.look(self.end)]
        else:
            found = "no whole frame" if self.whole_frames_only else "the end of the file"
        return CorruptionError(self.path, self.end, expected, found)

    def look_behind(self, int descriptor):
        """Where the last byte that is not zero ends, behind the last valid frame.

        A valid frame there whose watermark is beyond the end of the frames proves that what is there now was
        durable once: then it is corrupt, not torn.
        """
        cdef uint64_t torn_end = self.end
        cdef uint64_t offset, stop, pause
        cdef int64_t budget = 4 * <int64_t>(self.size - self.end) + (64 << 20)
        for start, limit in data_ranges(descriptor, self.end, self.size):
            offset = max(self.end, <uint64_t>start & ~<uint64_t>7)
            stop = limit
            while offset < stop:
                pause = min(stop, offset + SLICE)
                with nogil:
                    offset = self.search(offset, pause, &torn_end, &budget)
                PyErr_CheckSignals()
                if offset < pause:
                    watermark = frame_watermark(self.address + offset, offset)
                    raise self.corrupt(
                        f"a frame, for the one at offset {offset} says that the log was durable up to offset "
                        f"{watermark} when it was written")
            if budget < 0:
                raise self.forged()
        return torn_end

    def look_behind_by_reading(self, int descriptor):
        """`look_behind`, for a file that is not mapped up to its end, since an owner may come and cut it."""
        cdef uint64_t torn_end = self.end
        cdef uint64_t offset, step, i, length
        cdef int64_t budget = 4 * <int64_t>(self.size - self.end) + (64 << 20)
        cdef const uint8_t *p
        cdef bytes piece, frame
        for start, limit in data_ranges(descriptor, self.end, self.size):
            offset = max(self.end, <uint64_t>start & ~<uint64_t>7)
            while offset < <uint64_t>limit:
                piece = read_piece(descriptor, min(<uint64_t>PIECE, self.size - offset), offset)
                step = PyBytes_GET_SIZE(piece)
                torn_end = max(torn_end, offset + len(piece.rstrip(b"\0")) if piece.strip(b"\0") else 0)
                PyErr_CheckSignals()
                for i in range(0, step - min(step, FRAME_RUNS - 1), 8):
                    p = <const uint8_t *>PyBytes_AS_STRING(piece) + i
                    length = frame_length(p)
                    if not load64(p) or length < FRAME_RUNS or length > self.size - offset - i or length & 7:
                        continue
                    if frame_size(frame_run_count(p), 0) > length or frame_watermark(p, offset + i) <= self.end:
                        continue
                    if not frame_is_sealed(p, self.identity, offset + i):
                        continue
                    frame = piece[i:i + length] if length <= step - i else read_piece(descriptor, length, offset + i)
                    p = <const uint8_t *>PyBytes_AS_STRING(frame)
                    if <uint64_t>PyBytes_GET_SIZE(frame) == length and self.looks_like_frame(p, offset + i, &budget):
                        if look_at_frame(p, length, self.identity, offset + i) == VALID:
                            raise self.proven(offset + i, frame_watermark(p, offset + i))
                    if budget < 0:
                        raise self.forged()
                if step < <uint64_t>PIECE:
                    break
                offset += step - FRAME_RUNS
        return torn_end

    cdef object proven(self, uint64_t offset, uint64_t watermark):
        return CorruptionError(
            self.path, self.end,
            f"a frame, for the one at offset {offset} says that the log was durable up to offset {watermark} when it "
            "was written", FINDINGS[BROKEN])

    cdef object forged(self):
        return CorruptionError(
            self.path, self.end, "a torn tail", "bytes made to look like many frames that overlap")

    cdef uint64_t search(
        self, uint64_t offset, uint64_t stop, uint64_t *torn_end, int64_t *budget
    ) noexcept nogil:
        """The first valid frame in [offset, stop) whose watermark is beyond the end, or `stop`.

        Frames start at multiples of 8. `budget` bounds the bytes that are hashed in vain.
        """
        cdef const uint8_t *p
        while offset < stop:
            p = self.address + offset
            if self.size - offset < FRAME_RUNS:
                while offset < stop:
                    if self.address[offset]:
                        torn_end[0] = offset + 1
                    offset += 1
                return stop
            if load64(p):
                torn_end[0] = offset + 8
                if self.looks_like_frame(p, offset, budget) and self.look(offset) == VALID:
                    return offset
            offset += 8
        return stop

    cdef bint looks_like_frame(self, const uint8_t *p, uint64_t offset, int64_t *budget) noexcept nogil:
        """Whether it would prove something: this log wrote that header for this place, and its structure adds up.

        Frames of one log do not overlap, so the honest ones of a tail have fewer bytes than the tail: `budget` bounds
        only what a forger, who knows the log's identity, can make this look at again and again.
        """
        cdef Progress progress = self.progress
        cdef uint64_t length = frame_length(p)
        if length < FRAME_RUNS or length > self.size - offset or length & 7:
            return False
        if frame_size(frame_run_count(p), 0) > length or frame_watermark(p, offset) <= self.end:
            return False
        if not frame_is_sealed(p, self.identity, offset):
            return False
        budget[0] -= length
        return budget[0] >= 0 and look_inside_frame(p, &progress) == VALID


def data_ranges(int descriptor, uint64_t start, uint64_t size):
    """The parts of [start, size) that are not holes: a sparse terabyte takes no time."""
    while start < size:
        try:
            data = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        start = min(os.lseek(descriptor, data, os.SEEK_HOLE), size)
        yield data, start


def judge_expected(path, end, expected, recovered, Terms terms):
    """Raises unless what was recovered covers the entry that the embedder knows was durable."""
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
    """`size` bytes at `offset`, or what there is of them."""
    pieces = []
    while size > 0:
        piece = os.pread(descriptor, min(size, PIECE), offset)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def whole_frames_end(int descriptor, head, str path, uint64_t size, progress=None):
    """Where the valid frames of a log end, found by reading the file, not the mapping.

    So it is safe beside an owner who cuts the file, and it sees the disk's errors as errors.
    """
    cdef uint64_t end = LOG_HEADER_SIZE
    cdef uint64_t offset = LOG_HEADER_SIZE   # of `piece` in the file
    cdef uint64_t left, length
    cdef uint64_t identity = head.identity
    cdef const uint8_t *frame
    cdef uint64_t told = 0                   # to `progress`
    cdef bytes piece = b""
    cdef int finding
    while True:
        left = offset + PyBytes_GET_SIZE(piece) - end
        frame = <const uint8_t *>PyBytes_AS_STRING(piece) + (end - offset)
        length = frame_length(frame) if left >= FRAME_RUNS else FRAME_RUNS
        if left < length and length <= size - end:
            piece = read_piece(descriptor, min(max(length, <uint64_t>PIECE), size - end), end)
            offset = end
            if <uint64_t>PyBytes_GET_SIZE(piece) < length:
                return end  # the file was cut meanwhile
            continue
        with nogil:
            finding = look_at_frame(frame, left, identity, end)
        if finding != VALID:
            break
        end += length
        if end - told >= PIECE:
            told = end
            PyErr_CheckSignals()
            if progress is not None:
                progress(end, size)
    if progress is not None and end == size:
        progress(end, size)
    return end


def verify_file(int descriptor, head, str path, uint64_t end, progress=None):
    """Raises `CorruptionError` unless the file holds its header, and valid frames up to `end`."""
    found = format.unpack_log_head(os.pread(descriptor, LOG_HEADER_SIZE, 0), path)
    if found != head:
        raise CorruptionError(path, 0, head, found)
    stop = whole_frames_end(descriptor, head, path, end, progress)
    if stop < end:
        raise CorruptionError(path, stop, "a valid frame", "bytes whose checksum does not match, or none")

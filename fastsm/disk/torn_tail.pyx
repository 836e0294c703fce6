"""What follows the last valid frame of a file: a torn tail, or the proof that durable bytes were lost.

Logs and segments of the journal use the same search. It reads the file, not a mapping, so that an owner that cuts the
file meanwhile, or a disk error, causes exceptions instead of signals.

A header whose seal matches was written by this file's owner, at this very place. If it says that the file was durable
beyond the end of the valid frames, durable bytes are gone, which no crash causes. Everything else is torn. The seal is
a function of 16 bytes of the header alone, so checking a candidate takes constant time, whatever the bytes are: values
that contain frames, records or whole logs, or bytes made by an attacker. So the search needs no limit.
"""

import errno
import os
from typing import NamedTuple

from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from fastsm.disk.format cimport (
    FRAME_LENGTH, FRAME_RUNS, VALID, frame_length, frame_watermark, look_at_header,
)
from fastsm.disk.hashing cimport load64

from fastsm.disk.files import storage_errors
from fastsm.errors import CorruptionError

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int descriptor, void *data, size_t size, long offset)

cdef extern from "<errno.h>" nogil:
    int system_error "errno"
    const int EINTR

cdef enum:
    PIECE = 1 << 20


class Tail(NamedTuple):
    """The result of a search. `looks`: the number of seals computed, at most one per 8 bytes."""
    torn_end: int       # the end of the last 8 bytes that are not all zero, or of the valid frames
    proof: int          # the offset of a header that says that bytes after the valid frames were durable; 0: none
    watermark: int      # the offset up to which they were durable, according to that header
    looks: int


cdef struct Search:
    uint64_t identity
    uint64_t end           # of the valid frames
    uint64_t torn_end
    uint64_t proof
    uint64_t watermark
    uint64_t looks


cdef void search_piece(const uint8_t *piece, uint64_t size, uint64_t offset, Search *search) noexcept nogil:
    """Searches `size` bytes of the file at `offset`, a multiple of 8, up to the first proof.

    Headers that are not entirely within the piece are left to the next piece, which overlaps this one.
    """
    cdef uint64_t i = 0
    cdef const uint8_t *p = piece
    while size - i >= 8:
        p = piece + i
        if load64(p):
            search.torn_end = max(search.torn_end, offset + i + 8)
        if size - i >= FRAME_RUNS and is_candidate(p, offset + i, search):
            search.looks += 1
            if look_at_header(p, FRAME_RUNS, search.identity, offset + i) == VALID:
                search.proof, search.watermark = offset + i, frame_watermark(p, offset + i)
                return
        i += 8
    while i < size:
        if piece[i]:
            search.torn_end = max(search.torn_end, offset + i + 1)
        i += 1


cdef inline bint is_candidate(const uint8_t *p, uint64_t offset, Search *search) noexcept nogil:
    """Returns whether these bytes would prove something if they were a header; only then does the seal matter."""
    cdef uint64_t length = frame_length(p)
    cdef uint64_t watermark
    if length & 7 or length < FRAME_RUNS:  # excludes zeros, and almost all other bytes
        return False
    watermark = frame_watermark(p, offset)
    return search.end < watermark <= offset  # a watermark before the file's start has wrapped around


def search_bytes(const uint8_t[::1] data, uint64_t identity, uint64_t end, uint64_t offset):
    """Returns the `Tail` of bytes in memory, at `offset` (a multiple of 8) of a file whose frames end at `end`."""
    cdef Search search = Search(identity, end, end, 0, 0, 0)
    if data.shape[0]:
        with nogil:
            search_piece(&data[0], data.shape[0], offset, &search)
    return Tail(search.torn_end, search.proof, search.watermark, search.looks)


def search_tail(int descriptor, uint64_t identity, uint64_t end, uint64_t size):
    """Returns the `Tail` of an open file of `size` bytes whose valid frames end at `end`.

    O(bytes that are not in holes), in 1 MiB of memory, without the GIL; signal handlers run between pieces. Raises
    OSError.
    """
    cdef Search search = Search(identity, end, end, 0, 0, 0)
    cdef uint64_t offset, stop, length
    cdef uint8_t *piece = <uint8_t *>malloc(PIECE)
    if piece == NULL:
        raise MemoryError("not enough memory to search for a torn tail")
    try:
        for start, limit in data_ranges(descriptor, end, size):
            # A header's checksum, which its seal does not cover, may be in the preceding hole.
            offset = max(end, (<uint64_t>start & ~<uint64_t>7) - FRAME_LENGTH)
            stop = limit
            while offset < stop and not search.proof:
                length = read_into(descriptor, piece, min(<uint64_t>PIECE, size - offset), offset)
                with nogil:
                    search_piece(piece, length, offset, &search)
                PyErr_CheckSignals()
                if length < PIECE:
                    break  # the end of the file, which may have been cut
                offset += length - (FRAME_RUNS - 8)
            if search.proof:
                break
    finally:
        free(piece)
    return Tail(search.torn_end, search.proof, search.watermark, search.looks)


cdef uint64_t read_into(int descriptor, uint8_t *piece, uint64_t size, uint64_t offset) except? 0:
    """Reads up to `size` bytes at an offset; returns how many there were."""
    cdef uint64_t done = 0
    cdef ssize_t got
    while done < size:
        with nogil:
            got = pread(descriptor, piece + done, size - done, offset + done)
        if got < 0:
            if system_error == EINTR:
                PyErr_CheckSignals()
                continue
            PyErr_SetFromErrno(OSError)
        if got == 0:
            break
        done += got
    return done


def torn_tail_end(int descriptor, uint64_t identity, uint64_t end, uint64_t size, path):
    """Returns the end of an open file's torn tail; `end` if only unused space follows.

    Raises `CorruptionError` if the tail proves that bytes after `end` were once durable.
    """
    with storage_errors(path, "searching for a torn tail"):
        tail = search_tail(descriptor, identity, end, size)
    if tail.proof:
        found = os.pread(descriptor, FRAME_RUNS, end).strip(b"\0")
        raise CorruptionError(
            path, end,
            f"a frame, since the one at offset {tail.proof} says that the file was durable up to offset "
            f"{tail.watermark} when it was written",
            "bytes that are not a frame, or whose checksum does not match" if found else "zeros")
    return tail.torn_end


def data_ranges(int descriptor, uint64_t start, uint64_t size):
    """Yields the parts of [start, size) that are not holes. Reads nothing, so a sparse terabyte takes no time."""
    while start < size:
        try:
            data = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        start = min(os.lseek(descriptor, data, os.SEEK_HOLE), size)
        yield data, start

"""Frames in parts: the file gets large values straight from the bytes of the commands."""

from fastsm.disk.descriptors cimport write_parts
from fastsm.disk.format cimport FRAME_RUNS, fill_header
from fastsm.disk.hashing cimport Hash, begin_hash, end_hash, feed_hash

cdef enum:
    PIECE = 128 << 10     # fits into the processor's own cache
    MOST = 64             # parts of a piece


cdef int write_frame(
    int descriptor, Part *parts, size_t count, uint64_t length, uint32_t run_count,
    uint64_t identity, uint64_t offset, uint64_t watermark, uint64_t *chain,
) noexcept nogil:
    """Hashes and writes a frame. Its first part begins with room for the header, which is filled in here.

    `chain`: the checksum of the previous frame; replaced by that of this frame. Returns 0 or the system's error.
    """
    cdef uint8_t *frame = <uint8_t *>parts[0].data
    cdef Part header
    cdef Hash state
    cdef int failure = 0
    cdef size_t i
    begin_hash(&state, fill_header(frame, length, run_count, identity, offset, watermark) ^ chain[0])
    header.data, header.size = frame, FRAME_RUNS
    parts[0].data += FRAME_RUNS
    parts[0].size -= FRAME_RUNS
    if length > PIECE:
        # The header is written last: until then there is no frame.
        failure = write_pieces(descriptor, parts, count, offset + FRAME_RUNS, &state)
    else:
        for i in range(count):
            feed_hash(&state, parts[i].data, parts[i].size)
    chain[0] = (<uint64_t *>frame)[0] = end_hash(&state)
    parts[0].data -= FRAME_RUNS
    parts[0].size += FRAME_RUNS
    if failure:
        return failure
    if length > PIECE:
        return write_parts(descriptor, &header, 1, offset)
    return write_parts(descriptor, parts, count, offset)


cdef int write_pieces(int descriptor, const Part *parts, size_t count, uint64_t offset, Hash *state) noexcept nogil:
    """Hashes and writes parts in pieces: what is hashed is still in the cache when the system copies it."""
    cdef Part[MOST] piece
    cdef size_t pieces = 0
    cdef uint64_t reached = offset
    cdef uint64_t stop = piece_end(offset)
    cdef Part rest
    cdef size_t i, taken
    cdef int failure
    for i in range(count):
        rest = parts[i]
        while rest.size:
            taken = min(rest.size, stop - reached)
            feed_hash(state, rest.data, taken)
            piece[pieces].data, piece[pieces].size = rest.data, taken
            rest.data += taken
            rest.size -= taken
            reached += taken
            pieces += 1
            if reached == stop or pieces == MOST:
                failure = write_parts(descriptor, piece, pieces, offset)
                if failure:
                    return failure
                offset, stop, pieces = reached, piece_end(reached), 0
    return write_parts(descriptor, piece, pieces, offset)


cdef inline uint64_t piece_end(uint64_t start) noexcept nogil:
    """Returns where the piece that starts at an offset ends, unless it has MOST parts before that.

    Two pieces that end there share no page of the file.
    """
    return (start + PIECE) & ~<uint64_t>(PIECE - 1)

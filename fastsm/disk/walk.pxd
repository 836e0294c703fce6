from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.format cimport (
    LOG_HEADER_SIZE, frame_length, frame_run_count, frame_size, record_length,
)


ctypedef struct Walk:
    # A walk over the records of an arena in the order in which they were written: those of the base, then those of the
    # log's frames. All of them must have been checked.
    const uint8_t *arena
    uint64_t place      # of the next record
    uint64_t stop       # records are contiguous up to here
    uint64_t frame      # where the next frame starts
    uint64_t end        # where the walk ends, at the latest


cdef inline Walk walk_frames(const uint8_t *arena, uint64_t first_frame, uint64_t end) noexcept nogil:
    """Returns a walk over the records of the frames from `first_frame` on, as places in the arena."""
    cdef Walk walk
    walk.arena = arena
    walk.place = walk.stop = walk.frame = first_frame
    walk.end = end
    return walk


cdef inline const uint8_t *next_record(Walk *walk) noexcept nogil:
    """Returns the next record, or NULL at the end."""
    cdef const uint8_t *record
    cdef const uint8_t *frame
    while walk.place >= walk.stop:
        if walk.frame >= walk.end:
            return NULL
        frame = walk.arena + walk.frame
        walk.place = walk.frame + frame_size(frame_run_count(frame), 0)
        walk.frame += frame_length(frame)
        walk.stop = min(walk.frame, walk.end)
    record = walk.arena + walk.place
    walk.place += record_length(record)
    return record

"""Steps along a log: from a place between two changes to the next change that is wanted.

    frame | runs | record record record … | frame | runs | record …
                          ^ at            ^ stop
                                          ^ frame: the next one

A step reads frames, which never change, needs no Python, and ends after a budget of bytes. It checks every length,
since the log may not be verified yet.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memcmp

from fastsm.disk.format cimport (
    FRAME_RUNS, UNKNOWN_TERM, frame_length, frame_run_count, frame_size, is_change, record_index, record_key,
    record_key_size, record_length, record_operation,
)
from fastsm.lookup.terms cimport Run


cdef inline Run *runs_of(const uint8_t *frame) noexcept nogil:
    return <Run *>(frame + FRAME_RUNS)


cdef inline bint is_wanted(const uint8_t *record, const Wanted *wanted) noexcept nogil:
    """Returns whether a record is a change of a key with the prefix."""
    return (
        is_change(record_operation(record)) and record_key_size(record) >= wanted.prefix_size
        and memcmp(record_key(record), wanted.prefix, wanted.prefix_size) == 0)


cdef int enter(Place *place, const Wanted *wanted, uint64_t *left) noexcept nogil:
    """Goes to the next frame that may hold changes after the place; returns FOUND, or why there is none."""
    cdef const uint8_t *frame
    cdef uint64_t length, final
    cdef uint32_t count
    while place.frame < wanted.end:
        frame = wanted.log + place.frame
        count = frame_run_count(frame)
        length = frame_length(frame)
        if length > wanted.end - place.frame or length & 7 or length < frame_size(count, 0):
            return DAMAGED
        if count:
            final = runs_of(frame)[count - 1].last
            if final > wanted.last:
                return ENDED
            if final >= place.index:
                if place.unchecked and not check_term(place, runs_of(frame)):
                    return MISMATCH
                if final > place.index or not place.whole:
                    place.run = place.frame + FRAME_RUNS
                    place.at = place.frame + frame_size(count, 0)
                    place.frame += length
                    place.stop = place.frame
                    return FOUND
        place.frame += length
        if left[0] < length:
            return PAUSED
        left[0] -= length
    return ENDED


cdef bint check_term(Place *place, const Run *run) noexcept nogil:
    """Returns whether the place's entry, which is in one of these runs, has the place's term; sets an unknown term."""
    while run.last < place.index:
        run += 1
    if place.term == UNKNOWN_TERM:
        place.term = run.term
    place.unchecked = False
    return place.term == run.term


cdef int advance(Place *place, const Wanted *wanted) noexcept nogil:
    """Goes to the next wanted change; returns FOUND, or why there is none."""
    cdef uint64_t left = wanted.budget
    cdef uint64_t length, index
    cdef const uint8_t *record
    cdef int result
    while True:
        while place.at < place.stop:
            record = wanted.log + place.at
            length = record_length(record)
            if length > place.stop - place.at:
                return DAMAGED
            index = record_index(record)
            if index >= place.index and is_wanted(record, wanted):
                if index > wanted.last:
                    return ENDED
                if index > place.index:
                    return FOUND
                if not place.whole:
                    if place.left == 0:
                        return FOUND
                    place.left -= 1
            place.at += length
            if left < length:
                return PAUSED
            left -= length
        result = enter(place, wanted, &left)
        if result != FOUND:
            return result


cdef bint pass_entry(Place *place, const Wanted *wanted, uint64_t left) noexcept nogil:
    """Looks up to `left` bytes ahead for another change of the place's entry; sets `whole` if there is none.

    Returns False if that is not known yet.
    """
    cdef const uint8_t *record
    cdef uint64_t length
    while place.at < place.stop:
        record = wanted.log + place.at
        length = record_length(record)
        if length > place.stop - place.at:
            return True  # the next step reports it
        if is_change(record_operation(record)):
            if record_index(record) != place.index:
                break
            if is_wanted(record, wanted):
                return True
        place.at += length
        if left < length:
            return False
        left -= length
    place.whole = True  # an entry never spans two frames
    return True


cdef void count_told(Place *place, const Wanted *wanted) noexcept nogil:
    """Counts the wanted changes of the place's entry, and passes the entry. Call at the start of its frame."""
    cdef const uint8_t *record
    while place.at < place.stop:
        record = wanted.log + place.at
        if record_length(record) > place.stop - place.at:
            return
        if is_change(record_operation(record)) and record_index(record) >= place.index:
            if record_index(record) > place.index:
                return
            place.offset += is_wanted(record, wanted)
        place.at += record_length(record)

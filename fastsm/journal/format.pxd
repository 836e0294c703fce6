from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport FRAME_RUNS, align8


cdef struct Item:
    uint64_t index
    uint64_t term
    const uint8_t *data
    uint64_t size
    uint32_t kind

cdef enum:  # JournalFrame: follows the header that all frames have, which has no runs here
    ITEM_INDEX = FRAME_RUNS
    ITEM_TERM = ITEM_INDEX + 8
    ITEM_SIZE = ITEM_TERM + 8
    ITEM_KIND = ITEM_SIZE + 4
    ITEM_DATA = ITEM_KIND + 4

cdef enum:  # Kind
    ITEM_ENTRY = 1     # the next entry
    ITEM_CUT = 2       # entries from index on are removed
    ITEM_START = 3     # entries up to index (which exists, with that term) are removed
    ITEM_BASE = 4      # one entry that replaces all others
    ITEM_VOTE = 5      # the current term, and the vote in it
    ITEM_COMMIT = 6    # entries up to index are committed
    ITEM_STATE = 7     # the first frame of a segment: summarizes all earlier segments
    ITEM_BORDER = 8    # all entries are removed; the next one comes after index, whose term this is
    LAST_KIND = 8

cdef inline uint64_t item_length(uint64_t size) noexcept nogil:
    return align8(ITEM_DATA + size)

cdef inline uint64_t item_index(const uint8_t *frame) noexcept nogil:
    return (<const uint64_t *>(frame + ITEM_INDEX))[0]

cdef inline uint64_t item_term(const uint8_t *frame) noexcept nogil:
    return (<const uint64_t *>(frame + ITEM_TERM))[0]

cdef inline uint32_t item_size(const uint8_t *frame) noexcept nogil:
    return (<const uint32_t *>(frame + ITEM_SIZE))[0]

cdef inline uint32_t item_kind(const uint8_t *frame) noexcept nogil:
    return (<const uint32_t *>(frame + ITEM_KIND))[0]

cdef inline const uint8_t *item_data(const uint8_t *frame) noexcept nogil:
    return frame + ITEM_DATA

cdef void write_item(uint8_t *frame, const Item *item) noexcept nogil
cdef void write_item_head(uint8_t *frame, const Item *item) noexcept nogil
cdef int look_at_item(const uint8_t *frame, uint64_t available) noexcept nogil

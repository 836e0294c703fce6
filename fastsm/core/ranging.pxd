from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fastsm.core.view cimport PendingView, Step


cdef class Ranging(PendingView):
    cdef list in_order           # keys put by writes before `ordered_writes`, sorted; None: no range was read yet
    cdef size_t ordered_writes
    cdef list cuts               # (number of writes, keys) for each time deleted keys were dropped from `in_order`
    cdef size_t cuts_hold        # cuts made after more writes than this are undone before the next range
    cdef bytes passed_start      # from here on, the chunk has written every applied key; None: no such range
    cdef bytes passed_end        # up to, but without, this one; None: to the last key
    cdef size_t passed_at        # number of writes when that was recorded
    cdef uint64_t looked_past    # keys, written by the chunk, that ranges skipped one by one; for tests

    cdef list keys_between(self, bytes start, bytes end, Py_ssize_t most=*, bint reverse=*)
    cdef int64_t remove_range(self, uint64_t index, uint32_t entry, bytes start, bytes end) except -1
    cdef int append_written(self, const Step *step, bytes key) except -1
    cdef list parts_between(self, bytes start, bytes end, bint reverse)
    cdef int note_passed(self, bytes start, bytes end) except -1
    cdef const uint8_t *key_at(self, uint64_t place) except NULL
    cdef bint has_written(self, const uint8_t *key, size_t size, uint64_t hashed) noexcept nogil
    cdef list written_between(self, bytes start, bytes end)
    cdef int keep_order(self) except -1
    cdef int merge_in(self, list new) except -1
    cdef int undo_cuts(self) except -1

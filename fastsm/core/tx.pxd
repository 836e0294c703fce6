from libc.stdint cimport uint32_t, uint64_t

from fastsm.core.ranging cimport Ranging
from fastsm.core.view cimport Found


cdef class Tx:
    cdef Ranging view               # None: the call is over
    # Returns the term of an entry, given its position in the chunk, or the index of an earlier entry
    cdef object terms_of
    cdef object procedure
    cdef readonly uint64_t clock
    cdef uint64_t index          # the index of the call's entry
    cdef object term
    cdef uint32_t position
    cdef unsigned long thread
    cdef object trouble

    cdef int check(self) except -1
    cdef int look(self, bytes key, Found *found) except -1
    cdef bint find(self, key, Found *found) except -1

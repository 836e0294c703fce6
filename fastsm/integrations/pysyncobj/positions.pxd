from libc.stdint cimport uint64_t

from fastsm.journal.entries cimport Reading
from fastsm.journal.journal cimport Journal


cdef class Positions(Journal):
    cdef object first_entry              # as returned by __getitem__, or None
    cdef object last_entry
    cdef uint64_t first_seen             # the log's change counts at that time
    cdef uint64_t last_seen

    cdef object at(self, size_t position)
    cdef Reading reading(self, uint64_t index, uint64_t count, uint64_t most_bytes)
    cpdef add(self, bytes command, uint64_t index, uint64_t term)

from fastsm.core.turns cimport Turns
from fastsm.generation.framefile cimport FrameFile


cdef class GroupCommit:
    cdef readonly FrameFile log
    cdef Turns turns
    cdef bint syncing
    cdef bint closed
    cdef list waiting      # a lock for each caller that waits for the end of a sync
    cdef int wait(self) except -1
    cdef int wake(self) except -1

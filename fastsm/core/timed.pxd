from fastsm.core.ordered cimport Ordered


cdef class Timed(Ordered):
    pass

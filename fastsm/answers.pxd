from libc.stdint cimport uint64_t

cdef object answer(object ok, object value, object reason)
cpdef bytes pack_session(uint64_t sequence, uint64_t deadline, bytes result)

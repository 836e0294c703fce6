from libc.stdint cimport int64_t, uint64_t

cdef object answer(object ok, object value, object reason)
cdef bytes session_value(uint64_t sequence, uint64_t deadline, bytes result)

cdef object answer(object ok, object value, object reason)
cpdef pack_result(result)

# Named tuples of ints and bytes, made as fast as plain ones. Their fields are set once, at once.
#
# Nothing in them can be part of a cycle of references, so the collector is not told of them: it would look at all of a
# long list again and again while that is made. (It finds out for itself that a plain tuple needs no look, but not
# that one of a subclass needs none.)

from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM


cdef extern from *:
    """
    static inline PyObject *fastsm_named(PyTypeObject *kind, Py_ssize_t fields) {
        PyObject *made = PyType_GenericAlloc(kind, fields);
        if (made != NULL) {
            PyObject_GC_UnTrack(made);
        }
        return made;
    }
    """
    object named "fastsm_named"(type kind, Py_ssize_t fields)
    object tracked "PyType_GenericAlloc"(type kind, Py_ssize_t fields)  # for fields that may be part of a cycle


cdef inline void set_field(object made, Py_ssize_t i, object value) noexcept:
    """Sets a field that is not set yet."""
    Py_INCREF(value)
    PyTuple_SET_ITEM(made, i, value)

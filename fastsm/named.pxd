# Named tuples of ints and bytes that are made as fast as plain tuples. Their fields are set only once, directly after.
#
# They cannot be part of a reference cycle, so the collector does not track them: otherwise it would traverse a long
# list again and again while the list is being made. (The collector untracks plain tuples by itself, but not those of
# subclasses.)

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
    """Sets a field for the first time."""
    Py_INCREF(value)
    PyTuple_SET_ITEM(made, i, value)

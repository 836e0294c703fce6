from libc.stdint cimport uint64_t

from fastsm.core.awaited cimport Awaited
from fastsm.core.watchers cimport Watchers

cdef enum:  # status
    RUNNING = 0
    STOPPED = 1
    CLOSED = 2
    FORKED = 3
    CORRUPT = 4
    CALLING = 16              # value of `gate` only: a procedure is running


cdef class Status:
    # Identifies the state: the high half counts resets and installs, the low half compactions since the last of them.
    # It changes together with log, index and last applied, so a caller that captured it can tell whether they changed.
    cdef readonly uint64_t _epoch
    cdef readonly bint _verified   # every byte of base and log was checked or written by this process
    cdef Awaited awaited           # tickets of callers that wait for an entry to be applied
    cdef readonly Watchers _watchers    # watches that wait for a change
    cdef int status
    cdef int gate                  # checked first by every call: 0 means go on, otherwise call `refuse`
    cdef unsigned long calling     # the thread that runs procedures at the moment, or 0
    cdef bint ran                  # with CORRUPT: whether the machine was running when the damage was found
    cdef object corruption         # the error that a background verification has found

    cdef int refuse(self) except -1
    cdef void set_gate(self) noexcept

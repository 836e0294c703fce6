from fastsm.core.group_commit cimport GroupCommit
from fastsm.core.timed cimport Timed
from fastsm.core.turns cimport Turns
from fastsm.disk.published cimport Publisher
from fastsm.generation.log cimport Log
from fastsm.lookup.terms cimport RunList


cdef class HardState(Timed):
    cdef readonly Turns _turns
    cdef readonly GroupCommit _group_commit    # the group commit of the log
    cdef Publisher publisher       # tells readers in other processes; None: no reader is told

    cdef void tell_readers(self) noexcept
    cdef void publish_runs(self) noexcept
    cdef void terms_take_runs(self) noexcept

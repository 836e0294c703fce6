from libc.stdint cimport uint64_t

from fastsm.core.group_commit cimport GroupCommit
from fastsm.core.turns cimport Turns
from fastsm.journal.format cimport Item
from fastsm.journal.journal cimport Journal
from fastsm.journal.segment cimport Segment


cdef class Batch:
    cdef Item *items
    cdef size_t count
    cdef object held                     # the entries, which keep their commands alive
    cdef list copies                     # copies of commands that are not bytes objects


cdef class LogEngine:
    # Invariant: only the newest segment has bytes that are not durable.
    cdef Journal _log
    cdef readonly Turns _turns
    cdef GroupCommit commit              # that of the newest segment
    cdef uint64_t cuts                   # how often entries were removed from the end
    cdef uint64_t segment_bytes
    cdef Segment vote_segment            # the segment with the newest vote,
    cdef uint64_t vote_end               # and how far that segment must be durable for the vote to count
    cdef uint64_t durable_term           # of the previous vote
    cdef bytes durable_vote
    cdef object removing                 # a lock: only one thread at a time removes files

    cdef int require(self) except -1
    cdef size_t judge(self, Batch batch) except? -1
    cdef int rotate_if_full(self) except -1
    cdef int remove_now(self, list retired) except -1
    cdef bint await_removal(self) except -1
    cdef bint vote_is_durable(self) noexcept

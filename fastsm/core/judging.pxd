from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.command cimport ADD, COMPARE_AND_SWAP, Operation, READ, TOUCH, VALUE_IS
from fastsm.core.expiring cimport Expiring
from fastsm.core.view cimport Step
from fastsm.lookup.terms cimport Terms

cdef enum:  # how an entry turned out
    REFUSED = 0
    APPLIED = 1
    SKIPPED = 2
    ANSWERS = 3           # before judging: the entry answers with one value; afterwards: its result is an Answer
    LISTS = 4             # before judging only: the entry answers with a list of values

cdef inline bint reads_key(uint8_t kind) noexcept:
    """Returns whether a step of this kind looks a key up when it is judged."""
    return kind == COMPARE_AND_SWAP or kind == ADD or kind == READ or kind == TOUCH or kind >= VALUE_IS


cdef class Judge:
    cdef Expiring view
    # For each entry its Answer, or None if the outcome says everything; None: no entry has one
    cdef readonly list answers
    cdef Step *steps             # the chunk's operations
    cdef uint8_t *outcomes
    cdef tuple entries           # the chunk's entries
    cdef Terms terms
    cdef readonly object procedures  # by (name, version)
    cdef bint twice              # run each call a second time, and compare the results
    cdef object called           # the procedure that was looked up last
    cdef bytes called_name       # its name as commands encode it
    cdef uint32_t called_version
    cdef object value            # the result of the last step
    cdef uint64_t value_bytes    # the size of the answer so far, as it would be stored
    cdef bint stopped            # the caller of `apply` was interrupted

    cdef int judge(self, Step *steps, size_t count, uint8_t *outcomes, tuple entries, Terms terms) except -1
    cdef void forget(self) noexcept
    cdef void expect_reads(self, size_t first, size_t stop) noexcept
    cdef object judge_entry(self, size_t first, size_t stop)
    cdef object judge_once(self, size_t head, size_t stop)
    cdef object judge_session(self, Step *step)
    cdef object judge_tick(self, Step *step)
    cdef object judge_list(self, size_t first, size_t stop, uint8_t outcome)
    cdef object judge_transaction(self, size_t head, size_t stop)
    cdef int holds(self, const Step *step) except -1
    cdef int do_step(self, Step *step, bint answering) except -1
    cdef int take_value(self, const uint8_t *value, uint64_t size) except -1
    cdef object call(self, Step *step)
    cdef object procedure_of(self, const Operation *operation)
    cdef object run_again(self, Step *step, size_t mark, called, bytes payload, result)
    cdef object run_once(self, Step *step, called, bytes payload)
    cdef list written(self, size_t mark)

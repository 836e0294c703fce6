"""The frames of a live log, followed without an index of their keys, as a source of changes.

All watches of a reader share one `Tail`. It takes what was published since its last look, frame by frame, and then
updates, in one step, the fields that watches use. Each watch has a `TailSource`, which copies these fields.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport (
    FRAME_RUNS, Progress, VALID, frame_checksum, frame_length, frame_run_count, look_inside_frame,
)
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.published cimport Publication
from fastsm.generation.changes cimport ALL, Source
from fastsm.generation.log cimport Log
from fastsm.lookup.terms cimport Run, Terms
from fastsm.reading.frames cimport (
    FIRST_STEP, LAST_STEP, SLICE, Lookout, check_next, not_published, now, pause_for, reach,
)

from fastsm.errors import NotRunningError
from fastsm.types import LogId


cdef class TailState:
    """The compiled half of `Tail`: a log, how far it was taken, and how much of it may be delivered.

    Thread safety: the thread that follows holds a lock; sources copy under the GIL.
    """
    cdef readonly Lookout _lookout     # where it looks for news
    cdef uint64_t file_size            # of the log, when last checked
    cdef readonly Log _log
    cdef readonly uint64_t _incarnation
    cdef readonly bint _broken         # always false: a tail keeps no table
    cdef Terms terms                   # of base and frames, to find the term of what is durable
    cdef uint64_t framed_index, framed_term
    # What sources copy, set in one step. Invariant: `end` is the end of a frame, and `mapping` extends at least to it.
    cdef uint64_t version              # changes with each change of the other fields
    cdef uint64_t state                # differs between states that do not continue each other
    cdef Mapping mapping
    cdef str path
    cdef uint64_t identity, end, last_frame
    cdef uint64_t base_index, base_term, base_changes
    cdef uint64_t applied_index, applied_term
    cdef uint64_t durable_index, durable_term
    cdef bint over                     # the reader is closed

    def __cinit__(self):
        self._lookout = Lookout()

    def _follow(self):
        """Takes what was published since the last call."""
        raise NotImplementedError

    @property
    def _position(self):
        """The last entry that may be delivered."""
        return LogId(self.applied_index, self.applied_term)

    # ---- a log -----------------------------------------------------------------------------------------

    def _show(
        self, Log log, Terms terms, applied, durable, uint64_t incarnation, Publication publication or None,
        bint continued,
    ):
        """Makes sources use this log. `continued`: its state continues the previous one."""
        cdef uint64_t applied_index = applied.index
        cdef uint64_t applied_term = applied.term
        cdef uint64_t durable_index = durable.index
        cdef uint64_t durable_term = durable.term
        head = log.head
        cdef uint64_t base_index = head.base_index
        cdef uint64_t base_term = head.base_term
        cdef object changes = head.base_changes - 1 if head.base_size else 0
        cdef uint64_t base_changes = changes if 0 <= changes < ALL - 1 else ALL
        # Held until all is changed: freeing them may run Python code
        _old = self._log, self.terms, self.mapping, self.path
        self._log, self.terms, self._incarnation = log, terms, incarnation
        self.file_size = 0
        self.framed_index = terms.seen
        self.framed_term = terms.term[terms.count - 1] if terms.count else base_term
        self.state += not continued
        self.path, self.identity = log.path, log.identity
        self.base_index, self.base_term, self.base_changes = base_index, base_term, base_changes
        if not continued or durable_index > self.durable_index:
            self.durable_index, self.durable_term = durable_index, durable_term
        self.note(applied_index, applied_term)
        self._lookout.turn_to(publication)

    def _goes_on_in(self, uint64_t incarnation):
        """Notes that the log is the same, but perhaps with another owner, who may have cut its file."""
        if incarnation != self._incarnation:
            self.file_size = 0
        self._incarnation = incarnation

    def _take_up_to(self, uint64_t end, uint64_t applied_index, uint64_t applied_term, uint64_t durable_index):
        """Takes the frames up to a published end, and the published ids.

        `CorruptionError` if the frames do not end there; sources then keep what they had.
        """
        cdef Log log = self._log
        cdef Terms terms = self.terms
        cdef Mapping mapping
        cdef Progress progress
        cdef const uint8_t *frame
        cdef const Run *runs
        cdef uint64_t stop = log.end + SLICE
        cdef uint64_t term = 0
        cdef uint32_t i
        self.file_size = reach(log, end, self.file_size)
        mapping = log.mapping
        while log.end < end:
            finding = check_next(mapping, log, end)
            frame = mapping.address + mapping.start + log.end
            progress.last_index, progress.last_term = self.framed_index, self.framed_term
            progress.snapshot = NULL
            if finding != VALID or look_inside_frame(frame, &progress) != VALID:
                raise not_published(log, end, "a frame that is incomplete, or belongs to another history")
            terms.reserve(frame_run_count(frame))
            runs = <const Run *>(frame + FRAME_RUNS)
            for i in range(frame_run_count(frame)):
                terms.append(runs[i].last, runs[i].term)
            log.last_frame, log.chain = log.end, frame_checksum(frame)
            log.end += frame_length(frame)
            log.allocated = log.end
            log.frames += 1
            self.framed_index, self.framed_term = progress.last_index, progress.last_term
            if log.end > stop:
                with nogil:
                    pass
                PyErr_CheckSignals()
                stop = log.end + SLICE
        if durable_index > self.durable_index:
            if terms.find(durable_index, &term):
                self.durable_index, self.durable_term = durable_index, term
            elif durable_index == applied_index:
                self.durable_index, self.durable_term = applied_index, applied_term
        self.note(applied_index, applied_term)

    cdef int note(self, uint64_t applied_index, uint64_t applied_term) except -1:
        """Shows sources the log as far as it was taken, and the applied entries, including those in no frame yet."""
        cdef Log log = self._log
        cdef Mapping old = self.mapping
        if applied_index < self.framed_index or applied_term < self.framed_term:
            applied_index, applied_term = self.framed_index, self.framed_term
        self.mapping, self.end, self.last_frame = log.mapping, log.end, log.last_frame
        self.applied_index, self.applied_term = applied_index, applied_term
        self.version += 1
        return 0 if old is None else 0  # the old mapping is freed here, after everything was set

    def _taken_up_to(self):
        """Returns the end of the last frame that was taken."""
        return self._log.end

    def _end(self):
        """Makes each later look raise that the reader is closed. Idempotent."""
        self.over = True
        self.version += 1
        self.mapping = None


cdef class TailSource(Source):
    """The changes in a tail's log: all that are applied, or those that are durable.

    Thread safety: that of the watch it belongs to; `wake` from any thread.
    """
    cdef readonly TailState _tail
    cdef readonly bint durable
    cdef uint64_t version      # of the tail, at the last look
    cdef bint woken

    def __cinit__(self, TailState tail not None, bint durable):
        self._tail = tail
        self.durable = durable

    cpdef int look(self) except -1:
        cdef TailState tail = self._tail
        if not tail.over and tail._lookout.may_have_news():
            tail._follow()
        if tail.over:
            raise NotRunningError("this reader is closed: open another one")
        _old = self.mapping, self.path
        # From here on no Python code runs: all is from one moment.
        self.version = tail.version
        self.mapping, self.path = tail.mapping, tail.path
        self.state, self.identity = tail.state, tail.identity
        self.end, self.last_frame = tail.end, tail.last_frame
        self.base_index, self.base_term, self.base_changes = tail.base_index, tail.base_term, tail.base_changes
        self.newest_index, self.newest_term = tail.applied_index, tail.applied_term
        if self.durable:
            self.index, self.term = tail.durable_index, tail.durable_term
        else:
            self.index, self.term = tail.applied_index, tail.applied_term
        return 0

    cpdef bint is_over(self) except -1:
        return self._tail.over

    def wake(self):
        """Ends the wait of a read, now and whenever one waits from here on: the watch is closed."""
        self.woken = True

    def may_have_changes(self):
        """Returns whether it is worth looking again."""
        cdef TailState tail = self._tail
        return self.woken or tail.over or tail.version != self.version or tail._lookout.is_worth_a_look()

    def await_changes(self, double seconds):
        """Waits without the GIL, at most `seconds`, until it is worth looking again; returns whether it is."""
        cdef TailState tail = self._tail
        cdef Publication publication = tail._lookout.publication
        cdef uint64_t stop = now() + <uint64_t>(seconds * 1e9)
        cdef uint64_t step = FIRST_STEP
        cdef bint found = False
        self.mapping = None
        with nogil:
            while True:
                found = self.woken or tail.over or tail.version != self.version or (
                    publication is not None and publication.is_new())
                if found or now() >= stop:
                    break
                pause_for(step)
                step = min(step + step / 2, <uint64_t>LAST_STEP)
        PyErr_CheckSignals()
        return found or self.may_have_changes()

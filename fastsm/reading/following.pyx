"""Taking what an owner has published since the last refresh, frame by frame: an ongoing recovery.

The index is private to the reader; records are read in place, in the owner's log. Each frame is one step under the GIL,
as it was for the owner, so that no thread sees half a chunk. No byte after the published end is touched.
"""

from _thread import allocate_lock

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.core.status cimport CORRUPT, RUNNING
from fastsm.core.timed cimport Timed
from fastsm.disk.format cimport (
    FRAME_RUNS, Progress, RECORD_PUT, RECORD_SESSION, RECORD_TIMED, RECORD_TOUCH, UNKNOWN_TERM, VALID,
    frame_checksum, frame_length, frame_run_count, look_inside_frame, record_operation,
)
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.published cimport Publication
from fastsm.disk.walk cimport Walk, next_record, walk_frames
from fastsm.generation.log cimport Log
from fastsm.lookup.index cimport Index
from fastsm.lookup.terms cimport Run, Terms
from fastsm.reading.frames cimport (
    FIRST_STEP, LAST_STEP, SLICE, Lookout, check_next, not_published, now, pause_for, reach,
)

from fastsm.types import LogId

cdef uint64_t EVERYTHING = 0xFFFFFFFFFFFFFFFF


cdef class Follower(Timed):
    """The compiled half of `Reader`: a state, and how it takes frames.

    Thread safety: reads from any thread; everything else on the thread that follows (see `Reader`).
    """
    cdef readonly Lookout _lookout   # where it looks for news
    cdef readonly object _position   # the last applied entry
    cdef readonly uint64_t _incarnation
    cdef readonly uint64_t _opened   # counts generations, including the first one
    cdef readonly uint64_t _rebuilt  # how often the state went back
    cdef readonly bint _broken       # memory ran out within a frame: a new table is needed
    cdef uint64_t file_size          # of the log, when last checked
    # An applied entry that is in no frame yet, since it has no command, is in the terms until a frame has it.
    cdef bint guessed
    cdef size_t known_count
    cdef uint64_t known_seen, known_last

    def __cinit__(self):
        self._lookout = Lookout()

    def refresh(self):
        """Takes over what the owner has applied since the last refresh; returns the last applied entry.

        Without news it makes no system call, except once a second to check a file's name; as long as no owner has
        published anything, each call looks for the file. O(records since); after a compaction or an install, O(keys).
        Each chunk becomes visible as a whole. Raises `NotRunningError` after `close`; `StorageError` or
        `CorruptionError` if what was published cannot be read, and then the state stays as it was; `ReentryError` in a
        signal handler on top of a refresh of the same thread.
        """
        if self.gate and not self._broken:
            self.refuse()
        return self._follow() if self._lookout.may_have_news() else self._position

    # ---- the publication -------------------------------------------------------------------------------

    def _await_news(self, double seconds):
        """Returns whether something was published, after at most `seconds`. Waits without the GIL."""
        cdef Publication publication = self._lookout.publication
        cdef uint64_t stop = now() + <uint64_t>(seconds * 1e9)
        cdef uint64_t step = FIRST_STEP
        cdef bint found = False
        with nogil:
            while not found and now() < stop:
                pause_for(step)
                step = min(step + step / 2, <uint64_t>LAST_STEP)
                found = publication is not None and publication.is_new()
        PyErr_CheckSignals()
        return found

    # ---- a state ---------------------------------------------------------------------------------------

    def _show(
        self, Log log, Index index, applied, durable, bint verified, uint64_t incarnation,
        Publication publication or None, bint continued,
    ):
        """Makes reads show this state. `continued`: it continues the previous one."""
        cdef Terms terms = index.terms
        cdef uint64_t applied_index = applied.index
        cdef uint64_t applied_term = applied.term
        cdef uint64_t durable_index = durable.index
        cdef uint64_t durable_term = durable.term
        cdef uint64_t base_term = log.head.base_term
        terms.reserve(2)
        _old = self._log, self._index  # held until all is changed: freeing them may let another thread run
        self.guessed = self._broken = False
        self.file_size = 0
        self._log, self._index, self._table, self._terms = log, index, index.table, index.terms
        self.take_arena()
        self.readable = log.start + log.end
        self.framed_index = terms.seen
        self.framed_term = terms.term[terms.count - 1] if terms.count else base_term
        self.applied_index, self.applied_term = self.framed_index, self.framed_term
        self.note_applied(applied_index, applied_term)
        self.durable_index, self.durable_term = durable_index, durable_term
        self.metadata = index.metadata
        self._verified = verified
        self._epoch = ((self._epoch >> 32) + 1) << 32
        self._incarnation = incarnation
        self._opened += 1
        self._rebuilt += not continued
        if self.status == CORRUPT:
            self.status = RUNNING
            self.set_gate()
        self._position = LogId(self.applied_index, self.applied_term)
        self._lookout.turn_to(publication)

    def _goes_on_in(self, uint64_t incarnation):
        """Notes that the log is the same, but perhaps with another owner, who may have cut its file."""
        if incarnation != self._incarnation:
            self.file_size = 0
        self._incarnation = incarnation

    def _want_order(self):
        """Makes each state that is opened from here on have an order."""
        self.order_wanted = True

    def _is_continued_by(self, Log log, Index index, applied):
        """Returns whether another state is a later one of the same history, as far as can be told."""
        cdef uint64_t index_before = self.applied_index
        cdef uint64_t term_before = self.applied_term
        if index_before == 0:
            return True
        if log.base is None or log.head.generation <= self._log.head.generation:
            # A reset, since compactions make a base; or another directory, whose numbers may be higher too
            return False
        if applied.index <= index_before:
            return applied == (index_before, term_before)
        return index.terms.seen < index_before or index.terms.allows(index_before, term_before)

    # ---- frames ----------------------------------------------------------------------------------------

    def _take_up_to(self, uint64_t end, uint64_t applied_index, uint64_t applied_term, uint64_t durable_index):
        """Takes the frames up to a published end, and the published ids.

        `CorruptionError` if the frames do not end there; those taken by then remain.
        """
        cdef Log log = self._log
        cdef Mapping mapping
        cdef Progress progress
        cdef const uint8_t *frame
        cdef uint64_t stop = log.end + SLICE
        cdef int finding
        self.map_up_to(log, end)
        mapping = self.mapping
        while log.end < end:
            finding = check_next(mapping, log, end)
            frame = mapping.address + mapping.start + log.end
            progress.last_index, progress.last_term = self.framed_index, self.framed_term
            progress.snapshot = NULL
            if finding != VALID or look_inside_frame(frame, &progress) != VALID:
                self._position = LogId(self.applied_index, self.applied_term)
                raise not_published(log, end, "a frame that is incomplete, or belongs to another history")
            self.prepare(frame)
            self.take_frame(log, frame, &progress)
            if self._broken:
                error = MemoryError("not enough memory for the table of a reader: its next refresh builds another one")
                self._set_corrupt(error)
                raise error
            if log.end > stop:
                self._position = LogId(self.applied_index, self.applied_term)
                with nogil:
                    pass
                PyErr_CheckSignals()
                stop = log.end + SLICE
        self._terms.reserve(2)
        self.note_applied(applied_index, applied_term)
        self.note_durable(durable_index)
        if self._index.metadata_place:
            self._index.take_all(walk_frames(self.arena, self._index.end, self._index.end))
            self.metadata = self._index.metadata
        self._position = LogId(self.applied_index, self.applied_term)
        if self._index.ordered and self._index.order.is_behind():
            self._keep_order()  # a reader that never scans must not collect new keys endlessly

    cdef int map_up_to(self, Log log, uint64_t end) except -1:
        """Maps the log at least up to `end`."""
        cdef Mapping before = log.mapping
        cdef uint64_t mapped = before.mapped
        self.file_size = reach(log, end, self.file_size)
        if log.mapping is not before or log.mapping.mapped != mapped:
            self.take_arena()
            self.readable = log.start + log.end
        return 0

    cdef int prepare(self, const uint8_t *frame) except -1:
        """Reserves all memory that the records of a frame may need, so that nothing fails in the middle of it."""
        cdef uint64_t place = frame - self.arena
        cdef uint64_t length = frame_length(frame)
        cdef Walk walk = walk_frames(self.arena, place, place + length)
        cdef const uint8_t *record = next_record(&walk)
        cdef uint64_t puts = 0
        cdef uint64_t sessions = 0
        cdef uint64_t touches = 0
        cdef uint64_t deadlines = 0
        cdef uint64_t records = 0
        while record != NULL:
            puts += record_operation(record) == RECORD_PUT
            sessions += record_operation(record) == RECORD_SESSION
            touches += record_operation(record) == RECORD_TOUCH
            deadlines += record[RECORD_TIMED]
            records += 1
            record = next_record(&walk)
        self._table.reserve(puts)
        if sessions:
            self._index.sessions.reserve(sessions)
            self._index.session_deadlines.reserve(sessions)
        if touches:
            self._index.touches.reserve(touches)
        if deadlines:
            self._index.deadlines.reserve(deadlines)
        self._terms.reserve(frame_run_count(frame) + 2)
        self._index.dead.reserve(place + length)
        if self._index.ordered:
            self._index.order.reserve(puts, records)
        return 0

    cdef void take_frame(self, Log log, const uint8_t *frame, const Progress *progress) noexcept:
        """Makes a frame visible: one step for all readers, without Python code."""
        cdef const Run *runs = <const Run *>(frame + FRAME_RUNS)
        cdef uint64_t place = frame - self.arena
        cdef uint64_t length = frame_length(frame)
        cdef Walk walk = walk_frames(self.arena, place, place + length)
        cdef uint64_t applied_index = self.applied_index
        cdef uint64_t applied_term = self.applied_term
        cdef uint32_t i
        self.forget_guess()
        for i in range(frame_run_count(frame)):
            self._terms.append(runs[i].last, runs[i].term)
        if self._index.take(&walk, EVERYTHING):
            self._broken = True
        self._index.end = place + length
        log.last_frame, log.chain = log.end, frame_checksum(frame)
        log.end += length
        log.allocated = log.end
        log.frames += 1
        self.readable = log.start + log.end
        self.framed_index, self.framed_term = progress.last_index, progress.last_term
        self.applied_index, self.applied_term = self.framed_index, self.framed_term
        self.note_applied(applied_index, applied_term)

    cdef void note_applied(self, uint64_t index, uint64_t term) noexcept:
        """Notes an applied entry that is in no frame, since it has no command. Room for two runs is reserved."""
        cdef Terms terms = self._terms
        if index <= self.framed_index or index < self.applied_index:
            return
        self.forget_guess()
        if term < self.framed_term:
            return  # of a history that was lost
        self.known_count, self.known_seen = terms.count, terms.seen
        self.known_last = terms.last[terms.count - 1] if terms.count else 0
        self.guessed = True
        if (term != self.framed_term or self.framed_index == 0) and index > terms.seen + 1:
            terms.append(index - 1, UNKNOWN_TERM)
        terms.append(index, term)
        self.applied_index, self.applied_term = index, term

    cdef void forget_guess(self) noexcept:
        cdef Terms terms = self._terms
        if self.guessed:
            terms.count, terms.seen = self.known_count, self.known_seen
            if terms.count:
                terms.last[terms.count - 1] = self.known_last
            self.guessed = False

    cdef void note_durable(self, uint64_t index) noexcept:
        cdef uint64_t term = 0
        if index > self.durable_index and index <= self.applied_index and self._terms.find(index, &term):
            self.durable_index, self.durable_term = index, term

    def _last_certain(self):
        """Returns the last entry up to which all terms are certain.

        That is the last applied one, unless it is the first of its term, after a gap, and no frame has it yet: only a
        frame tells whether the owner noted other entries in the gap.
        """
        if self.guessed and self.applied_index > self.framed_index + 1 and (
            self.applied_term != self.framed_term or self.framed_index == 0
        ):
            return LogId(self.framed_index, self.framed_term)
        return LogId(self.applied_index, self.applied_term)

    def _taken_up_to(self):
        """Returns the end of the last frame that was taken."""
        return self._log.end

    # ---- the end ---------------------------------------------------------------------------------------

    def _after_fork(self):
        """Resets, in a forked child, the order's lock and builds, since threads that worked on it are gone."""
        if self._index is not None and self._index.ordered:
            self._index.order.lock = allocate_lock()
            self._index.order.worker = 0
            if self._index.order.builders:
                self._index.order.end_builds()

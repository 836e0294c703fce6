"""Apply, which must be fast, by one writer at a time. (`get`, its counterpart, is in module `state`.)

Nothing of a chunk is visible before everything about it is certain:

    decode, judge     chunk.pyx: commands into steps, compare-and-swaps against the state
    write             one frame: the runs of terms, and a record for each step that takes effect
    (sync)            with sync="apply"
    publish           table, terms, last applied: under the GIL, so that no reader sees half a chunk
"""

import threading

from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from _thread import start_new_thread

from fastsm.core.awaited cimport REPLACED, Ticket
from fastsm.core.chunk cimport Chunk, Held, hold, hold_entries, let_go, unsigned_slowly
from fastsm.core.view cimport Step
from fastsm.core.watchers cimport Reach
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.published cimport Publisher
from fastsm.disk.format cimport FRAME_RUNS, LARGE, RECORD_DELETE, RECORD_PUT, RUN_SIZE, frame_size
from fastsm.core.group_commit cimport GroupCommit
from fastsm.core.hard_state cimport HardState
from fastsm.lookup.index cimport BLOCK, Index
from fastsm.generation.log cimport Log
from fastsm.lookup.terms cimport RunList, RunMark, Terms

from fastsm.background import undisturbed
from fastsm.errors import StorageError
from fastsm.types import LogId

cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF

cdef enum:
    PARTS_FROM = 16 << 10  # bytes; smaller frames are stored through the mapping, or cost less than a write in parts


cdef class Engine(HardState):
    """The compiled half of `FastStateMachine`: the state and what changes it.

    Thread safety: every method, from any thread; writers take turns.
    """
    cdef Chunk chunk
    cdef bint contiguous
    cdef uint64_t compact_above    # `apply` calls for compaction when more bytes than this are dead

    def __cinit__(self, *args, **options):
        self.chunk = Chunk()
        self.compact_above = NEVER

    def _attach(self, Log log, Index index, GroupCommit commit, durable, bint contiguous, bint sync_on_apply):
        """Takes over what was recovered. `durable`: the last entry that is durable."""
        cdef Terms terms = index.terms
        head = log.head
        started = terms.count > 0 or head.base_index > 0
        self.runs = RunList(terms.seen, terms.last_term(head.base_term), started)
        self.contiguous = contiguous
        self.sync_on_apply = sync_on_apply
        self.take_index(log, index)
        self.order_wanted = index.ordered  # then the saved table has the order: it was in use before
        self._group_commit = commit
        self.runs_in_terms = 0
        self.applied_index, self.applied_term = self.runs.index, self.runs.term
        self.framed_index, self.framed_term = self.runs.index, self.runs.term
        self.durable_index, self.durable_term = durable
        self.metadata = index.metadata
        self.metadata_unsaved = False

    def _publish_by(self, Publisher publisher=None):
        """Publishes the state to readers in other processes from here on; with None, stops publishing it."""
        old, self.publisher = self.publisher, publisher
        if old is not None:
            old.close()
        if publisher is not None:
            publisher.begin(self._log.identity, self._index.end - self._log.start)
            self.tell_readers()

    cdef void take_index(self, Log log, Index index) noexcept:
        """Makes reads go to this log and index from here on."""
        if self._log is not None:
            self._log.waiters = None
        self._log, self._index, self._table, self._terms = log, index, index.table, index.terms
        log.waiters = self.awaited
        self.take_arena()

    def _switch(self, name_next, Log log, Index index, GroupCommit commit, state_of_its_own=None):
        """Takes the step to the next generation, on disk and in memory; in the writer's turn.

        `name_next` is called to take the step on disk. The caller ensures that no signal handler interrupts any of
        this, so disk and memory never name different generations. `state_of_its_own` is given when the next generation
        is another state (a reset, a snapshot), all of which is durable: its last entry and the snapshot's metadata, as
        `(LogId, SnapshotMetadata or None)`. None means the same state without overwritten records; then everything
        applied is durable in the next generation.
        """
        cdef RunList runs = self.runs
        cdef uint64_t old_end = self._index.end - self._log.start
        cdef Reach reach
        cdef uint64_t before = self.applied_index
        cdef uint64_t incarnation = 0
        applied, metadata = LogId(self.applied_index, self.applied_term), self.metadata
        if state_of_its_own is not None:
            applied, metadata = state_of_its_own
            runs = RunList(applied.index, applied.term, applied.index > 0)
        # Held until all is changed: freeing them may let another thread run.
        old_log, _old, mapping = self._log, self._index, self.mapping
        cdef Mapping _of_order = index.order.mapping if index.ordered else None
        if self.publisher is not None:
            incarnation = self.publisher.announce(
                self._log.identity, log.identity, state_of_its_own is not None, runs.index == 0 or runs.index < before)
        name_next()
        log.sync_count += self._log.sync_count
        log.sync_seconds += self._log.sync_seconds
        index.end = log.start + log.end
        index.metadata = metadata
        self.take_index(log, index)
        self._group_commit = commit
        self._epoch = self._epoch + 1 if state_of_its_own is None else ((self._epoch >> 32) + 1) << 32
        self.runs = runs
        self.runs_in_terms = 0
        self.metadata, self.metadata_unsaved = metadata, False
        self.applied_index, self.applied_term = runs.index, runs.term
        self.framed_index, self.framed_term = runs.index, runs.term
        self.durable_index, self.durable_term = runs.index, runs.term
        if self.publisher is not None:
            self.publisher.go_on_as(incarnation)
        self.tell_readers()
        if state_of_its_own is not None:
            self._watchers.wake_all()
            return
        reach.index, reach.term, reach.identity, reach.frame = runs.index, runs.term, log.identity, log.end
        self._watchers.move(mapping, old_log.head.identity, old_end, &reach)

    def _tell_waiting(self, uint64_t before):
        """Tells those who wait for an entry, after `_switch`. `before`: the last applied index before that."""
        if self.applied_index == 0 or self.applied_index < before:
            self.awaited.end_all(REPLACED)
        else:
            self.awaited.note_applied(self.applied_index)

    def _compact_above(self, dead_bytes):
        """Makes `apply` call for compaction, once, when more than `dead_bytes` are dead."""
        self.compact_above = dead_bytes

    def _is_called_for(self):
        """Returns whether a compaction was called for and is not over; always true if none ever starts by itself."""
        return self.compact_above == NEVER

    # ---- apply -----------------------------------------------------------------------------------------

    def apply(self, chunk):
        """Applies committed entries, all or none. O(operations).

        `chunk`: a sequence of `Entry` or plain tuples `(index, term, command)`. Indexes rise strictly and terms
        never fall. Entries at or below `last_applied()` are skipped. Each entry that is not skipped must have the next
        index (with `contiguous=False`: any higher one).

        Returns a list with one result per entry: True if it took effect; False if a compare-and-swap or a batch did not
        match, or if the key of a touch or the session of a forget does not exist; None if it was skipped; an `Answer`
        if its command returns one. Durable on return with `sync="apply"`, otherwise after the next `flush`. Readers see
        the state before the chunk or after it, never in between.

        Raises `OrderError`, `CommandError`, `ProcedureError`, `StorageError`, `NotRunningError`; then nothing of the
        chunk was applied. Thread safe; concurrent calls take turns.
        """
        if self.gate:
            self.refuse()  # before the turn, which would never be passed on in a forked child
        cdef Held held
        hold(chunk, &held)
        try:
            self._turns.enter()
            try:
                return self.apply_in_turn(&held)
            finally:
                self._turns.leave()
        finally:
            let_go(&held)

    def _apply_if_free(self, chunk, uint64_t room):
        """Applies a chunk that takes at most `room` bytes of log, if that is possible without waiting for anything.

        Returns None otherwise: the turn is taken, each apply is synced, or no pages are prepared for the frame.
        """
        if self.gate:
            self.refuse()
        cdef Held held
        hold(chunk, &held)
        try:
            # From here to the turn no other thread runs.
            if self.sync_on_apply or not self._turns.is_free() or not self._log.has_room(room):
                return None
            self._turns.enter()
            try:
                return self.apply_in_turn(&held)
            finally:
                self._turns.leave()
        finally:
            let_go(&held)

    def _hold(self, chunk):
        """Returns the entries of a chunk as they are now, for a later `_apply_in_turn`."""
        return hold_entries(chunk)

    def _apply_in_turn(self, chunk):
        """Does the same as `apply`, for a caller that already has the writer's turn."""
        cdef Held held
        hold(chunk, &held)
        try:
            return self.apply_in_turn(&held)
        finally:
            let_go(&held)

    cdef list apply_in_turn(self, Held *held):
        """Applies held entries. The caller still owns `held`, and releases it afterwards."""
        cdef Chunk chunk = self.chunk
        cdef RunList runs = self.runs
        cdef RunMark mark
        cdef list results
        cdef bint counts = False      # the chunk is in the log
        if self.gate:
            self.refuse()
        self._log.require_writable()
        runs.mark(&mark)
        try:
            chunk.decode(held.items, held.count, self._table, self._terms, runs, self.contiguous)
            if chunk.calls:
                self.judge_calls(chunk)
            elif chunk.conditional:
                chunk.judge(self)
            results = chunk.results()
            if self.status:
                self.refuse()  # a procedure, a finalizer or a signal handler may have forked
            if runs.index != mark.index:
                self.write_chunk(chunk)
            counts = True
            if runs.index != mark.index:
                self.publish(chunk)
                self.tell_readers()
                self.tell_of_chunk()
            return results
        finally:
            if not counts:
                runs.rewind(&mark)
            chunk.forget()

    cdef inline int tell_of_chunk(self) except -1:
        """Tells those who wait for the published chunk, and starts compaction or the order's thread if needed."""
        if self.awaited.least <= self.applied_index:
            self.awaited.note_applied(self.applied_index)
        if self._watchers.applied.armed or (self.sync_on_apply and self._watchers.durable.armed):
            self._watchers.ring()
        if self.dead_bytes() > self.compact_above:
            self.call_for_compaction()
        if self._index.ordered and not self.order_called and self._index.order.is_behind():
            self.call_for_order()
        return 0

    # ---- wait ------------------------------------------------------------------------------------------

    def _await_applied(self, index, queue, owner, bint blocks):
        """Returns a ticket for an entry, or None if the entry is applied already.

        `queue` receives the ticket once the entry is applied, or can no longer be. With None, the caller itself
        waits for the ticket. `blocks`: the calling thread will block, so this raises if a call further up its own stack
        is in the middle of a write, which could then never end.
        """
        cdef uint64_t wanted = unsigned_slowly(index, "index")
        cdef Ticket ticket = Ticket(wanted, queue, owner)
        if self.gate:
            self.refuse()
        if self.applied_index >= wanted:
            return None
        self._log.require_writable()
        if blocks:
            self._turns.refuse_own(PyThread_get_thread_ident())
        self.awaited.add(ticket)
        return ticket

    def _waiting_for_entries(self):
        """Returns the number of tickets that wait for an entry, for tests."""
        return len(self.awaited.tickets)

    def _wait_no_more(self, Ticket ticket):
        """Removes a ticket, if it is still waiting."""
        self.awaited.discard(ticket)

    # ---- procedures ------------------------------------------------------------------------------------

    def _set_procedures(self, procedures, bint twice):
        """Sets the procedures that `call` can run, by name and version; `twice`: see `check_procedures`."""
        self.chunk.judgement.procedures = procedures
        self.chunk.judgement.called = self.chunk.judgement.called_name = None
        self.chunk.judgement.twice = twice

    def _procedures(self):
        return self.chunk.judgement.procedures

    def _looked_past(self):
        """Returns how many keys, written by the same chunk, ranges had to skip one by one; for tests."""
        return self.chunk.judgement.view.looked_past

    cdef int judge_calls(self, Chunk chunk) except -1:
        """Judges a chunk that runs procedures: never in the main thread, where a signal handler could interrupt one."""
        if PyThread_get_thread_ident() == threading.main_thread().ident:
            elsewhere = JudgeElsewhere(self, chunk)
            chunk.judgement.stopped = False
            try:
                undisturbed(elsewhere, elsewhere.interrupt, often=True)
            finally:
                chunk.judgement.stopped = False
        else:
            self.judge_here(chunk)
        return 0

    cdef int judge_here(self, Chunk chunk) except -1:
        self.calling = PyThread_get_thread_ident()
        self.set_gate()
        try:
            return chunk.judge(self)
        finally:
            self.calling = 0
            self.set_gate()

    # ---- write and publish -----------------------------------------------------------------------------

    cdef int call_for_compaction(self) except -1:
        """Starts a thread that compacts; if that fails, the next chunk tries again. Raises nothing: all was applied.

        Runs no Python code itself, hence no signal handler.
        """
        cdef uint64_t above = self.compact_above
        self.compact_above = NEVER
        try:
            start_new_thread(CompactElsewhere(self, above), ())
        except Exception:  # besides a lack of memory or threads: whatever an audit hook raises
            self.compact_above = above
        return 0

    cdef int call_for_order(self) except -1:
        """Starts a thread that sorts new keys in; if that fails, the next reader does it. Runs no Python code here."""
        self.order_called = True
        try:
            start_new_thread(self._keep_order, ())
        except Exception:
            self.order_called = False
        return 0

    cdef int write_chunk(self, Chunk chunk) except -1:
        """Writes the chunk's frame to the log. All memory that publishing needs is reserved before that."""
        cdef Log log = self._log
        cdef RunList runs = self.runs
        cdef uint64_t length, place
        self._table.reserve(chunk.puts)
        if chunk.sessions:
            self._index.sessions.reserve(chunk.sessions)
            self._index.session_deadlines.reserve(chunk.sessions)
        if chunk.touches:
            self._index.touches.reserve(chunk.touches)
        self._terms.reserve(runs.count)
        place = log.start + log.end + frame_size(runs.count, 0)
        chunk.lay_out(place)
        if chunk.deadlines:
            self._index.deadlines.reserve(chunk.deadlines)
        length = frame_size(runs.count, chunk.record_bytes)
        self._index.dead.reserve(place + length)
        if self._index.ordered:
            self._index.order.reserve(chunk.puts, chunk.count)
        if length >= PARTS_FROM and chunk.large_bytes >= length / 2 and log.takes_parts(length):
            self.write_in_parts(chunk, length)
        else:
            self.write_in_one(chunk, length)
        if self.sync_on_apply:
            # The system reports a lost page only once: of two concurrent syncs, one could miss the error.
            self._group_commit.sync_up_to(log.end)
            self.durable_index, self.durable_term = runs.index, runs.term
        return 0

    cdef int write_in_one(self, Chunk chunk, uint64_t length) except -1:
        """Builds the frame directly in the log's pages, or in a buffer."""
        cdef Log log = self._log
        cdef RunList runs = self.runs
        cdef uint8_t *frame = log.begin_frame(length)
        if self.mapping is not log.mapping or self.readable != log.mapping.mapped:
            self.take_arena()
        self.expect_old(chunk, 0)
        memcpy(frame + FRAME_RUNS, runs.runs, runs.count * RUN_SIZE)
        if length > LARGE:
            with nogil:
                chunk.write_records(frame + frame_size(runs.count, 0))
        else:
            chunk.write_records(frame + frame_size(runs.count, 0))
        log.commit_frame(frame, length, runs.count)
        return 0

    cdef int write_in_parts(self, Chunk chunk, uint64_t length) except -1:
        """Writes large values straight from the bytes of the commands: the system's copy is the only one."""
        cdef Log log = self._log
        cdef RunList runs = self.runs
        cdef uint8_t *frame
        cdef size_t count
        chunk.reserve_parts()
        frame = log.begin_parts(length, length - chunk.large_bytes)
        self.take_arena()
        self.expect_old(chunk, 0)
        memcpy(frame + FRAME_RUNS, runs.runs, runs.count * RUN_SIZE)
        count = chunk.write_around(frame, frame + frame_size(runs.count, 0))
        log.commit_parts(chunk.parts, count, length, runs.count)
        return 0

    cdef int publish(self, Chunk chunk) except -1:
        """Makes a written chunk visible. Runs no Python code, so that it is one step for all readers."""
        cdef size_t first = 0
        cdef size_t stop, i
        cdef uint64_t rebuilds = self._table.rebuilds + self._index.sessions.rebuilds
        cdef Step *step
        while first < chunk.count:
            stop = min(first + BLOCK, chunk.count)
            if stop < chunk.count:
                self.expect_old(chunk, stop)
            for i in range(first, stop):
                step = &chunk.steps[i]
                if step.record == 0:
                    continue
                if self._table.rebuilds + self._index.sessions.rebuilds != rebuilds:
                    step.hashed = self._index.hash_of(self.arena + step.place)
                if self._index.set_place(self.arena, step.record, step.hashed, step.place) < 0:
                    self._log.failed = True
                    self._log.poison(StorageError(None, "no memory to publish a chunk that is in the log", ""))
                    raise MemoryError("no memory to publish a chunk that is in the log: open the directory again")
            first = stop
        self.publish_runs()
        return 0

    cdef void expect_old(self, Chunk chunk, size_t first) noexcept:
        """Prefetches what publishing the steps of the block at `first` will touch, to overlap with other work."""
        cdef size_t i
        cdef Step *step
        for i in range(first, min(first + BLOCK, chunk.count)):
            step = &chunk.steps[i]
            if step.record == RECORD_PUT or step.record == RECORD_DELETE:
                self._index.expect(self.arena, step.hashed)


cdef class CompactElsewhere:
    """Compacts, on a thread of its own. If that could not even begin or end, for lack of memory, a chunk tries again.

    Compiled, because a Python function may find no memory to run in.
    """
    cdef Engine engine
    cdef uint64_t above   # the number of dead bytes that called for this compaction

    def __cinit__(self, Engine engine, uint64_t above):
        self.engine, self.above = engine, above

    def __call__(self):
        try:
            self.engine._compact_by_itself()
        finally:
            if self.engine.compact_above == NEVER:  # otherwise the policy was renewed
                self.engine.compact_above = self.above


cdef class JudgeElsewhere:
    """Judges a chunk on a thread of its own. An exception from a signal handler interrupts the procedure."""
    cdef Engine engine
    cdef Chunk chunk

    def __cinit__(self, Engine engine, Chunk chunk):
        self.engine, self.chunk = engine, chunk

    def __call__(self):
        self.engine.judge_here(self.chunk)

    def interrupt(self, call):
        self.chunk.judgement.stopped = True
        call.interrupt()

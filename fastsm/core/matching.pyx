"""A state as a source of changes, and the matching of changes with waiting watches."""

from libc.stdint cimport uint8_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport usleep

from fastsm.core.state cimport State
from fastsm.core.status cimport CLOSED
from fastsm.core.turns cimport Turns
from fastsm.core.watchers cimport Group, Prefixes, Reach, Waiting, Watchers
from fastsm.disk.format cimport LOG_HEADER_SIZE, frame_length
from fastsm.disk.mapping cimport Mapping
from fastsm.generation.changes cimport ALL, Changes, Source
from fastsm.generation.steps cimport Place
from fastsm.generation.log cimport Log

cdef uint64_t LARGEST = 0xFFFFFFFFFFFFFFFE
cdef double ROUND = 0.001   # the seconds between two rounds of matching, at least


cdef inline uint64_t known_changes(object changes) except? 0:
    """Converts a source's count of changes; a negative one (unknown) or a very large one becomes ALL."""
    return changes if 0 <= changes < ALL - 1 else ALL


cdef class StateSource(Source):
    """The changes of a state: all that are applied, or those that are durable.

    Thread safety: that of the watch it belongs to.
    """
    cdef readonly State _state
    cdef readonly bint durable

    def __cinit__(self, State state not None, bint durable):
        self._state = state
        self.durable = durable

    cpdef int look(self) except -1:
        cdef State state = self._state
        cdef Log log
        if state.gate:
            state.refuse()
        log = state._log
        if log.identity != self.identity or self.path is None:
            self.take_head(log)
        # From here on no Python code runs, so all fields are from one moment.
        if log is not state._log:
            return self.look()
        self.mapping = state.mapping
        self.identity = log.identity
        self.state = state._epoch >> 32
        self.end = state._index.end - log.start
        self.last_frame = log.last_frame
        if self.last_frame and self.last_frame + frame_length(log.address + self.last_frame) > self.end:
            self.last_frame = 0  # it is written but not published yet
        self.newest_index, self.newest_term = state.applied_index, state.applied_term
        if self.durable:
            self.index, self.term = state.durable_index, state.durable_term
        else:
            self.index, self.term = state.applied_index, state.applied_term
        return 0

    cdef int take_head(self, Log log) except -1:
        head = log.head
        self.path = log.path
        self.base_index, self.base_term = head.base_index, head.base_term
        self.base_changes = known_changes(head.base_changes - 1 if head.base_size else 0)
        return 0

    cpdef bint is_over(self) except -1:
        return self._state.status == CLOSED

    def wait(self, Changes watch not None, Turns turns or None, queue, owner):
        """Registers a wait for a watch that has no more changes to deliver: `queue` or `owner` is told of the next one.

        Returns None if the watch should look again immediately. `turns` is given for a thread that will block: it must
        not be in the middle of a write, on which the next change may depend.
        """
        cdef State state = self._state
        cdef Place *draft = &watch.draft
        cdef Reach reach
        cdef Waiting waiting = Waiting(watch, self.durable, queue, owner)
        if turns is not None:
            turns.check()
        if state.status:
            return None  # looking again raises the reason
        if state.gate:
            state.refuse()  # raises on the thread of a procedure only
        # From here on no Python code runs: either the wait is registered, or something has changed.
        if (
            watch._closed or state._epoch >> 32 != self.state or state._log.identity != self.identity
            or (state.durable_index if self.durable else state.applied_index) != self.index
        ):
            return None
        reach.index, reach.term, reach.identity = self.index, self.term, self.identity
        reach.frame = draft.frame if draft.at == draft.stop else <uint64_t>LOG_HEADER_SIZE
        (state._watchers.durable if self.durable else state._watchers.applied).add(waiting, &reach)
        watch.awaited = waiting
        self.release()
        return waiting


def serve(Watchers watchers not None, tell_all):
    """Tells waiting watches of changes, with `tell_all`, at most once per millisecond, until `Watchers.silence`.

    Runs on a thread of its own, and keeps no machine alive while it waits. No other thread tells these watches, so a
    round that fails for lack of memory is repeated until all of them were told.
    """
    cdef double last = 0
    cdef bint heard = True
    cdef bint due = False
    while heard or due:
        try:
            if not due:
                heard = watchers.hear()
                due = True
                if not heard:
                    watchers.all_end = True
                pause(last + ROUND - now())
                last = now()
            find_wakeable(watchers)
            tell_all(watchers.awake)
            watchers.awake.clear()
            due = False
        except MemoryError:
            pause(ROUND)


cdef int pause(double seconds) except -1:
    if seconds > 0:
        with nogil:
            usleep(<unsigned>(seconds * 1e6) + 1)
    return 0


cdef double now() noexcept:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cdef int find_wakeable(Watchers watchers) except -1:
    """Takes out those waits that a change concerns, or all of them when all must look again."""
    if watchers.all_end:
        return watchers.take_all()
    if watchers.applied.waiting:
        match(watchers.applied, watchers.awake)
    if watchers.durable.waiting:
        match(watchers.durable, watchers.awake)
    return 0


cdef int match(Group group, list taken) except -1:
    """Matches the waits of a group with the changes since the last round."""
    cdef Waiting waiting = group.waiting[0]
    cdef StateSource source = waiting.watch._source
    cdef State state = source._state
    cdef list left = []
    cdef Prefixes prefixes
    cdef uint64_t changes
    # From one moment, since no Python code runs here:
    cdef Mapping mapping = state.mapping
    cdef Log log = state._log
    cdef Reach reach
    cdef uint64_t end = state._index.end - log.start
    left, group.left = group.left, left
    group.armed = True
    reach.identity, reach.frame = log.identity, end
    if source.durable:
        reach.index, reach.term = state.durable_index, state.durable_term
    else:
        reach.index, reach.term = state.applied_index, state.applied_term
    # Waits that are added from here on know everything up to `reach`.
    if mapping is None or not catch_up(group, left, &reach):
        return group.take_out(None, taken)
    prefixes = group.prefixes
    if prefixes is None:
        changes = group.changes
        prefixes = prefixes_of(group)
        if changes == group.changes:  # unless a collection ran Python code that changed the group
            group.prefixes = prefixes
    return match_with(group, prefixes, left, mapping, &reach, taken)


cdef bint catch_up(Group group, list left, const Reach *reach) except -1:
    """Returns whether the logs from the group's reach to the present one are all known."""
    cdef uint64_t at = group.reach.identity
    for entry in left:
        if at != <uint64_t>entry[1]:
            return False
        at = entry[5]
    return at == reach.identity


cdef Prefixes prefixes_of(Group group):
    cdef Waiting waiting
    cdef list keys = []
    for waiting in group.waiting:
        keys.append(waiting.prefix)
    return Prefixes(keys)


cdef int match_with(
    Group group, Prefixes prefixes, list left, Mapping mapping, Reach *reach, list taken
) except -1:
    """Takes out the waits that changes up to `reach` concern, and moves the group's reach there."""
    cdef uint64_t at = group.reach.frame
    cdef Mapping old
    for old, _, end, _, _, _, frame in left:
        if scan(prefixes, old, at, end, LARGEST) == 0:
            return group.take_out(None, taken)
        at = frame
    at = scan(prefixes, mapping, at, reach.frame, reach.index)
    if at == 0:
        return group.take_out(None, taken)
    if prefixes.any_hit:
        group.take_out(prefixes, taken)
    prefixes.forget_hits()
    reach.frame = at
    group.reach = reach[0]
    return 0


cdef uint64_t scan(Prefixes prefixes, Mapping mapping, uint64_t first, uint64_t end, uint64_t last) noexcept:
    cdef const uint8_t *log = mapping.address + mapping.start
    with nogil:
        first = prefixes.scan(log, first, end, last)
    return first

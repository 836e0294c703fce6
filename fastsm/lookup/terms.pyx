"""The entry-term index: which term an entry had, in memory that grows with elections, not with entries.

Terms never fall along the log. So a run `(first, last, term)` gives the term of every index in it, seen or not: an
index between two entries of one term has that term. Between two runs of different terms nothing is certain, and no
term is returned.
"""

import operator
import struct

cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from fastsm.disk.format cimport FRAME_RUNS, UNKNOWN_TERM, frame_run_count

from fastsm.libraries import library

RUN = struct.Struct("<QQQ")

cdef enum:
    LANES = 8     # searches that proceed together


cdef class Terms:
    """Runs of terms in ascending order: O(log runs) to find one, O(1) to append.

    Thread safety: none of its own; all calls are made under the GIL.
    """

    def __cinit__(self, uint64_t seen=0):
        self.seen = seen
        self.reserve(8)

    def __dealloc__(self):
        free(self.first)

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"<Terms of {self.count} runs>"

    @property
    def size(self):
        """The memory of the runs, in bytes."""
        return 3 * self.room * sizeof(uint64_t)

    cdef int reserve_slowly(self, size_t more) except -1 nogil:
        cdef uint64_t *grown
        cdef size_t room = self.room
        while room - self.count < more:
            room = 2 * room + 8
        grown = <uint64_t *>malloc(3 * room * sizeof(uint64_t))
        if grown == NULL:
            with gil:
                raise MemoryError(f"no memory for {room} runs of terms")
        if self.count:
            memcpy(grown, self.first, self.count * sizeof(uint64_t))
            memcpy(grown + room, self.last, self.count * sizeof(uint64_t))
            memcpy(grown + 2 * room, self.term, self.count * sizeof(uint64_t))
        free(self.first)
        self.first = grown
        self.last = grown + room
        self.term = grown + 2 * room
        self.room = room
        return 0

    cdef void append(self, uint64_t last, uint64_t term) noexcept nogil:
        """Appends a run as frames carry it: from the entry after `seen` up to `last`. There must be room.

        A run of UNKNOWN_TERM is a gap before the first entry of a term. The caller checks that `last` rises and `term`
        does not fall.
        """
        if term != UNKNOWN_TERM:
            if self.count and self.term[self.count - 1] == term:
                self.last[self.count - 1] = last
            else:
                self.first[self.count] = self.seen + 1
                self.last[self.count] = last
                self.term[self.count] = term
                self.count += 1
        self.seen = last

    cdef int take_frame(self, const uint8_t *frame) except -1 nogil:
        """Adds the runs of a frame, which was checked."""
        cdef const Run *runs = <const Run *>(frame + FRAME_RUNS)
        cdef uint32_t i
        self.reserve(frame_run_count(frame))
        for i in range(frame_run_count(frame)):
            self.append(runs[i].last, runs[i].term)
        return 0

    cdef size_t run_of(self, uint64_t index) noexcept nogil:
        """Returns the first run that ends at or after an index; `count` if there is none.

        It does not branch on comparisons: their results are random, so branches would be mispredicted. It divides into
        quarters, since the three loads of a step overlap: that takes half as many steps as halving.
        """
        cdef const uint64_t *last = self.last
        cdef size_t low = 0
        cdef size_t left = self.count
        cdef size_t quarter, i
        cdef size_t below = 0
        while left >= 4:
            quarter = left >> 2
            low += (
                (quarter & -<size_t>(last[low + quarter - 1] < index))
                + (quarter & -<size_t>(last[low + 2 * quarter - 1] < index))
                + (quarter & -<size_t>(last[low + 3 * quarter - 1] < index)))
            left -= 3 * quarter
        for i in range(left):
            below += <size_t>(last[low + i] < index)
        return low + below

    cdef bint holds_all(self, size_t run, const uint64_t *indexes, size_t count) noexcept nogil:
        """Returns whether all of up to LANES indexes are in one run."""
        cdef bint outside = run >= self.count
        cdef size_t i
        if not outside:
            for i in range(count):
                outside |= (indexes[i] < self.first[run]) | (indexes[i] > self.last[run])
        return not outside

    cdef void runs_of(self, const uint64_t *indexes, size_t count, size_t *runs) noexcept nogil:
        """Does `run_of` for up to LANES indexes: their searches proceed in lockstep, so their cache misses overlap."""
        cdef const uint64_t *last = self.last
        cdef uint64_t wanted[LANES]
        cdef size_t low[LANES]
        cdef size_t left = self.count
        cdef size_t half, i
        for i in range(LANES):
            wanted[i] = indexes[i] if i < count else 0
            low[i] = 0
        while left > 1:
            half = left >> 1
            for i in range(LANES):
                low[i] += half & -<size_t>(last[low[i] + half - 1] < wanted[i])
            left -= half
        for i in range(count):
            runs[i] = low[i] + <size_t>(left == 1 and last[low[i]] < wanted[i])

    cdef bint find(self, uint64_t index, uint64_t *term) noexcept nogil:
        """Finds the term of an index; returns whether it is certain."""
        cdef size_t run = self.run_of(index)
        if run == self.count or self.first[run] > index:
            return False
        term[0] = self.term[run]
        return True

    cdef void round_down(self, uint64_t *index, uint64_t *term) noexcept nogil:
        """Replaces an id between two runs, where no entry was seen, with the id of the entry before it."""
        cdef size_t run = self.run_of(index[0])
        if run < self.count and self.first[run] <= index[0]:
            return
        index[0] = self.last[run - 1] if run else 0
        term[0] = self.term[run - 1] if run else 0

    def extend(self, uint64_t last, uint64_t term):
        """Adds the entries after `seen` up to `last`; the caller ensures the order."""
        self.reserve(1)
        self.append(last, term)

    def last_term(self, uint64_t otherwise=0):
        """Returns the term of the last entry, or `otherwise` if there is none."""
        return self.term[self.count - 1] if self.count else otherwise

    def allows(self, uint64_t index, uint64_t term):
        """Returns whether an index that is not after the last entry can have a term, given that terms never fall."""
        cdef size_t i = 0
        cdef uint64_t least = 0
        while i < self.count and self.last[i] < index:
            least = self.term[i]
            i += 1
        if i == self.count:
            return index == term == 0
        if self.first[i] <= index:
            return term == self.term[i]
        return (term == 0) if index == 0 else least <= term <= self.term[i]

    def pack(self, uint64_t index, uint64_t term):
        """Returns the runs up to an entry in the form used by snapshots: `first, last, term`, little-endian, ascending.

        The last run ends at this entry, even if `append` was never given it; the caller has checked that its id is
        possible. Index 0: the empty state, without runs.
        """
        if index == 0:
            return b""
        cdef list runs = []
        for first, last, of in self.runs():
            if first <= index:
                runs.append([first, min(last, index), of])
        if not runs or runs[-1][1] < index:
            # No entry was seen between the last run and this one.
            if runs and runs[-1][2] == term:
                runs[-1][1] = index
            else:
                runs.append([index, index, term])
        return b"".join(RUN.pack(*run) for run in runs)

    def unpack(self, bytes packed):
        """Appends runs in the form used by snapshots; returns False if they are malformed."""
        for first, last, term in RUN.iter_unpack(packed):
            if not self.seen < first <= last < UNKNOWN_TERM or not term < UNKNOWN_TERM:
                return False
            if self.count and term <= self.last_term():
                return False
            self.reserve(1)
            self.seen = first - 1
            self.append(last, term)
        return True

    def get(self, uint64_t index):
        """Returns the term of an index, or None."""
        cdef uint64_t term
        return term if self.find(index, &term) else None

    @cython.boundscheck(False)
    @cython.wraparound(False)
    def get_many(self, ids):
        """Returns the terms of a uint64 array of indexes, in an array of the same shape; 0: not certain."""
        np = library("numpy")  # imported on first use: it would dominate the import time of fastsm
        given = np.asarray(ids)
        if given.size and given.dtype.kind not in "uib" and not hasattr(ids, "dtype"):
            given = integers_of(np, ids, given)
        if given.size and given.dtype.kind not in "uib":
            raise TypeError(f"ids: expected an array of uint64, found one of {given.dtype}")
        plain = np.ascontiguousarray(given, dtype=np.uint64)
        if given.dtype.kind == "i":
            plain[given < 0] = UNKNOWN_TERM  # the index of no entry
        cdef const uint64_t[::1] wanted = plain.reshape(-1)
        result = np.zeros(wanted.shape[0], dtype=np.uint64)
        cdef uint64_t[::1] terms = result
        cdef size_t runs[LANES]
        cdef Py_ssize_t first, count, i
        cdef size_t run = 0
        for first in range(0, wanted.shape[0], LANES):
            count = min(wanted.shape[0] - first, LANES)
            # Ids are mostly in order, so try the previous run first.
            if self.holds_all(run, &wanted[first], count):
                for i in range(count):
                    terms[first + i] = self.term[run]
                continue
            self.runs_of(&wanted[first], count, runs)
            run = runs[count - 1]
            for i in range(count):
                if runs[i] < self.count and self.first[runs[i]] <= wanted[first + i]:
                    terms[first + i] = self.term[runs[i]]
        return result.reshape(given.shape)

    def runs(self):
        """Returns a list of `(first, last, term)`, ascending."""
        cdef list runs = []
        cdef size_t i
        for i in range(self.count):
            runs.append((self.first[i], self.last[i], self.term[i]))
        return runs

    def check(self):
        """Asserts every invariant. O(runs)."""
        cdef size_t i
        for i in range(self.count):
            assert self.first[i] <= self.last[i], f"run {i} is empty"
            assert i == 0 or self.last[i - 1] < self.first[i], f"run {i} overlaps the one before"
            assert i == 0 or self.term[i - 1] < self.term[i], f"run {i}: the term does not rise"
        assert self.count == 0 or self.last[self.count - 1] <= self.seen, "the last run is not seen yet"


cdef class RunList:
    """Entries that were applied, but are in no frame yet, as runs `(last, term)`.

    A run starts after the previous one. Indexes that were never seen get a run of UNKNOWN_TERM, but only before the
    first entry of a term: within one term, the indexes in between have that term.
    """

    def __cinit__(self, uint64_t index, uint64_t term, bint started):
        self.index = index
        self.term = term
        self.started = started

    def __dealloc__(self):
        free(self.runs)

    def __len__(self):
        return self.count

    cdef void mark(self, RunMark *mark) noexcept:
        """Sets a mark, to which `rewind` can go back."""
        mark.count, mark.index, mark.term, mark.started = self.count, self.index, self.term, self.started
        mark.last = self.runs[self.count - 1].last if self.count else 0

    cdef void rewind(self, const RunMark *mark) noexcept:
        """Forgets all entries that were noted after the mark was set."""
        self.count, self.index, self.term, self.started = mark.count, mark.index, mark.term, mark.started
        if mark.count:
            self.runs[mark.count - 1].last = mark.last

    cdef int push(self, uint64_t last, uint64_t term) except -1:
        cdef Run *grown
        if self.count == self.room:
            grown = <Run *>realloc(self.runs, (2 * <size_t>self.room + 8) * sizeof(Run))
            if grown == NULL:
                raise MemoryError("no memory for the runs of a frame")
            self.runs = grown
            self.room = 2 * self.room + 8
        self.runs[self.count].last = last
        self.runs[self.count].term = term
        self.count += 1
        return 0

    cdef int note_new(self, uint64_t index, uint64_t term) except -1:
        if index > self.index + 1 and not (self.started and term == self.term):
            self.push(index - 1, UNKNOWN_TERM)
        self.push(index, term)
        self.index = index
        self.term = term
        self.started = True
        return 0


cdef object integers_of(np, ids, given):
    """Returns integers for which NumPy has no common type as uint64; `given` if some are not integers."""
    cdef list found = []
    cells = np.array(ids, dtype=object)
    try:
        for index in cells.flat:
            found.append(operator.index(index))
        return np.array(found, dtype=np.uint64).reshape(cells.shape)
    except (TypeError, OverflowError):
        return given

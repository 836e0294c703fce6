"""The publication: what the owner of a directory tells readers in other processes, in a small mapped file.

The owner writes two slots in turn, each with a number and a checksum. So a reader who looks while one is written, and
an owner who is killed half way, leave the other one whole. Neither side calls the system: the owner stores, the reader
looks. The number is stored last, and a reader looks at it first: one that sees it sees the frames that it speaks of.

    header | slot | slot | step | zeros   slot: number, incarnation, identity, end, applied, durable, checksum

Before an owner takes the step to another log, it announces that. So the next owner knows what the step was, should this
one be killed before it has published anything of that log.

Nothing here is needed to recover a state, and nothing is synced. After a restart of the machine the file may say
anything that it ever said: the incarnation tells, for it says in which run of the machine it was drawn.
"""

import os
from typing import NamedTuple

from libc.stdint cimport uint64_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.types cimport off_t

from fastsm.disk.files import storage_errors
from fastsm.disk.hashing import checksum
from fastsm.errors import CorruptionError, FormatVersionError

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)

NAME = "PUBLISHED"
MAGIC = b"FASTSM-P"
VERSION = 0
FILE_BYTES = 4096
HEADER = (MAGIC + VERSION.to_bytes(4, "little")).ljust(HEADER_SIZE, b"\0")
BOOT_ID = "/proc/sys/kernel/random/boot_id"

cdef enum:
    FILE_SIZE = 4096

assert sizeof(Slot) == SLOT_SIZE
assert sizeof(Step) == STEP_SIZE


class Published(NamedTuple):
    """One publication. Its incarnation says in which opening it was made, and which state it is of."""
    number: int
    incarnation: int
    identity: int
    end: int
    applied_index: int
    applied_term: int
    durable_index: int

    @property
    def boot(self):
        """Which run of the machine it was; 0 where that is not known."""
        return self.incarnation >> BOOT_SHIFT


def steps_back(incarnation):
    """Return how often, up to this incarnation, the state went back to an earlier one; modulo 1,024."""
    return incarnation >> BACK_SHIFT & 0x3FF


def state_number(incarnation):
    """Return another number for each state that is no continuation of the one before."""
    return incarnation & 0xFFFFF


def boot_number():
    """Return 32 bits that another run of the machine does not have; 0 where the system has no name for its runs."""
    try:
        with open(BOOT_ID, "rb") as file:
            return checksum(file.read(64)) & 0xFFFFFFFF or 1
    except OSError:
        return 0


def may_have_readers(published):
    """Return whether a reader may be alive that has seen this: none lives on from before the machine's last start.

    True where the number of this run cannot be read, for instance for want of a descriptor.
    """
    return not published.boot or boot_number() in (0, published.boot)


cdef bint take_slot(const uint8_t *page, uint64_t which, Slot *found) noexcept nogil:
    """Copies a slot; False when it was not written, is being written, or was left half written."""
    cdef const Slot *slot = <const Slot *>(page + HEADER_SIZE) + which
    found.number = load_acquire(&slot.number)
    found.incarnation = load(&slot.incarnation)
    found.identity = load(&slot.identity)
    found.end = load(&slot.end)
    found.applied_index = load(&slot.applied_index)
    found.applied_term = load(&slot.applied_term)
    found.durable_index = load(&slot.durable_index)
    found.checksum = load(&slot.checksum)
    acquire()  # the frames are looked at later
    return found.number != 0 and (found.number & 1) == which and found.checksum == slot_checksum(found)


cdef object newest(const uint8_t *page):
    """The newest publication that is whole, or None."""
    cdef Slot slots[SLOTS]
    cdef bint first = take_slot(page, 0, &slots[0])
    cdef bint second = take_slot(page, 1, &slots[1])
    cdef Slot *slot = &slots[1]
    if not (first or second):
        return None
    if first and (not second or slots[0].number > slots[1].number):
        slot = &slots[0]
    return Published(
        slot.number, slot.incarnation, slot.identity, slot.end, slot.applied_index, slot.applied_term,
        slot.durable_index)


def newest_in(const uint8_t[::1] content):
    """Return the newest publication in the bytes of such a file, or None."""
    if content.shape[0] < HEADER_SIZE + SLOTS * SLOT_SIZE:
        return None
    return newest(&content[0])


cdef object announced(const uint8_t *page):
    """The step that was announced last, `(identity, next identity, incarnation)`; None where that is not whole."""
    cdef const Step *source = <const Step *>(page + STEP_OFFSET)
    cdef Step step
    step.identity = load(&source.identity)
    step.next_identity = load(&source.next_identity)
    step.incarnation = load(&source.incarnation)
    step.checksum = load(&source.checksum)
    if step.checksum != step_checksum(&step):
        return None
    return step.identity, step.next_identity, step.incarnation


def announced_in(const uint8_t[::1] content):
    """Return the step that was announced in the bytes of such a file, or None."""
    return announced(&content[0]) if content.shape[0] >= STEP_OFFSET + STEP_SIZE else None


cdef class Publisher:
    """The owner's side.

    Thread safety: all calls are made under the GIL, and `publish` is one step.
    """

    def __cinit__(self):
        self.file = -1

    def __dealloc__(self):
        if self.page != NULL:
            munmap(self.page, FILE_SIZE)

    def __repr__(self):
        return f"<Publisher {self.path!r}: {self.number} published>"

    @staticmethod
    def open(directory):
        """The file of a locked directory; made when it is missing, or was not whole. Raises StorageError.

        Its block is there before anything is stored to it: without one a store would be a SIGBUS.
        """
        cdef Publisher publisher = Publisher()
        publisher.path = directory.path_of(NAME)
        with storage_errors(publisher.path, "opening the file in which readers see the state"):
            publisher.descriptor = open_or_make(directory, publisher.path)
            publisher.file = publisher.descriptor.number
            publisher.take(directory.stores_are_safe(publisher.descriptor))
        return publisher

    def take(self, bint stores):
        """Goes on after what the file says. `stores`: a store into it never lacks a block."""
        content = os.pread(self.file, FILE_SIZE, 0)
        if len(content) < FILE_SIZE:
            raise CorruptionError(self.path, len(content), f"{FILE_SIZE} bytes", "the end of the file")
        cdef const uint8_t[::1] bytes_read = content
        cdef const Slot *slots = <const Slot *>(&bytes_read[0] + HEADER_SIZE)
        cdef void *page
        self.number = max(slots[0].number, slots[1].number)
        if stores:
            page = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, self.file, 0)
            self.page = NULL if page == MAP_FAILED else <uint8_t *>page  # then it is written

    def begin(self, uint64_t identity, uint64_t end):
        """Draws the incarnation of this opening, which has recovered a log up to its end.

        Where that is another log, and nobody announced a step to it, or where frames are lost, the state is an earlier
        one, as far as can be told: the directory was restored or repaired.
        """
        content = self.content()
        last = newest_in(content)
        step = announced_in(content)
        cdef uint64_t before
        if last is None:
            before = int.from_bytes(os.urandom(4), "little")
        elif last.identity == identity:
            before = after(last.incarnation, last.end > end, True)
        elif step is not None and step[:2] == (last.identity, identity):
            before = step[2]  # the owner before was killed in that step, before a word about this log
        else:
            before = after(last.incarnation, True, True)
        opening = ((before >> OPENING_SHIFT) + 1) & 0xFFF
        self.incarnation = boot_number() << BOOT_SHIFT | opening << OPENING_SHIFT | before & 0xFFFFF

    cdef uint64_t announce(
        self, uint64_t identity, uint64_t next_identity, bint is_other_state, bint is_back
    ) noexcept:
        """Tells the next owner of a step to another log, before it is taken; returns the incarnation after it.

        `is_other_state`: what is there is no continuation. `is_back`: an earlier one.
        """
        cdef Step step
        cdef Step *target
        step.identity, step.next_identity = identity, next_identity
        step.incarnation = after(self.incarnation, is_other_state, is_back)
        step.checksum = step_checksum(&step)
        if self.page == NULL:
            if pwrite(self.file, &step, STEP_SIZE, STEP_OFFSET) != STEP_SIZE:
                pass  # a kill in the step would look as if the directory had been restored
            return step.incarnation
        target = <Step *>(self.page + STEP_OFFSET)
        store(&target.identity, step.identity)
        store(&target.next_identity, step.next_identity)
        store(&target.incarnation, step.incarnation)
        store(&target.checksum, step.checksum)
        return step.incarnation

    cdef void go_on_as(self, uint64_t incarnation) noexcept:
        """The step was taken: what is published from here on is of that incarnation."""
        self.incarnation = incarnation

    def last(self):
        """The newest publication in the file, or None. Raises StorageError."""
        return newest_in(self.content())

    cdef object content(self):
        with storage_errors(self.path, "reading what readers were told last"):
            return os.pread(self.file, FILE_SIZE, 0)

    cdef void write_slot(self, Slot *slot) noexcept:
        """Where a store may lack a block it is written. What a full disk refuses, the next publication says again.

        The number comes last here, too: a reader that has seen it does not look again before the next one.
        """
        cdef off_t offset = HEADER_SIZE + SLOT_SIZE * (slot.number & 1)
        cdef size_t first = sizeof(slot.number)
        cdef size_t rest = SLOT_SIZE - first
        self.failed = (
            pwrite(self.file, <const uint8_t *>slot + first, rest, offset + first) != <ssize_t>rest
            or pwrite(self.file, slot, first, offset) != <ssize_t>first)
        if not self.failed:
            self.number = slot.number

    def close(self):
        """Give the descriptor back. Nothing is published any more. Idempotent."""
        cdef uint8_t *page = self.page
        self.page = NULL
        self.file = -1
        if page != NULL:
            munmap(page, FILE_SIZE)
        if self.descriptor is not None:
            self.descriptor.close()


cdef uint64_t after(uint64_t incarnation, bint is_other_state, bint is_back) noexcept:
    """The incarnation of a state that comes after another one, which it continues or not."""
    cdef uint64_t shift = BACK_SHIFT if is_back else 0
    cdef uint64_t mask = <uint64_t>0x3FF << shift
    if not is_other_state:
        return incarnation
    return (incarnation & ~mask) | ((incarnation + (<uint64_t>1 << shift)) & mask)


cdef object open_or_make(directory, path):
    descriptor = directory.open_file(NAME, os.O_RDWR | os.O_CREAT)
    try:
        start = os.pread(descriptor.number, HEADER_SIZE, 0)
        if directory.size(descriptor) == FILE_SIZE and start == HEADER:
            return descriptor
        refuse_foreign(start, path)
    except BaseException:
        directory.close_file(descriptor)
        raise
    directory.close_file(descriptor)
    # Of another version, or left by a crash. A new file: readers of the old one look whether it still has its name.
    descriptor = directory.create_file(NAME)
    try:
        directory.allocate(descriptor, 0, FILE_SIZE)
        directory.write(descriptor, HEADER, 0)
    except BaseException:
        directory.close_file(descriptor)
        raise
    return descriptor


cdef int refuse_foreign(bytes start, str path) except -1:
    if start.strip(b"\0") and not start.startswith(MAGIC):
        raise CorruptionError(
            path, 0, "the file in which readers see the state", "a file of somebody else's", "move it away")
    return 0


def check_owned(directory):
    """Raises the `CorruptionError` with which an opening would refuse this file, if it is there; or OSError."""
    content = directory.read_file(NAME, HEADER_SIZE)
    if content is not None:
        refuse_foreign(content, directory.path_of(NAME))


cdef class Publication:
    """The readers' side.

    Thread safety: all calls are made under the GIL, but for `is_new`.
    """

    def __dealloc__(self):
        if self.page != NULL:
            munmap(<void *>self.page, FILE_SIZE)

    def __repr__(self):
        return f"<Publication {self.path!r}>"

    @staticmethod
    def open(directory):
        """The publication of a directory, or None: no owner has made one yet. Raises OSError."""
        cdef Publication publication = Publication()
        cdef void *page
        publication.path = directory.path_of(NAME)
        try:
            descriptor = directory.open_file(NAME, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor.number)
            start = os.pread(descriptor.number, HEADER_SIZE, 0)
            if status.st_size != FILE_SIZE or not start.strip(b"\0"):
                return None
            if start != HEADER:
                require_known(start, publication.path)
            publication.device, publication.inode = status.st_dev, status.st_ino
            page = mmap(NULL, FILE_SIZE, PROT_READ, MAP_SHARED, descriptor.number, 0)
            if page == MAP_FAILED:
                raise MemoryError("no memory to map the published state")
            publication.page = <const uint8_t *>page
        finally:
            directory.close_file(descriptor)
        published = newest(publication.page)
        publication.first = published.number if published is not None else 0
        return publication

    def go_on_from(self, Publication other=None):
        """Knows of the same file what another one knew before."""
        if self.is_same(other):
            self.first = other.first

    def is_of_this_run(self, published):
        """Whether a publication is of this run of the machine, so that it says what the log holds.

        One that has come since the file was opened is, whatever its incarnation says: in a container of its own the
        owner may be shown another number for this run.
        """
        return published.number != self.first or may_have_readers(published)

    def step(self):
        """The step to another log that was announced last, `(identity, next identity, incarnation)`, or None."""
        return announced(self.page)

    def read(self):
        """The newest publication, or None when none is whole. From here on it is not new any more."""
        cdef const Slot *slots = <const Slot *>(self.page + HEADER_SIZE)
        self.seen[0] = load_acquire(&slots[0].number)  # before the look: what comes meanwhile is new again
        self.seen[1] = load_acquire(&slots[1].number)
        return newest(self.page)

    def is_news(self):
        """Whether something was published since `read` last looked."""
        return self.is_new()

    def peek(self):
        """The newest publication, or None; it stays as new as it was."""
        return newest(self.page)

    def forget(self):
        """Whatever the file says is new again."""
        self.seen[0] = self.seen[1] = ~<uint64_t>0

    def is_same(self, Publication other=None):
        """Whether another one is of the same file."""
        return other is not None and (other.device, other.inode) == (self.device, self.inode)

    def is_at(self, path):
        """Whether this is still the file at a path; one that is not there at the moment is not another."""
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return True
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


def require_known(start, path):
    if not start.startswith(MAGIC):
        raise CorruptionError(path, 0, "the file in which readers see the state", "another file")
    raise FormatVersionError(path, VERSION, int.from_bytes(start[8:12], "little"))

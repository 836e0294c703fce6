"""The publication: what the owner of a directory tells readers in other processes, in a small mapped file.

The owner writes two slots in turn, each with a number and a checksum. So a reader who looks while one is written, and
an owner who is killed half way, leave the other one whole. Neither side calls the system: the owner stores, the reader
looks. The number is stored last, and a reader looks at it first: one that sees it sees the frames that it speaks of.

    header | slot | slot | zeros          slot: number, incarnation, identity, end, applied, durable, checksum

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
        cdef const uint8_t[::1] bytes_read = content
        cdef const Slot *slots = <const Slot *>(&bytes_read[0] + HEADER_SIZE)
        cdef void *page
        self.number = max(slots[0].number, slots[1].number)
        if stores:
            page = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, self.file, 0)
            self.page = NULL if page == MAP_FAILED else <uint8_t *>page  # then it is written

    def begin(self, uint64_t identity, uint64_t end, bint has_base):
        """Draws the incarnation of this opening, which has recovered a log up to its end."""
        last = self.last()
        lost = last is None or last.identity != identity or last.end > end
        before = int.from_bytes(os.urandom(4), "little") if last is None else last.incarnation
        opening = ((before >> OPENING_SHIFT) + 1) & 0xFFF
        self.incarnation = boot_number() << BOOT_SHIFT | opening << OPENING_SHIFT | before & 0xFFFFF
        if lost:  # frames were, or the owner before was killed in the step to this log, before a word about it
            self.note_state(not has_base or (last is not None and last.identity == identity))

    cdef void note_state(self, bint is_back) noexcept:
        """From here on it is another state than before, which is no continuation. `is_back`: an earlier one."""
        cdef uint64_t shift = BACK_SHIFT if is_back else 0
        cdef uint64_t mask = <uint64_t>0x3FF << shift
        self.incarnation = (self.incarnation & ~mask) | ((self.incarnation + (<uint64_t>1 << shift)) & mask)

    def last(self):
        """The newest publication in the file, or None. Raises StorageError."""
        with storage_errors(self.path, "reading what readers were told last"):
            return newest_in(os.pread(self.file, FILE_SIZE, 0))

    cdef void write_slot(self, Slot *slot) noexcept:
        """Where a store may lack a block it is written. What a full disk refuses, the next publication says again."""
        cdef off_t offset = HEADER_SIZE + SLOT_SIZE * (slot.number & 1)
        self.failed = pwrite(self.file, slot, SLOT_SIZE, offset) != SLOT_SIZE
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


cdef object open_or_make(directory, path):
    descriptor = directory.open_file(NAME, os.O_RDWR | os.O_CREAT)
    try:
        start = os.pread(descriptor.number, HEADER_SIZE, 0)
        if directory.size(descriptor) == FILE_SIZE and start == HEADER:
            return descriptor
        if start.strip(b"\0") and not start.startswith(MAGIC):
            raise CorruptionError(
                path, 0, "the file in which readers see the state", "a file of somebody else's", "move it away")
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
        return publication

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

"""The publication: what the owner of a directory tells readers in other processes, in a small mapped file.

The owner writes two slots alternately, each with a number and a checksum. So if a reader looks while one is being
written, or the owner is killed halfway, the other one is complete. Where stores through a mapping are safe, neither
side makes system calls: the owner stores, the reader loads. Elsewhere the owner calls `pwrite`. The number is stored
last and loaded first: a reader that sees it also sees the frames it refers to.

    header | slot | slot | step | zeros   slot: number, incarnation, identity, end, applied, durable, checksum

An owner announces a step to another log before it takes it. So the next owner knows what the step was, even if this
one is killed before it publishes anything about the new log.

Nothing here is needed to recover a state, and nothing is synced. After a reboot, the file may contain anything that it
ever contained; the incarnation shows that, since it includes a number of the boot in which it was made.
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
    """One publication. Its incarnation identifies the opening that made it, and the state that it belongs to."""
    number: int
    incarnation: int
    identity: int
    end: int
    applied_index: int
    applied_term: int
    durable_index: int

    @property
    def boot(self):
        """The number of the boot in which the publication was made; 0: unknown."""
        return self.incarnation >> BOOT_SHIFT


def steps_back(incarnation):
    """Returns how often, up to this incarnation, the state went back to an earlier one; modulo 1,024."""
    return incarnation >> BACK_SHIFT & 0x3FF


def state_number(incarnation):
    """Returns a number that differs between states that do not continue each other."""
    return incarnation & 0xFFFFF


def boot_number():
    """Returns 32 bits that identify the present boot of the system; 0 if the system does not identify its boots."""
    try:
        with open(BOOT_ID, "rb") as file:
            return checksum(file.read(64)) & 0xFFFFFFFF or 1
    except OSError:
        return 0


def may_have_readers(published):
    """Returns whether a reader that has seen this publication may be alive; none survives a reboot.

    Returns True if the present boot's number cannot be read, for example because no descriptor is available.
    """
    return not published.boot or boot_number() in (0, published.boot)


cdef bint take_slot(const uint8_t *page, uint64_t which, Slot *found) noexcept nogil:
    """Copies a slot; returns False if it was never written, is being written, or was left half written."""
    cdef const Slot *slot = <const Slot *>(page + HEADER_SIZE) + which
    found.number = load_acquire(&slot.number)
    found.incarnation = load(&slot.incarnation)
    found.identity = load(&slot.identity)
    found.end = load(&slot.end)
    found.applied_index = load(&slot.applied_index)
    found.applied_term = load(&slot.applied_term)
    found.durable_index = load(&slot.durable_index)
    found.checksum = load(&slot.checksum)
    acquire()  # before loads from the frames
    return found.number != 0 and (found.number & 1) == which and found.checksum == slot_checksum(found)


cdef object newest(const uint8_t *page):
    """Returns the newest complete publication, or None."""
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
    """Returns the newest publication in the bytes of such a file, or None."""
    if content.shape[0] < HEADER_SIZE + SLOTS * SLOT_SIZE:
        return None
    return newest(&content[0])


cdef object announced(const uint8_t *page):
    """Returns the last announced step, `(identity, next identity, incarnation)`; None if it is not complete."""
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
    """Returns the announced step in the bytes of such a file, or None."""
    return announced(&content[0]) if content.shape[0] >= STEP_OFFSET + STEP_SIZE else None


cdef class Publisher:
    """The owner's side of the publication.

    Thread safety: all calls are made under the GIL, and `publish` is atomic.
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
        """Opens the file of a locked directory; makes it if it is missing or incomplete. Raises StorageError.

        Its block is allocated before anything is stored: without a block, a store would raise SIGBUS.
        """
        cdef Publisher publisher = Publisher()
        publisher.path = directory.path_of(NAME)
        with storage_errors(publisher.path, "opening the publication"):
            publisher.descriptor = open_or_make(directory, publisher.path)
            publisher.file = publisher.descriptor.number
            publisher.take(directory.stores_are_safe(publisher.descriptor))
        return publisher

    def take(self, bint stores):
        """Continues from the file's content. `stores`: whether a store into the mapped file never lacks a block."""
        content = os.pread(self.file, FILE_SIZE, 0)
        if len(content) < FILE_SIZE:
            raise CorruptionError(self.path, len(content), f"{FILE_SIZE} bytes", "the end of the file")
        cdef const uint8_t[::1] bytes_read = content
        cdef const Slot *slots = <const Slot *>(&bytes_read[0] + HEADER_SIZE)
        cdef void *page
        self.number = max(slots[0].number, slots[1].number)
        if stores:
            page = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, self.file, 0)
            self.page = NULL if page == MAP_FAILED else <uint8_t *>page  # the file is written instead

    def begin(self, uint64_t identity, uint64_t end):
        """Determines the incarnation of this opening, which has recovered a log up to `end`.

        If that is not the log last published, and no step to it was announced, or if published frames are missing, the
        state counts as an earlier one: the directory was restored or repaired.
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
            before = step[2]  # the previous owner was killed in that step, before it published anything about this log
        else:
            before = after(last.incarnation, True, True)
        opening = ((before >> OPENING_SHIFT) + 1) & 0xFFF
        self.incarnation = boot_number() << BOOT_SHIFT | opening << OPENING_SHIFT | before & 0xFFFFF

    cdef uint64_t announce(
        self, uint64_t identity, uint64_t next_identity, bint is_other_state, bint is_back
    ) noexcept:
        """Records that a step to another log is coming, for the next owner; returns the incarnation after the step.

        `is_other_state`: the state after the step does not continue this one. `is_back`: it is an earlier one.
        """
        cdef Step step
        cdef Step *target
        step.identity, step.next_identity = identity, next_identity
        step.incarnation = after(self.incarnation, is_other_state, is_back)
        step.checksum = step_checksum(&step)
        if self.page == NULL:
            if pwrite(self.file, &step, STEP_SIZE, STEP_OFFSET) != STEP_SIZE:
                pass  # if this process is killed during the step, the directory will seem to have been restored
            return step.incarnation
        target = <Step *>(self.page + STEP_OFFSET)
        store(&target.identity, step.identity)
        store(&target.next_identity, step.next_identity)
        store(&target.incarnation, step.incarnation)
        store(&target.checksum, step.checksum)
        return step.incarnation

    cdef void go_on_as(self, uint64_t incarnation) noexcept:
        """Ends the step: later publications belong to this incarnation."""
        self.incarnation = incarnation

    def last(self):
        """Returns the newest publication in the file, or None. Raises StorageError."""
        return newest_in(self.content())

    cdef object content(self):
        with storage_errors(self.path, "reading the last publication"):
            return os.pread(self.file, FILE_SIZE, 0)

    cdef void write_slot(self, Slot *slot) noexcept:
        """Writes a slot by `pwrite`: a store might lack a block. If that fails, the next publication makes up for it.

        The number is written last here too: a reader that has seen it does not look again before the next one.
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
        """Closes the descriptor; nothing is published any more. Idempotent."""
        cdef uint8_t *page = self.page
        self.page = NULL
        self.file = -1
        if page != NULL:
            munmap(page, FILE_SIZE)
        if self.descriptor is not None:
            self.descriptor.close()


cdef uint64_t after(uint64_t incarnation, bint is_other_state, bint is_back) noexcept:
    """Returns the incarnation of a state that follows another one, which it may or may not continue."""
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
    # Of another version, or left by a crash. Readers of the old file notice that the name belongs to a new one.
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
            path, 0, "the file in which readers see the state", "a file not made by fastsm", "move it away")
    return 0


def check_owned(directory):
    """Raises `CorruptionError` if opening would refuse this file; a missing one is accepted. Raises OSError."""
    content = directory.read_file(NAME, HEADER_SIZE)
    if content is not None:
        refuse_foreign(content, directory.path_of(NAME))


cdef class Publication:
    """The readers' side of the publication.

    Thread safety: all calls are made under the GIL, except `is_new`.
    """

    def __dealloc__(self):
        if self.page != NULL:
            munmap(<void *>self.page, FILE_SIZE)

    def __repr__(self):
        return f"<Publication {self.path!r}>"

    @staticmethod
    def open(directory):
        """Opens the publication of a directory; None if no owner has made one yet. Raises OSError."""
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
                raise MemoryError("not enough memory to map the published state")
            publication.page = <const uint8_t *>page
        finally:
            directory.close_file(descriptor)
        published = newest(publication.page)
        publication.first = published.number if published is not None else 0
        return publication

    def go_on_from(self, Publication other=None):
        """Takes over `other.first`, the newest number when `other` was opened, if both are of the same file."""
        if self.is_same(other):
            self.first = other.first

    def is_of_this_run(self, published):
        """Returns whether a publication was made in the present boot, so that it describes the log on disk.

        One made since the file was opened counts whatever its incarnation says: an owner in a container may see another
        number for this boot.
        """
        return published.number != self.first or may_have_readers(published)

    def step(self):
        """Returns the last announced step to another log, `(identity, next identity, incarnation)`, or None."""
        return announced(self.page)

    def read(self):
        """Returns the newest publication, or None if none is complete; it no longer counts as new."""
        cdef const Slot *slots = <const Slot *>(self.page + HEADER_SIZE)
        self.seen[0] = load_acquire(&slots[0].number)  # loaded first: later publications still count as new
        self.seen[1] = load_acquire(&slots[1].number)
        return newest(self.page)

    def is_news(self):
        """Returns whether something was published since the last `read`."""
        return self.is_new()

    def peek(self):
        """Returns the newest publication, or None, without marking it as read."""
        return newest(self.page)

    def forget(self):
        """Makes everything in the file count as new again."""
        self.seen[0] = self.seen[1] = ~<uint64_t>0

    def is_same(self, Publication other=None):
        """Returns whether another publication is of the same file."""
        return other is not None and (other.device, other.inode) == (self.device, self.inode)

    def is_at(self, path):
        """Returns whether the file is still the one at a path; a missing file does not count as another one."""
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return True
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


def require_known(start, path):
    if not start.startswith(MAGIC):
        raise CorruptionError(path, 0, "the file in which readers see the state", "another file")
    raise FormatVersionError(path, VERSION, int.from_bytes(start[8:12], "little"))

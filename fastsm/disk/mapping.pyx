"""A file that is open, a file that is mapped where it can grow without moving, and the calls that `os` lacks."""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.pythread cimport PyThread_get_thread_ident
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE
from posix.mman cimport mmap, mprotect, munmap
from posix.types cimport off_t

from fastsm.disk.format cimport LARGE

cdef extern from "<sys/file.h>" nogil:
    int LOCK_EX
    int LOCK_UN
    int flock(int descriptor, int operation)

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <sys/mman.h>
    #include <unistd.h>
    #if defined(__linux__)
      #include <fcntl.h>
      #include <sys/vfs.h>
      #ifndef MADV_POPULATE_WRITE
        #define MADV_POPULATE_READ 22
        #define MADV_POPULATE_WRITE 23
      #endif
      static long file_system_type(int fd) {
          struct statfs buffer;
          return fstatfs(fd, &buffer) ? -1 : (long)buffer.f_type;
      }
      static void write_back(int fd, off_t offset, off_t size) {
          (void)sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE);
      }
      static int await_written(int fd, off_t size) {
          return sync_file_range(
              fd, 0, size, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
      }
    #else
      #define MADV_POPULATE_READ -1
      #define MADV_POPULATE_WRITE -1
      static long file_system_type(int fd) { (void)fd; return -1; }
      static void write_back(int fd, off_t offset, off_t size) { (void)fd; (void)offset; (void)size; }
      static int await_written(int fd, off_t size) { (void)fd; (void)size; return 0; }
    #endif
    #ifndef MAP_NORESERVE
      #define MAP_NORESERVE 0
    #endif
    """
    int MAP_FIXED
    int MAP_NORESERVE
    int MADV_POPULATE_READ, MADV_POPULATE_WRITE
    int madvise(void *address, size_t length, int advice)
    int close(int descriptor)
    ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
    long file_system_type(int descriptor)
    void write_back(int descriptor, off_t offset, off_t size)
    int await_written(int descriptor, off_t size)
    int errno
    const int EINTR, EIO, ENOSYS

cdef enum:
    PACE_PIECE = 2 << 20
    PACE_WINDOW = 8 << 20

cdef size_t PAGE = os.sysconf("SC_PAGE_SIZE")

# Address space is free, but not without end (128 TiB; less under RLIMIT_AS or a sanitizer), and a host may run
# thousands of machines: the first that can be had is taken, and a file that outgrows it is mapped anew.
RESERVATIONS = (1 << 34, 1 << 32, 1 << 30, 1 << 27)

# File systems on which a store into a populated page of an allocated block never lacks a block: these
# write in place. On those that copy on write (btrfs, zfs) such a store can be a SIGBUS; on xfs, too, since `cp`
# makes clones there, whose blocks are shared until they are written.
STORES_ARE_SAFE_ON = {
    0xEF53: "ext4",
    0x01021994: "tmpfs",
}


cdef class Descriptor:
    """An open file: a number for the system's calls, closed with the last reference to it.

    A bare number that a signal handler's exception drops between two steps of Python code would stay open for ever.
    """
    cdef readonly int number     # -1: closed

    def __cinit__(self):
        self.number = -1

    def __dealloc__(self):
        if self.number >= 0:
            close(self.number)

    def __index__(self):
        return self.number

    def __int__(self):
        return self.number

    def fileno(self):
        return self.number

    def __repr__(self):
        return f"<Descriptor {self.number}>" if self.number >= 0 else "<Descriptor, closed>"

    def close(self):
        """Gives the file back. Idempotent."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def duplicate(self):
        """Another descriptor of the same open file."""
        cdef Descriptor other = Descriptor()
        other.number = os.dup(self.number)
        return other


cdef class ExclusiveBlock:
    """A context with an exclusive lock of a file; a thread that is in one is refused by `enter` with `refusal()`.

    `threads`: those that are in one. `unless`: answers with which the system says that it knows no such lock: the block
    runs without. `directory._left`: the lock is a parent's by now, and not given back. Compiled, so that no signal
    handler comes between what belongs together.
    """
    cdef Descriptor descriptor
    cdef object directory, refusal
    cdef set threads
    cdef tuple unless
    cdef bint locked

    def __cinit__(self, directory, Descriptor descriptor, set threads, tuple unless, refusal):
        self.directory = directory
        self.descriptor = descriptor
        self.threads = threads
        self.unless = unless
        self.refusal = refusal

    def __enter__(self):
        own = PyThread_get_thread_ident()
        if own in self.threads:
            raise self.refusal()
        self.threads.add(own)
        try:
            self.lock()
        except BaseException:
            self.threads.discard(own)
            raise

    cdef int lock(self) except -1:
        cdef int descriptor = self.descriptor.number
        cdef int failed
        while True:
            with nogil:
                failed = flock(descriptor, LOCK_EX)
            if not failed:
                self.locked = True
                return 0
            if errno != EINTR:
                if errno not in self.unless:
                    PyErr_SetFromErrno(OSError)
                return 0
            PyErr_CheckSignals()

    def __exit__(self, kind, error, traceback):
        self.threads.discard(PyThread_get_thread_ident())
        if self.locked and not self.directory._left:
            flock(self.descriptor.number, LOCK_UN)


def open_at(name, int flags, mode=0o600, directory=None):
    """Opens a file, relative to a directory's descriptor; never inherited by a program that is started."""
    cdef Descriptor descriptor = Descriptor()
    descriptor.number = os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=directory)
    return descriptor


def stores_are_safe(int descriptor):
    """Whether frames may be stored through the mapping: an in-place file system, and a kernel that populates."""
    if MADV_POPULATE_WRITE < 0 or file_system_type(descriptor) not in STORES_ARE_SAFE_ON:
        return False
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == MAP_FAILED:
        return False
    supported = madvise(page, PAGE, MADV_POPULATE_WRITE) == 0
    munmap(page, PAGE)
    return supported


def write_at(int descriptor, data, off_t offset):
    """Writes all of a bytes-like object at `offset`; raises OSError. Small pieces keep the GIL."""
    cdef Py_buffer buffer
    cdef const char *p
    cdef size_t left
    cdef ssize_t written
    PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    try:
        p = <const char *>buffer.buf
        left = buffer.len
        while left:
            if left > LARGE:
                with nogil:
                    written = pwrite(descriptor, p, left, offset)
            else:
                written = pwrite(descriptor, p, left, offset)
            if written < 0:
                if errno == EINTR:
                    continue
                PyErr_SetFromErrno(OSError)
            if written == 0:
                raise OSError(EIO, "the system wrote nothing")
            p += written
            left -= written
            offset += written
    finally:
        PyBuffer_Release(&buffer)


def start_writeback(int descriptor, off_t offset, off_t size):
    """Lets the system begin to write bytes to the disk. It promises nothing: their sync does, and has less to wait for.

    No error is lost: what the disk refuses, the next sync of the file reports.
    """
    with nogil:
        write_back(descriptor, offset, size)


def pace_writeback(int descriptor, off_t start, off_t stop):
    """Lets the system begin to write [start, stop) to the disk, and waits until all but the end of it has come there.

    Called behind each piece of a large file, it keeps PACE_WINDOW bytes on their way. A sync of the whole file at its
    end would take the disk for itself, and each sync of another file meanwhile would wait for it (RocksDB knows this
    as strict_bytes_per_sync). It makes nothing durable. Raises OSError.
    """
    cdef int failed = 0
    cdef off_t size
    with nogil:
        while start < stop and not failed:
            size = min(stop - start, <off_t>PACE_PIECE)
            write_back(descriptor, start, size)
            start += size
            failed = start > PACE_WINDOW and await_written(descriptor, start - PACE_WINDOW) < 0
    if failed and errno != ENOSYS:  # without such a call the sync does it all
        PyErr_SetFromErrno(OSError)


cdef inline size_t page_behind(size_t offset) noexcept nogil:
    return (offset + PAGE - 1) & ~(PAGE - 1)


cdef class Mapping:
    """The arena: a base, if there is one, and behind it a log, which grows without moving.

    `Mapping(needed)` reserves at least `needed` bytes of address space; files are laid over them. The pages go back
    when the last reference is dropped: whoever reads them without the GIL, or lends them out, holds one.

    Thread safety: `lay_base` and `extend` under the GIL; bytes once mapped may be read from any thread.
    """

    def __cinit__(self, size_t needed=0, bint read_only=False):
        cdef void *address = MAP_FAILED
        self.address = NULL
        self.start = self.mapped = 0
        self.protection = PROT_READ if read_only else PROT_READ | PROT_WRITE
        needed += GUARD + PAGE
        for size in RESERVATIONS + (needed,):
            if size < needed:
                continue
            self.reserved = size
            address = mmap(NULL, self.reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            if address != MAP_FAILED:
                self.address = <uint8_t *>address
                return
        self.reserved = 0
        PyErr_SetFromErrno(OSError)

    def __dealloc__(self):
        if self.address != NULL:
            with nogil:  # a gigabyte of pages takes tens of milliseconds
                munmap(self.address, self.reserved)

    def __repr__(self):
        return f"<Mapping of {self.mapped} bytes, {self.reserved} reserved>"

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.address, self.mapped, 1, flags)

    cdef int lay_base(self, int descriptor, size_t size) except -1:
        """Maps the base, before anything else. Needs room for `log_start(size)`."""
        if mmap(self.address, size, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.start = self.mapped = log_start(size)
        self.guard(size, self.start)
        return 0

    cdef int extend(self, int descriptor, size_t size) except -1:
        """Maps the log up to `size`. Needs room for it and GUARD, and the file to be that long."""
        cdef size_t offset = (self.mapped - self.start) & ~(PAGE - 1)
        if self.start + size <= self.mapped:
            return 0
        if self.start + size + GUARD + PAGE > self.reserved:
            raise MemoryError(f"{size} bytes do not fit into {self.reserved} bytes of reserved address space")
        if mmap(
            self.address + self.start + offset, size - offset, self.protection, MAP_SHARED | MAP_FIXED,
            descriptor, offset,
        ) == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.mapped = self.start + size
        self.guard(self.mapped, page_behind(self.mapped) + GUARD)
        return 0

    cdef int shrink(self, size_t size) except -1:
        """The log's file was cut to `size`: pages behind, where a read would be a SIGBUS, become a guard again."""
        cdef size_t page = page_behind(self.start + size)
        cdef size_t stop = page_behind(self.mapped)
        if page < stop and mmap(
            self.address + page, stop - page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0
        ) == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.mapped = self.start + size
        self.guard(self.mapped, page + GUARD)
        return 0

    cdef int guard(self, size_t file_end, size_t stop) except -1:
        """Lets what lies behind the page that ends a file be read up to `stop`: it was reserved, and is zero."""
        cdef size_t page = page_behind(file_end)
        if mprotect(self.address + page, stop - page, PROT_READ) < 0:
            PyErr_SetFromErrno(OSError)
        return 0

    cdef bint fits(self, size_t size) noexcept:
        """Whether the log may grow to `size` here."""
        return self.start + size + GUARD + PAGE <= self.reserved

    cdef bint populate(self, size_t start, size_t stop) noexcept nogil:
        """Makes the pages of [start, stop) of the arena present and writable; False when the system will not.

        A store to them is then no page fault, unless a sync or the kernel's own writeback cleaned them.
        """
        start &= ~(PAGE - 1)
        return madvise(self.address + start, stop - start, MADV_POPULATE_WRITE) == 0

    cdef void populate_read(self, size_t start, size_t stop) noexcept nogil:
        """Makes the pages of [start, stop) present, where the system will: a look at one is then no page fault."""
        start &= ~(PAGE - 1)
        madvise(self.address + start, stop - start, MADV_POPULATE_READ)

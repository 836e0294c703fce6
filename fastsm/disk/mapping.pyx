"""Base and log, mapped into memory one after the other; the log can grow without moving."""

import os

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_SetFromErrno
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE
from posix.mman cimport mmap, mprotect, munmap

cdef extern from * nogil:
    """
    #include <sys/mman.h>
    #if defined(__linux__)
      #include <sys/vfs.h>
      #define FASTSM_LETS_GO_OF_PAGES 1
      #ifndef MADV_POPULATE_WRITE
        #define MADV_POPULATE_READ 22
        #define MADV_POPULATE_WRITE 23
      #endif
      static long file_system_type(int fd) {
          struct statfs buffer;
          return fstatfs(fd, &buffer) ? -1 : (long)buffer.f_type;
      }
    #else
      #define FASTSM_LETS_GO_OF_PAGES 0
      #define MADV_POPULATE_READ -1
      #define MADV_POPULATE_WRITE -1
      static long file_system_type(int fd) { (void)fd; return -1; }
    #endif
    #ifndef MAP_NORESERVE
      #define MAP_NORESERVE 0
    #endif
    """
    int MAP_FIXED
    int MAP_NORESERVE
    int MADV_DONTNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE
    bint LETS_GO_OF_PAGES "FASTSM_LETS_GO_OF_PAGES"
    int madvise(void *address, size_t length, int advice)
    long file_system_type(int descriptor)

cdef size_t PAGE = os.sysconf("SC_PAGE_SIZE")

# Address space is free, but not unlimited (128 TiB; less under RLIMIT_AS or a sanitizer), and a host may run thousands
# of machines: the first size that succeeds is used, and a file that outgrows it is mapped again.
RESERVATIONS = (1 << 34, 1 << 32, 1 << 30, 1 << 27)

# File systems on which a store into a populated page of an allocated block never lacks a block, because they write in
# place. On copy-on-write file systems (btrfs, zfs) such a store can raise SIGBUS; on xfs too, since `cp` makes clones
# there, whose blocks are shared until they are written.
STORES_ARE_SAFE_ON = {
    0xEF53: "ext4",
    0x01021994: "tmpfs",
}


def stores_are_safe(int descriptor):
    """Returns whether frames may be stored through the mapping: needs in-place writes, and MADV_POPULATE_WRITE."""
    if MADV_POPULATE_WRITE < 0 or file_system_type(descriptor) not in STORES_ARE_SAFE_ON:
        return False
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == MAP_FAILED:
        return False
    supported = madvise(page, PAGE, MADV_POPULATE_WRITE) == 0
    munmap(page, PAGE)
    return supported


def map_file(int descriptor, size_t size):
    """Returns the first bytes of a file as a mapping; the file must not be cut while it is in use."""
    cdef Mapping mapping = Mapping(size + GUARD, True)
    mapping.lay_base(descriptor, size)
    return mapping


cdef inline size_t page_after(size_t offset) noexcept nogil:
    return (offset + PAGE - 1) & ~(PAGE - 1)


cdef class Mapping:
    """The arena: an optional base, followed by a log, which grows without moving.

    `Mapping(needed)` reserves at least `needed` bytes of address space, into which files are mapped. The pages are
    freed with the last reference: code that reads them without the GIL, or lends them out, must hold one.

    Thread safety: `lay_base` and `extend` under the GIL; mapped bytes may be read from any thread.
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
            with nogil:  # unmapping a gigabyte takes tens of milliseconds
                munmap(self.address, self.reserved)

    def __repr__(self):
        return f"<Mapping of {self.mapped} bytes, {self.reserved} reserved>"

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.address, self.mapped, 1, flags)

    cdef int lay_base(self, int descriptor, size_t size) except -1:
        """Maps the base; must come before `extend`. There must be room for `log_start(size)`."""
        if mmap(self.address, size, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.start = self.mapped = log_start(size)
        self.guard(size, self.start)
        return 0

    cdef int extend(self, int descriptor, size_t size) except -1:
        """Maps the log up to `size`. There must be room for that and GUARD, and the file must be that long."""
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
        self.guard(self.mapped, page_after(self.mapped) + GUARD)
        return 0

    cdef int shrink(self, size_t size) except -1:
        """Turns the pages after a log that was cut to `size`, which would raise SIGBUS, into a guard."""
        cdef size_t page = page_after(self.start + size)
        cdef size_t stop = page_after(self.mapped)
        if page < stop and mmap(
            self.address + page, stop - page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0
        ) == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.mapped = self.start + size
        self.guard(self.mapped, page + GUARD)
        return 0

    cdef int guard(self, size_t file_end, size_t stop) except -1:
        """Makes the bytes from the end of a file's last page up to `stop` readable zeros; they are reserved already."""
        cdef size_t page = page_after(file_end)
        if mprotect(self.address + page, stop - page, PROT_READ) < 0:
            PyErr_SetFromErrno(OSError)
        return 0

    cdef bint fits(self, size_t size) noexcept:
        """Returns whether the log can grow to `size` in this mapping."""
        return self.start + size + GUARD + PAGE <= self.reserved

    cdef bint populate(self, size_t start, size_t stop) noexcept nogil:
        """Makes the pages of [start, stop) of the arena present and writable; returns False if the system refuses.

        A store to them then takes no page fault, unless a sync or the kernel's own writeback has cleaned the page.
        """
        start &= ~(PAGE - 1)
        return madvise(self.address + start, stop - start, MADV_POPULATE_WRITE) == 0

    cdef void settle(self, size_t start, size_t stop) noexcept nogil:
        """Makes the pages of [start, stop), which nobody will store to again, present for reads alone.

        Before the system writes a page back, it makes the page read-only in the mapping: page by page, each time
        interrupting the other cores that run threads of this process. Here that is done once for all the pages.
        """
        cdef size_t whole = stop & ~(PAGE - 1)  # the page after it may be stored to
        start &= ~(PAGE - 1)
        if LETS_GO_OF_PAGES and start < whole:
            madvise(self.address + start, whole - start, MADV_DONTNEED)  # loses no bytes: the file has them
        self.populate_read(start, stop)

    cdef void populate_read(self, size_t start, size_t stop) noexcept nogil:
        """Makes the pages of [start, stop) present if the system can, so that reading them takes no page fault."""
        start &= ~(PAGE - 1)
        madvise(self.address + start, stop - start, MADV_POPULATE_READ)

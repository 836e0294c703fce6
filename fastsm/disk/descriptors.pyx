"""Open files: descriptors, locks, writes, and writeback that starts before a sync; system calls that `os` lacks."""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.pythread cimport PyThread_get_thread_ident
from posix.types cimport off_t

from fastsm.disk.format cimport LARGE

cdef extern from "<sys/file.h>" nogil:
    int LOCK_EX
    int LOCK_UN
    int flock(int descriptor, int operation)

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
      #include <fcntl.h>
      static void write_back(int fd, off_t offset, off_t size) {
          (void)sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE);
      }
      static int await_written(int fd, off_t size) {
          return sync_file_range(
              fd, 0, size, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
      }
    #else
      static void write_back(int fd, off_t offset, off_t size) { (void)fd; (void)offset; (void)size; }
      static int await_written(int fd, off_t size) { (void)fd; (void)size; return 0; }
    #endif

    /* Starting writeback: one thread per process makes the calls, since the system blocks a calling thread while the
       disk's queue is full. Requests are hints: if too many wait, the next one is dropped, and the sync has more to do.
       The thread runs no Python code, and ends after a second without requests. */
    #define FASTSM_REQUESTS 64
    static struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        struct { int fd; off_t offset, size; } waiting[FASTSM_REQUESTS];
        unsigned first, count;
        int under_way;                  /* a descriptor, or -1 */
        int running;
    } fastsm_writer = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, {{0, 0, 0}}, 0, 0, -1, 0};

    static void *fastsm_write_back_all(void *nothing) {
        struct timespec until;
        int fd;
        off_t offset, size;
        pthread_mutex_lock(&fastsm_writer.lock);
        for (;;) {
            if (!fastsm_writer.count) {
                clock_gettime(CLOCK_REALTIME, &until);
                until.tv_sec += 1;
                pthread_cond_timedwait(&fastsm_writer.changed, &fastsm_writer.lock, &until);
                if (!fastsm_writer.count) {
                    fastsm_writer.running = 0;
                    pthread_mutex_unlock(&fastsm_writer.lock);
                    return nothing;
                }
            }
            fd = fastsm_writer.waiting[fastsm_writer.first].fd;
            offset = fastsm_writer.waiting[fastsm_writer.first].offset;
            size = fastsm_writer.waiting[fastsm_writer.first].size;
            fastsm_writer.first = (fastsm_writer.first + 1) % FASTSM_REQUESTS;
            fastsm_writer.count--;
            if (fd < 0)
                continue;
            fastsm_writer.under_way = fd;
            pthread_mutex_unlock(&fastsm_writer.lock);
            write_back(fd, offset, size);
            pthread_mutex_lock(&fastsm_writer.lock);
            fastsm_writer.under_way = -1;
            pthread_cond_broadcast(&fastsm_writer.changed);
        }
    }
    static void fastsm_start_writer(void) {
        pthread_t thread;
        pthread_attr_t attributes;
        sigset_t all, before;
        if (pthread_attr_init(&attributes))
            return;
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  /* signals should go to Python's threads */
        fastsm_writer.running = pthread_create(&thread, &attributes, fastsm_write_back_all, NULL) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
    }
    static void fastsm_ask_for_writeback(int fd, off_t offset, off_t size) {
        unsigned last;
        pthread_mutex_lock(&fastsm_writer.lock);
        if (fastsm_writer.count < FASTSM_REQUESTS) {
            last = (fastsm_writer.first + fastsm_writer.count) % FASTSM_REQUESTS;
            fastsm_writer.waiting[last].fd = fd;
            fastsm_writer.waiting[last].offset = offset;
            fastsm_writer.waiting[last].size = size;
            if (!fastsm_writer.running)
                fastsm_start_writer();
            if (fastsm_writer.running) {
                fastsm_writer.count++;
                pthread_cond_broadcast(&fastsm_writer.changed);
            }
        }
        pthread_mutex_unlock(&fastsm_writer.lock);
    }
    /* Called before a descriptor is closed: its number may then become another file's. */
    static void fastsm_forget_writeback(int fd) {
        unsigned i;
        pthread_mutex_lock(&fastsm_writer.lock);
        for (i = 0; i < fastsm_writer.count; i++)
            if (fastsm_writer.waiting[(fastsm_writer.first + i) % FASTSM_REQUESTS].fd == fd)
                fastsm_writer.waiting[(fastsm_writer.first + i) % FASTSM_REQUESTS].fd = -1;
        while (fastsm_writer.under_way == fd)
            pthread_cond_wait(&fastsm_writer.changed, &fastsm_writer.lock);
        pthread_mutex_unlock(&fastsm_writer.lock);
    }
    static void fastsm_lock_writer(void) { pthread_mutex_lock(&fastsm_writer.lock); }
    static void fastsm_unlock_writer(void) { pthread_mutex_unlock(&fastsm_writer.lock); }
    static void fastsm_lose_writer(void) {  /* in a forked child */
        pthread_mutex_unlock(&fastsm_writer.lock);  /* the thread that forked has locked it */
        pthread_cond_init(&fastsm_writer.changed, NULL);
        fastsm_writer.first = fastsm_writer.count = 0;
        fastsm_writer.under_way = -1;
        fastsm_writer.running = 0;
    }
    static int fastsm_follow_forks(void) {
        return pthread_atfork(fastsm_lock_writer, fastsm_unlock_writer, fastsm_lose_writer);
    }

    #define FASTSM_VECTOR 512
    /* `parts`: each is a `Part`. */
    static ssize_t fastsm_write_vector(
        int fd, const void *parts, size_t size_of_part, size_t count, size_t skipped, off_t offset) {
        struct iovec vector[FASTSM_VECTOR];
        size_t i;
        if (count > FASTSM_VECTOR)
            count = FASTSM_VECTOR;
        for (i = 0; i < count; i++) {
            const char *part = (const char *)parts + i * size_of_part;
            vector[i].iov_base = *(char *const *)part;
            vector[i].iov_len = *(const size_t *)(part + sizeof(char *));
        }
        vector[0].iov_base = (char *)vector[0].iov_base + skipped;
        vector[0].iov_len -= skipped;
        return pwritev(fd, vector, (int)count, offset);
    }
    """
    void ask_for_writeback "fastsm_ask_for_writeback"(int descriptor, off_t offset, off_t size)
    void forget_writeback "fastsm_forget_writeback"(int descriptor)
    int follow_forks "fastsm_follow_forks"()
    ssize_t write_vector "fastsm_write_vector"(
        int descriptor, const void *parts, size_t size_of_part, size_t count, size_t skipped, off_t offset)
    int close(int descriptor)
    ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
    void write_back(int descriptor, off_t offset, off_t size)
    int await_written(int descriptor, off_t size)
    int errno
    const int EINTR, EIO, ENOSYS

cdef enum:
    PACE_PIECE = 2 << 20
    PACE_WINDOW = 8 << 20

if follow_forks():
    raise MemoryError("not enough memory to register the handlers for forks")


cdef class Descriptor:
    """An open file descriptor, closed when the last reference to this object is dropped.

    A bare number would leak if a signal handler raised between two steps of Python code.
    """
    cdef readonly int number     # -1: closed

    def __cinit__(self):
        self.number = -1

    def __dealloc__(self):
        if self.number >= 0:
            with nogil:
                forget_writeback(self.number)
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
        """Closes the file. Idempotent."""
        number, self.number = self.number, -1
        if number >= 0:
            self.forget(number)
            os.close(number)

    cdef int forget(self, int number) except -1:
        """Cancels waiting writeback requests for this descriptor, and waits for one that is under way, if any."""
        with nogil:
            forget_writeback(number)
        return 0

    def duplicate(self):
        """Returns another descriptor of the same open file."""
        cdef Descriptor other = Descriptor()
        other.number = os.dup(self.number)
        return other


cdef class ExclusiveBlock:
    """A context manager with an exclusive lock of a file; raises `refusal()` on a thread that is already in one.

    `threads`: the threads inside such a block. `unless`: errors that mean that the system does not support this lock;
    then the block runs without it. `directory._left`: the lock belongs to the parent process, and is not released
    here. Compiled, so that no signal handler runs between taking a lock and recording it.
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
    """Opens a file relative to a directory's descriptor; the descriptor is not inherited by started programs."""
    cdef Descriptor descriptor = Descriptor()
    descriptor.number = os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=directory)
    return descriptor


def write_at(int descriptor, data, off_t offset):
    """Writes a bytes-like object completely at `offset`; raises OSError. Small pieces are written under the GIL."""
    cdef Py_buffer buffer
    cdef int failure
    PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    try:
        if buffer.len > LARGE:
            with nogil:
                failure = write_all(descriptor, buffer.buf, buffer.len, offset)
        else:
            failure = write_all(descriptor, buffer.buf, buffer.len, offset)
        if failure:
            raise OSError(failure, os.strerror(failure))
    finally:
        PyBuffer_Release(&buffer)


def start_writeback(int descriptor, off_t offset, off_t size):
    """Asks the system to start writing bytes to the disk, without any guarantee; a later sync then takes less time.

    Does not wait: another thread makes the call, and if too many requests are waiting, this one is dropped. No error is
    lost: the next sync of the file reports it. The descriptor belongs to a `Descriptor`, which cancels the request when
    it is closed.
    """
    ask_for_writeback(descriptor, offset, size)


def pace_writeback(int descriptor, off_t start, off_t stop):
    """Starts writing [start, stop) to the disk; waits until the file has arrived there up to PACE_WINDOW before `stop`.

    So a call after each piece of a large file keeps at most PACE_WINDOW bytes in flight. A sync of the whole file at
    the end would occupy the disk, and syncs of other files would have to wait for it (compare strict_bytes_per_sync in
    RocksDB). Makes nothing durable. Raises OSError.
    """
    cdef int failure
    with nogil:
        failure = pace(descriptor, start, stop)
    if failure:
        raise OSError(failure, os.strerror(failure))


cdef int pace(int descriptor, int64_t start, int64_t stop) noexcept nogil:
    """Does what `pace_writeback` does, without the GIL; returns 0 or the system's error."""
    cdef off_t size
    while start < stop:
        size = min(stop - start, <off_t>PACE_PIECE)
        write_back(descriptor, start, size)
        start += size
        if start > PACE_WINDOW and await_written(descriptor, start - PACE_WINDOW) < 0:
            return 0 if errno == ENOSYS else errno  # without such a call, the sync does all the work
    return 0


cdef int write_all(int descriptor, const void *data, size_t size, int64_t offset) noexcept nogil:
    """Writes everything; returns 0 or the system's error."""
    cdef const char *p = <const char *>data
    cdef ssize_t written
    while size:
        written = pwrite(descriptor, p, size, offset)
        if written < 0:
            if errno == EINTR:
                continue
            return errno
        if written == 0:
            return EIO
        p += written
        size -= written
        offset += written
    return 0


cdef int write_parts(int descriptor, const Part *parts, size_t count, int64_t offset) noexcept nogil:
    """Writes consecutive parts, starting at an offset of the file; returns 0 or the system's error."""
    cdef size_t first = 0
    cdef size_t skipped = 0
    cdef ssize_t written
    while first < count:
        written = write_vector(descriptor, &parts[first], sizeof(Part), count - first, skipped, offset)
        if written < 0:
            if errno == EINTR:
                continue
            return errno
        if written == 0:
            return EIO
        offset += written
        skipped += written
        while first < count and skipped >= parts[first].size:
            skipped -= parts[first].size
            first += 1
    return 0

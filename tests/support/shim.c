/* A library between a process and its C library, by LD_PRELOAD. At the n-th system call on files or maps it kills
   the process or lets the call fail; or the n-th allocation of a fastsm module fails. Until armed it does nothing. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* KILL: before the call; KILL_AFTER: after it, or after half of a write; FAIL_DONE: an error, but the call is done;
   SHORT: only the first byte of what `pwritev` should write. */
enum action { NOTHING, KILL, KILL_AFTER, FAIL, FAIL_DONE, FAIL_ALLOCATION, SHORT };

static volatile int armed = NOTHING;
static long remaining, seen;
static int failure;
static char struck[32];

/* Arms the action for the n-th call from now on; `code` is the errno of failures. */
void shim_arm(int action, long n, int code)
{
    armed = NOTHING;
    remaining = n;
    seen = 0;
    failure = code;
    struck[0] = 0;
    armed = action;
}

/* Disarms; returns the name of the call that met the action, or "". */
const char *shim_disarm(void)
{
    armed = NOTHING;
    return struck;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static int is_due(const char *name)
{
    if (armed == NOTHING || armed == FAIL_ALLOCATION || (armed == SHORT && strncmp(name, "pwritev", 7) != 0))
        return 0;
    if (__atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != remaining)
        return 0;
    strncpy(struck, name, sizeof struck - 1);
    if (armed == KILL)
        die();
    return 1;
}

static void *next_of(const char *name) { return dlsym(RTLD_NEXT, name); }

/* A call that can fail, either not done or done (as far as `done` goes). FAILED is its return value then. */
#define WATCHED(type, name, parameters, arguments, FAILED) WATCHED_HALF(type, name, parameters, arguments, arguments, FAILED)
#define WATCHED_HALF(type, name, parameters, arguments, done, FAILED)                                                  \
    type name parameters                                                                                               \
    {                                                                                                                  \
        static __typeof__(&name) next;                                                                                 \
        if (!next)                                                                                                     \
            next = (__typeof__(next))next_of(#name);                                                                   \
        if (is_due(#name)) {                                                                                           \
            if (armed != FAIL)                                                                                         \
                next done;                                                                                             \
            if (armed == KILL_AFTER)                                                                                   \
                die();                                                                                                 \
            errno = failure;                                                                                           \
            return FAILED;                                                                                             \
        }                                                                                                              \
        return next arguments;                                                                                         \
    }

/* Calls that release something do so even if they fail, as on Linux. */
#define GIVES_BACK(name, parameters, arguments)                                                                        \
    int name parameters                                                                                                \
    {                                                                                                                  \
        static __typeof__(&name) next;                                                                                 \
        if (!next)                                                                                                     \
            next = (__typeof__(next))next_of(#name);                                                                   \
        int due = is_due(#name);                                                                                       \
        int result = next arguments;                                                                                   \
        if (due && armed == KILL_AFTER)                                                                                \
            die();                                                                                                     \
        if (!due)                                                                                                      \
            return result;                                                                                             \
        errno = failure;                                                                                               \
        return -1;                                                                                                     \
    }

/* Calls that take a mode only with O_CREAT. */
#define OPENS(name, first, argument)                                                                                   \
    int name(first const char *path, int flags, ...)                                                                   \
    {                                                                                                                  \
        static int (*next)(first const char *, int, ...);                                                              \
        va_list list;                                                                                                  \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                                         \
            va_start(list, flags);                                                                                     \
            mode = va_arg(list, mode_t);                                                                               \
            va_end(list);                                                                                              \
        }                                                                                                              \
        if (!next)                                                                                                     \
            next = (__typeof__(next))next_of(#name);                                                                   \
        if (is_due(#name)) {                                                                                           \
            if (armed == KILL_AFTER) {                                                                                \
                next(argument path, flags, mode);                                                                      \
                die();                                                                                                 \
            }                                                                                                          \
            errno = failure;                                                                                           \
            return -1;                                                                                                 \
        }                                                                                                              \
        return next(argument path, flags, mode);                                                                       \
    }

#define NO_ARGUMENT
#define COMMA ,
OPENS(open, NO_ARGUMENT, NO_ARGUMENT)
OPENS(open64, NO_ARGUMENT, NO_ARGUMENT)
OPENS(openat, int directory COMMA, directory COMMA)
OPENS(openat64, int directory COMMA, directory COMMA)

GIVES_BACK(close, (int fd), (fd))
GIVES_BACK(munmap, (void *address, size_t size), (address, size))

/* Anonymous maps fail only if a module of fastsm makes them. The interpreter's allocations are tested otherwise, and if
   a new thread's first page failed, CPython would wait for the thread for ever. */
#define MAPS(name, offset)                                                                                             \
    void *name(void *address, size_t size, int protection, int flags, int fd, offset at)                               \
    {                                                                                                                  \
        static __typeof__(&name) next;                                                                                 \
        if (!next)                                                                                                     \
            next = (__typeof__(next))next_of(#name);                                                                   \
        if (armed != NOTHING && (fd >= 0 || is_ours(__builtin_return_address(0))) && is_due(#name)) {                  \
            if (armed == KILL_AFTER) {                                                                                \
                next(address, size, protection, flags, fd, at);                                                        \
                die();                                                                                                 \
            }                                                                                                          \
            errno = failure;                                                                                           \
            return MAP_FAILED;                                                                                         \
        }                                                                                                              \
        return next(address, size, protection, flags, fd, at);                                                         \
    }

/* Parts of which only the first `size` bytes are to be written; returns how many parts these are. */
static int first_bytes(const struct iovec *parts, int count, size_t size, struct iovec *first)
{
    int number = 0;
    for (; number < count && size; number++) {
        first[number] = parts[number];
        if (first[number].iov_len > size)
            first[number].iov_len = size;
        size -= first[number].iov_len;
    }
    return number;
}

#define GATHERS(name, offset)                                                                                          \
    ssize_t name(int fd, const struct iovec *parts, int count, offset at)                                              \
    {                                                                                                                  \
        static __typeof__(&name) next;                                                                                 \
        struct iovec half[1024];                                                                                       \
        size_t size = 0;                                                                                               \
        if (!next)                                                                                                     \
            next = (__typeof__(next))next_of(#name);                                                                   \
        if (!is_due(#name))                                                                                            \
            return next(fd, parts, count, at);                                                                         \
        if (armed == SHORT)                                                                                            \
            return next(fd, half, first_bytes(parts, count, 1, half), at);                                             \
        for (int i = 0; i < count; i++)                                                                                \
            size += parts[i].iov_len;                                                                                  \
        if (armed != FAIL)                                                                                             \
            next(fd, half, first_bytes(parts, count, (size + 1) / 2, half), at);                                       \
        if (armed == KILL_AFTER)                                                                                       \
            die();                                                                                                     \
        errno = failure;                                                                                               \
        return -1;                                                                                                     \
    }

static int is_ours(void *caller)
{
    Dl_info from;
    if (!dladdr(caller, &from) || !from.dli_fname)
        return 0;
    /* Only the package or a folder of it: a folder above it, such as a checkout, may have the same name. */
    const char *end = strrchr(from.dli_fname, '/');
    for (int level = 0; end && level < 2; level++) {
        if (end - from.dli_fname >= 7 && strncmp(end - 7, "/fastsm", 7) == 0)
            return 1;
        do
            end = end > from.dli_fname ? end - 1 : NULL;
        while (end && *end != '/');
    }
    return 0;
}

MAPS(mmap, off_t)
MAPS(mmap64, off64_t)
WATCHED(int, mprotect, (void *a, size_t s, int p), (a, s, p), -1)
WATCHED(int, madvise, (void *a, size_t s, int advice), (a, s, advice), -1)
WATCHED_HALF(ssize_t, pwrite, (int fd, const void *d, size_t s, off_t o), (fd, d, s, o), (fd, d, (s + 1) / 2, o), -1)
WATCHED_HALF(ssize_t, pwrite64, (int fd, const void *d, size_t s, off64_t o), (fd, d, s, o), (fd, d, (s + 1) / 2, o), -1)
GATHERS(pwritev, off_t)
GATHERS(pwritev64, off64_t)
WATCHED(ssize_t, pread, (int fd, void *d, size_t s, off_t o), (fd, d, s, o), -1)
WATCHED(ssize_t, pread64, (int fd, void *d, size_t s, off64_t o), (fd, d, s, o), -1)
WATCHED(int, fsync, (int fd), (fd), -1)
WATCHED(int, fdatasync, (int fd), (fd), -1)
WATCHED(int, ftruncate, (int fd, off_t size), (fd, size), -1)
WATCHED(int, ftruncate64, (int fd, off64_t size), (fd, size), -1)
WATCHED(int, posix_fallocate, (int fd, off_t o, off_t s), (fd, o, s), failure)
WATCHED(int, posix_fallocate64, (int fd, off64_t o, off64_t s), (fd, o, s), failure)
WATCHED(int, renameat, (int a, const char *old, int b, const char *new), (a, old, b, new), -1)
WATCHED(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), -1)
WATCHED(int, mkdir, (const char *path, mode_t mode), (path, mode), -1)
WATCHED(int, flock, (int fd, int operation), (fd, operation), -1)
WATCHED(int, fchmod, (int fd, mode_t mode), (fd, mode), -1)

/* ---- memory: only of the modules of fastsm; the interpreter's allocations are tested otherwise ---- */

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

static int memory_is_due(const char *name, void *caller)
{
    if (armed != FAIL_ALLOCATION || !is_ours(caller))
        return 0;
    if (__atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != remaining)
        return 0;
    strncpy(struck, name, sizeof struck - 1);
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size)
{
    return memory_is_due("malloc", __builtin_return_address(0)) ? 0 : __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    return memory_is_due("calloc", __builtin_return_address(0)) ? 0 : __libc_calloc(count, size);
}

void *realloc(void *old, size_t size)
{
    return memory_is_due("realloc", __builtin_return_address(0)) ? 0 : __libc_realloc(old, size);
}

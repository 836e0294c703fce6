"""The seam to the system: everything that opens, maps, allocates, syncs or renames goes through here.

Tests replace the disk by subclassing :class:`Directory`. All names are resolved relative to the directory's own
descriptor, and symbolic links are refused, so that nothing outside of the directory is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import inspect
import mmap
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from fastsm.disk import descriptors, mapping
from fastsm.disk.descriptors import Descriptor, ExclusiveBlock, open_at
from fastsm.disk.forks import left_by_children
from fastsm.errors import CorruptionError, LockedError, ReentryError, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOCK = "LOCK"
MADE_AGAIN = frozenset({LOCK, "PUBLISHED"})  # the next opening makes them again: they hold nothing of the state
LOCK_PAUSE = 0.02  # seconds between two attempts to get a lock that another process has
LOCK_MOMENT = 0.002  # seconds of attempts, at least
ASKED_SECONDS = 5.0  # seconds of attempts while the lock's holders only look up the owner
NO_DIRECTORY_LOCK = (errno.EBADF, errno.ENOLCK)  # NFS, whose locks need a file that is open for writing
NO_REGULAR_FILE = {errno.ELOOP: "a symbolic link", errno.EISDIR: "a directory", errno.ENXIO: "another kind of file"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # how a full disk, a quota or a limit is reported
NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # how file systems report unsupported calls
PIECE = mmap.PAGESIZE << 12  # usually 16 MiB, which are rewritten at a time; larger than any page of the page cache

Init = TypeVar("Init", bound=Callable[..., None])


def hides_seam(init: Init) -> Init:
    """Hides ``_files``, by which tests replace the disk, from the signature shown to users."""
    shown = inspect.signature(init)
    parameters = [parameter for name, parameter in shown.parameters.items() if name != "_files"]
    vars(init)["__signature__"] = shown.replace(parameters=parameters)
    return init


if sys.platform == "darwin":

    def _sync_data(fd: Descriptor) -> None:
        # On macOS, fsync leaves the data in the drive's own cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

else:
    _sync_data = os.fdatasync


class Directory:
    """One state directory, held open; the only way to its files.

    Methods raise plain :class:`OSError`; callers add what they were doing (``StorageError.wrap``).
    Thread safety: every method, from any thread; methods that wait for the disk release the GIL.
    """

    unfinished = False  # a tool is filling this directory: see fastsm.generation.unfinished

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True, mode: int = 0o700) -> None:
        """Opens the directory at ``path``; with ``create``, makes it with the permissions ``mode`` if it is missing.

        Files are also created with the permissions of ``mode``, except execute permissions, whatever the umask is.
        """
        self.path = os.fsdecode(path)
        self._lock: Descriptor | None = None
        self._locked_in = 0  # the process that took the lock
        self._left = False
        self._file_mode = mode & 0o666
        self._made = create and self._make(mode)
        self._directory = open_at(self.path, os.O_RDONLY | os.O_DIRECTORY)
        _directories.add(self)

    def __repr__(self) -> str:
        return f"<Directory {self.path!r}{', locked' if self.locked else ''}>"

    def _make(self, mode: int) -> bool:
        """Makes the directory if it is missing; returns whether it was."""
        try:
            os.mkdir(self.path, mode & 0o777)
        except FileExistsError:
            return False
        if stat.S_IMODE(os.stat(self.path).st_mode) & 0o777 != mode & 0o777:  # reduced by the umask
            os.chmod(self.path, mode)
        return True

    def sync_parent(self) -> None:
        """Makes this directory's own name durable."""
        sync_name(os.path.abspath(self.path), made=self._made)

    def path_of(self, name: str) -> str:
        """Returns the full path of a file, for messages."""
        return os.path.join(self.path, name)

    # ---- lock ----------------------------------------------------------------------------------------

    @property
    def locked(self) -> bool:
        return self._lock is not None

    def lock(self, timeout: float = 0) -> None:
        """Takes the exclusive lock; raises ``LockedError`` with the holder's process id after ``timeout`` seconds.

        Uses flock, not lockf, because it also excludes a second opening by this very process. The file is normally not
        unlinked, since two processes could then lock two files of the same name. A failed tool that removes the
        directory that it made does remove LOCK; a process that waited for the lock then notices.
        """
        deadline = time.monotonic() + max(timeout, LOCK_MOMENT)
        asked_until = time.monotonic() + max(timeout, ASKED_SECONDS)
        lock = self.open_file(LOCK, os.O_RDWR | os.O_CREAT)
        try:
            while True:
                if self.lock_file(lock):
                    if self.is_named(lock, LOCK):
                        break
                    lock.close()  # a failed tool has removed the directory that it made
                    lock = self.open_file(LOCK, os.O_RDWR | os.O_CREAT)
                    continue
                # A process that looks up the owner holds the lock only for a moment, or longer if it is stopped just
                # then.
                left = (asked_until if self._is_only_asked_for(lock) else deadline) - time.monotonic()
                if left <= 0:
                    raise self._locked_by(lock)
                time.sleep(min(left, LOCK_PAUSE, max(timeout, LOCK_MOMENT) / 4))
        except BaseException:
            lock.close()  # a call that reported an error may still have taken the lock
            raise
        self._lock = lock
        self._locked_in = os.getpid()
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        content = f"{self._locked_in}\n{since}\n".encode()
        try:
            # Overwrite, then truncate: another process that is refused right now should rarely read an old holder.
            os.pwrite(lock.number, content, 0)
            os.ftruncate(lock.number, len(content))
        # The disk is full. The lock is held all the same: the content is for people, but must not name another process
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(lock.number, 0)
        # If the owner gave other users access to LOCK, which is never replaced, new files get the same permissions.
        self._file_mode |= os.fstat(lock.number).st_mode & 0o666

    def owner(self) -> LockedError | None:
        """Returns the error that another opening would get, which names the owner; None without an owner. For tools.

        This takes a shared lock for a few microseconds, for which a simultaneous opening waits.
        """
        try:
            lock = self.open_file(LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._locked_by(lock)
        finally:
            self.close_file(lock)
        return None

    @staticmethod
    def _is_only_asked_for(lock: Descriptor) -> bool:
        """Returns whether the lock's holders share it: they only look up the owner, and there is none."""
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(lock, fcntl.LOCK_UN)
        return True

    def _locked_by(self, lock: Descriptor) -> LockedError:
        holder = os.pread(lock.number, 100, 0).split(b"\n")
        pid = int(holder[0]) if holder[0].isdigit() else None
        since = holder[1].decode("ascii", "replace") if len(holder) > 1 else None
        return LockedError(self.path, pid, since)

    @staticmethod
    def lock_file(fd: Descriptor, *, wait: bool = False) -> bool:
        """Takes the exclusive lock of a file as long as it is open; returns False if another holder has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def unlock_file(fd: Descriptor) -> None:
        """Releases the lock of an open file, even if a forked child still has the file open."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def exclusive(self) -> ExclusiveBlock:
        """Returns a context manager that excludes other writers of this directory, in this and in other processes.

        Use it only to look at a name and then rename a file, not for longer work, since other writers wait. The lock
        is on the directory itself. On a file system that cannot lock directories, other processes are not excluded. A
        signal handler or a finalizer on a thread that is in such a block gets a ``ReentryError`` instead of waiting
        for itself.
        """
        return ExclusiveBlock(
            self, self._directory, _exclusive, (*NO_DIRECTORY_LOCK, *NO_SUCH_CALL), self._refuse_to_wait)

    def _refuse_to_wait(self) -> ReentryError:
        return ReentryError(f"{self.path}: this thread is putting a snapshot in place already; call again later")

    def leave(self) -> None:
        """Leaves the files to the parent; for a forked child, which may be in the middle of any operation.

        Closes the lock's descriptor without unlocking, which would release the parent's lock. Cleanup in the child then
        removes nothing, and any other access by name is an error.
        """
        self._left = True
        self.close()

    def close(self) -> None:
        """Releases the lock and closes the directory. Idempotent."""
        lock, self._lock = self._lock, None
        try:
            if lock is not None:
                if not self._left and self._locked_in == os.getpid():
                    self.unlock_file(lock)  # closing is not enough while a child process being started has a copy
                lock.close()
        finally:
            self._directory.close()

    # ---- files by name ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Returns the names of all files, sorted.

        Opens the directory each time: on btrfs, an open descriptor shows what existed when it was last rewound.
        """
        fresh = open_at(".", os.O_RDONLY | os.O_DIRECTORY, 0, self._directory)
        try:
            return sorted(os.listdir(fresh.number))
        finally:
            fresh.close()

    def open_file(self, name: str, flags: int = os.O_RDWR) -> Descriptor:
        """Opens a regular file of this directory; a new file gets the permissions of the directory's ``mode``."""
        try:
            fd = self._open_or_create(name, flags)
        except OSError as error:
            found = NO_REGULAR_FILE.get(error.errno or 0)
            if found is not None:
                raise self._no_regular_file(name, found) from None
            raise
        if not stat.S_ISREG(os.fstat(fd.number).st_mode):
            raise self._no_regular_file(name, "another kind of file")
        return fd

    def _no_regular_file(self, name: str, found: str) -> CorruptionError:
        advice = "move it away" if name in MADE_AGAIN else ""
        return CorruptionError(self.path_of(name), None, "a regular file", found, advice)

    def _open_or_create(self, name: str, flags: int) -> Descriptor:
        """Opens a file; with ``O_CREAT``, creates it exclusively, so that it is known which process made it."""
        while not flags & os.O_EXCL:
            try:
                # O_NONBLOCK: if the file is a FIFO, opening must not wait for a writer.
                existing = flags & ~os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                return open_at(name, existing, self._file_mode, self._directory)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
            with contextlib.suppress(FileExistsError):  # another process has just made it
                return self._create(name, flags | os.O_EXCL)
        return self._create(name, flags)

    def _create(self, name: str, flags: int) -> Descriptor:
        fd = open_at(name, flags | os.O_NOFOLLOW, self._file_mode, self._directory)
        if os.fstat(fd.number).st_mode & 0o666 != self._file_mode:  # reduced by the umask
            with contextlib.suppress(PermissionError):  # on a file system with its own permissions
                os.fchmod(fd.number, self._file_mode)
        return fd

    def create_file(self, name: str) -> Descriptor:
        """Makes a new, empty file and returns its descriptor; replaces an existing file of that name."""
        self.unlink(name)
        return self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def close_file(self, fd: Descriptor) -> None:
        fd.close()

    def unlink(self, name: str) -> None:
        """Removes a file; does nothing if there is none."""
        if self._left:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory.number)

    def is_named(self, fd: Descriptor, name: str) -> bool:
        """Returns whether a name currently belongs to this open file."""
        try:
            named = os.stat(name, dir_fd=self._directory.number, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(fd.number), named)

    def read_file(self, name: str, limit: int) -> bytes | None:
        """Returns the first ``limit`` bytes of a small file, or None if it does not exist."""
        try:
            fd = self.open_file(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.pread(fd.number, limit, 0)
        finally:
            self.close_file(fd)

    def replace_file(self, name: str, content: bytes) -> None:
        """Replaces a small file in one atomic step, durable on return."""
        temporary = f"{name}.tmp"
        self.write_file(temporary, content)
        self.rename(temporary, name)
        self.sync_directory()

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a new small file; its content, not its name, is durable on return."""
        fd = self.create_file(name)
        try:
            self.write(fd, content, 0)
            self.sync(fd)
        finally:
            self.close_file(fd)

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target, src_dir_fd=self._directory.number, dst_dir_fd=self._directory.number)

    def sync_directory(self) -> None:
        """Makes names durable: creations, renames, removals."""
        if self._left:
            return
        os.fsync(self._directory)

    # ---- open files -----------------------------------------------------------------------------------

    # Plain C functions, not methods: no signal handler can run between the system call and the caller's next step.
    sync = staticmethod(_sync_data)
    write = staticmethod(descriptors.write_at)
    start_writeback = staticmethod(descriptors.start_writeback)
    pace_writeback = staticmethod(descriptors.pace_writeback)
    truncate = staticmethod(os.ftruncate)

    def write_paced(self, fd: Descriptor, data: Buffer, offset: int) -> int:
        """Writes a piece of a large file, and waits as ``pace_writeback`` does; returns the offset after the piece."""
        stop = offset + memoryview(data).nbytes
        self.write(fd, data, offset)
        self.pace_writeback(fd, offset, stop)
        return stop

    def size(self, fd: Descriptor) -> int:
        return os.fstat(fd.number).st_size

    def stores_are_safe(self, fd: Descriptor) -> bool:
        """Returns whether frames may be stored through the mapping; if not, they are written by pwrite."""
        return mapping.stores_are_safe(fd)

    def allocate(self, fd: Descriptor, old_size: int, new_size: int) -> None:
        """Grows a file, with a block for every byte; if that fails, the file gets its old size back."""
        try:
            if not self._fallocate(fd, old_size, new_size):
                self._write_zeros(fd, old_size, new_size)
        except OSError:
            # On failure, ext4 leaves the file as large as it could make it.
            self.truncate(fd.number, old_size)
            raise

    @staticmethod
    def _fallocate(fd: Descriptor, old_size: int, new_size: int) -> bool:
        """Lets the system allocate the blocks; False if it cannot: on macOS, and on some file systems with musl."""
        if not hasattr(os, "posix_fallocate"):
            return False
        try:
            os.posix_fallocate(fd.number, old_size, new_size - old_size)
        except OSError as error:
            if error.errno not in NO_SUCH_CALL:
                raise
            return False
        return True

    def write_past_cache(self, fd: Descriptor, name: str, start: int, stop: int) -> None:
        """Writes the bytes in [start, stop) of an open file again, to the disk, bypassing the page cache.

        If ext4 fails to write a page to a preallocated block, it still records the block as written: the page may be
        rewritten and synced, yet the block reads as zeros once the cache is dropped. A write that bypasses the cache
        consults the file system's extent map instead. Does nothing if the system does not support such writes.

        Such a write drops the cached pages of its range, including neighbors in the same large page. So each piece
        ends at an offset that no cached page spans, and is read completely before it is written. Meanwhile no other
        thread may append to the file, unless ``stop`` is the end of a piece.
        """
        direct = getattr(os, "O_DIRECT", 0)
        if not direct or start >= stop:
            return
        block = min(os.fstat(fd.number).st_blksize, mmap.PAGESIZE)
        start -= start % block
        with suppress_errors(*NO_SUCH_CALL):
            past = open_at(name, os.O_RDWR | os.O_NOFOLLOW | direct, 0o600, self._directory)
            while start < stop:
                size = min(stop, start - start % PIECE + PIECE) - start
                room = size + -size % block
                with mmap.mmap(-1, room) as buffer:  # pages, which have the alignment that such a write requires
                    if os.preadv(fd.number, [memoryview(buffer)[:size]], start) != size:
                        raise OSError(errno.EIO, "the system read less than the file has")
                    if os.pwrite(past.number, buffer, start) != room:
                        raise OSError(errno.EIO, "the system wrote less than requested")
                start += size
            if start % block:
                self.truncate(fd.number, start)

    def _write_zeros(self, fd: Descriptor, start: int, stop: int) -> None:
        zeros = bytes(1 << 20)
        while start < stop:
            piece = min(len(zeros), stop - start)
            self.write(fd, memoryview(zeros)[:piece], start)
            start += piece


@contextlib.contextmanager
def suppress_errors(*codes: int) -> Iterator[None]:
    """Suppresses OSErrors with these error numbers within the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


_directories = left_by_children(Directory.leave)
_exclusive: set[int] = set()  # threads in a block of `Directory.exclusive`
os.register_at_fork(after_in_child=_exclusive.clear)


def absolute_path(path: str | os.PathLike[str]) -> str:
    """Returns an absolute path, which stays right after a ``chdir``; an empty path is refused, as the system does."""
    text = os.fsdecode(path)
    try:
        if not text:
            os.stat(text)
        return os.path.abspath(text)
    except OSError as error:  # or the current directory is gone
        raise StorageError.wrap(error, text, "opening the directory") from error


def make_directory(path: str | os.PathLike[str], files: type[Directory] = Directory) -> Directory:
    """Opens the directory at ``path``; makes it (0700) and its parents if missing, with durable names on return."""
    path = absolute_path(path)
    missing = []
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for name in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name)
        sync_name(name, made=True)
    directory = files(path)
    # Even if it existed: the process that made it may have died before this sync.
    directory.sync_parent()
    return directory


def sync_name(path: str, *, made: bool = False) -> None:
    """Makes the name of a file or a directory durable; ``made``: this process has just made it."""
    try:
        parent = open_at(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        # A directory that can be searched but not read cannot be synced. If the name is older, its creator was
        # responsible for syncing it; if it is new, syncing everything makes it durable.
        if made:
            os.sync()
        return
    os.fsync(parent)


class storage_errors:
    """Turns a plain OSError of the block into a ``StorageError`` that says what was being done.

    Not a generator: on CPython 3.13, an error that leaves a generator is kept until the next garbage collection,
    together with everything its frames refer to, such as a replaced log and its pages, on a disk that may be full.
    """

    __slots__ = ("action", "path")

    def __init__(self, path: str, action: str) -> None:
        self.path = path
        self.action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError.wrap(error, self.path, self.action) from error

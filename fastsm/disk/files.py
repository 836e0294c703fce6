"""The seam to the system: everything that opens, maps, allocates, syncs or renames goes through here.

A test stands in for the disk by subclassing :class:`Directory`. All names are resolved relative to the
directory's own descriptor and symbolic links are refused, so that nothing outside of it is touched.
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
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from fastsm.disk import mapping
from fastsm.disk.mapping import Descriptor, ExclusiveBlock, open_at
from fastsm.errors import CorruptionError, LockedError, ReentryError, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOCK = "LOCK"
MADE_AGAIN = frozenset({LOCK, "PUBLISHED"})  # by the next opening: nothing is lost with them
LOCK_PAUSE = 0.02  # seconds between two attempts at a lock that another process holds
LOCK_MOMENT = 0.002  # seconds for which it is tried at least
ASKED_SECONDS = 5.0  # seconds for which it is tried while nobody holds it but who asks for the owner
NO_DIRECTORY_LOCK = (errno.EBADF, errno.ENOLCK)  # NFS: its locks need a file that is open for writing
NO_REGULAR_FILE = {errno.ELOOP: "a symbolic link", errno.EISDIR: "a directory", errno.ENXIO: "another kind of file"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # how a full disk, a quota or a limit refuses
NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # how file systems refuse what they cannot do
PIECE = mmap.PAGESIZE << 12  # 16 MiB, mostly: of what is written again, and larger than any page of the cache

Open = TypeVar("Open")
Init = TypeVar("Init", bound=Callable[..., None])


def hides_seam(init: Init) -> Init:
    """Leaves ``_files``, through which tests stand in for the disk, out of the signature that a user is shown."""
    shown = inspect.signature(init)
    parameters = [parameter for name, parameter in shown.parameters.items() if name != "_files"]
    vars(init)["__signature__"] = shown.replace(parameters=parameters)
    return init


def left_by_children(leave: Callable[[Open], object], *, go_on: bool = False) -> weakref.WeakSet[Open]:
    """A set for what is open; in a forked child, whose copies are the parent's to end, each is given to ``leave``.

    ``go_on``: they work on in the child, and so in children of its own, to which the same is done.
    """
    opened: weakref.WeakSet[Open] = weakref.WeakSet()

    def leave_all() -> None:
        errors = []
        for one in list(opened):
            try:
                leave(one)
            except Exception as error:  # the others have to be left all the same
                errors.append(error)
        if not go_on:
            opened.clear()
        if errors:
            raise errors[0]

    os.register_at_fork(after_in_child=leave_all)
    return opened


if sys.platform == "darwin":

    def _sync_data(fd: Descriptor) -> None:
        # fsync on macOS leaves the data in the drive's own cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

else:
    _sync_data = os.fdatasync


class Directory:
    """One state directory, held open, and the only way to its files.

    Methods raise plain :class:`OSError`; callers add what they were doing (``StorageError.wrap``).
    Thread safety: all of it, from any thread; a method that waits for the disk releases the GIL.
    """

    unfinished = False  # a tool fills this directory: see fastsm.generation.unfinished

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True, mode: int = 0o700) -> None:
        """Opens the directory at ``path``; ``create`` makes it, with the permissions of ``mode``, when it is missing.

        Files are created with the permissions of ``mode`` too, without those to execute, whatever the umask says.
        """
        self.path = os.fsdecode(path)
        self._lock: Descriptor | None = None
        self._locked_in = 0  # the process that has taken the lock
        self._left = False
        self._file_mode = mode & 0o666
        self._made = create and self._make(mode)
        self._directory = open_at(self.path, os.O_RDONLY | os.O_DIRECTORY)
        _directories.add(self)

    def __repr__(self) -> str:
        return f"<Directory {self.path!r}{', locked' if self.locked else ''}>"

    def _make(self, mode: int) -> bool:
        """Makes the directory when it is missing; returns whether it was."""
        try:
            os.mkdir(self.path, mode & 0o777)
        except FileExistsError:
            return False
        if stat.S_IMODE(os.stat(self.path).st_mode) & 0o777 != mode & 0o777:  # the umask took some of it away
            os.chmod(self.path, mode)
        return True

    def sync_parent(self) -> None:
        """Makes this directory's own name durable."""
        sync_name(os.path.abspath(self.path), made=self._made)

    def path_of(self, name: str) -> str:
        """The full path of a file, for messages."""
        return os.path.join(self.path, name)

    # ---- lock ----------------------------------------------------------------------------------------

    @property
    def locked(self) -> bool:
        return self._lock is not None

    def lock(self, timeout: float = 0) -> None:
        """Takes the exclusive lock, or raises ``LockedError`` with the holder's process id after ``timeout`` seconds.

        flock, not lockf: it excludes a second opening by this very process, too. The file is not unlinked, since two
        processes could then lock two files of one name; where a tool that failed removes the directory that it made,
        LOCK goes too, and a process that waited for it notices.
        """
        deadline = time.monotonic() + max(timeout, LOCK_MOMENT)
        asked_until = time.monotonic() + max(timeout, ASKED_SECONDS)
        lock = self.open_file(LOCK, os.O_RDWR | os.O_CREAT)
        try:
            while True:
                if self.lock_file(lock):
                    if self.is_named(lock, LOCK):
                        break
                    lock.close()  # a tool has removed what it made, LOCK too
                    lock = self.open_file(LOCK, os.O_RDWR | os.O_CREAT)
                    continue
                # A process that asks who the owner is has the lock for a moment, longer if it is stopped just then.
                left = (asked_until if self._is_only_asked_for(lock) else deadline) - time.monotonic()
                if left <= 0:
                    raise self._locked_by(lock)
                time.sleep(min(left, LOCK_PAUSE, max(timeout, LOCK_MOMENT) / 4))
        except BaseException:
            lock.close()  # the lock may have been taken all the same, by a call that then reported an error
            raise
        self._lock = lock
        self._locked_in = os.getpid()
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        content = f"{self._locked_in}\n{since}\n".encode()
        try:
            # In place first: a process that is refused at this moment is seldom told of the holder before.
            os.pwrite(lock.number, content, 0)
            os.ftruncate(lock.number, len(content))
        except OSError:  # a full disk: flock is the lock, the content only informs, and must not name another process
            with contextlib.suppress(OSError):
                os.ftruncate(lock.number, 0)
        # An owner who gave others access to LOCK, which is never replaced, wants them to have it to later files too.
        self._file_mode |= os.fstat(lock.number).st_mode & 0o666

    def owner(self) -> LockedError | None:
        """Who has the directory open, as the error that they would be told; None when nobody has. For tools.

        Asking takes the lock for some microseconds, shared, for which an opening at that very moment waits.
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
        """Whether those who hold the lock share it: they ask who the owner is, and there is none."""
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
        """Takes the exclusive lock of an open file, for as long as it is open; False when another holds it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def unlock_file(fd: Descriptor) -> None:
        """Gives the lock of an open file back, also where a forked child still has the file open."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def exclusive(self) -> ExclusiveBlock:
        """A block that no other writer of this directory runs at the same time, here or in another process.

        For a look at a name and the rename that depends on it: no more, since others wait for it. The lock is on the
        directory itself. A file system that cannot lock directories leaves the block unprotected against other
        processes. A signal handler or a finalizer that comes while its own thread is in such a block must not wait
        for itself: ``ReentryError``.
        """
        return ExclusiveBlock(
            self, self._directory, _exclusive, (*NO_DIRECTORY_LOCK, *NO_SUCH_CALL), self._refuse_to_wait)

    def _refuse_to_wait(self) -> ReentryError:
        return ReentryError(f"{self.path}: this thread is putting a snapshot in place already; call again later")

    def leave(self) -> None:
        """In a forked child, which may be in the middle of anything: the files are the parent's from here on.

        The lock's descriptor is closed, but not unlocked, which would free the parent's. What a child that ends would
        clean up after it stays; anything else by name is an error.
        """
        self._left = True
        self.close()

    def close(self) -> None:
        """Gives lock and directory back. Idempotent."""
        lock, self._lock = self._lock, None
        try:
            if lock is not None:
                if not self._left and self._locked_in == os.getpid():
                    self.unlock_file(lock)  # closing is not enough while a child that is being started has a copy
                lock.close()
        finally:
            self._directory.close()

    # ---- files by name ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of all files, sorted.

        A descriptor that stays open shows on btrfs what was there when it was last rewound: each look has its own.
        """
        fresh = open_at(".", os.O_RDONLY | os.O_DIRECTORY, 0, self._directory)
        try:
            return sorted(os.listdir(fresh.number))
        finally:
            fresh.close()

    def open_file(self, name: str, flags: int = os.O_RDWR) -> Descriptor:
        """A descriptor of a regular file of this directory; a file that is created has the directory's ``mode``."""
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
        """Opens a file; one that ``O_CREAT`` asks for is made exclusively, so that it is known who made it."""
        while not flags & os.O_EXCL:
            try:
                # O_NONBLOCK: opening a FIFO that somebody put here must not wait for its writer.
                existing = flags & ~os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                return open_at(name, existing, self._file_mode, self._directory)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
            with contextlib.suppress(FileExistsError):  # another process made it meanwhile
                return self._create(name, flags | os.O_EXCL)
        return self._create(name, flags)

    def _create(self, name: str, flags: int) -> Descriptor:
        fd = open_at(name, flags | os.O_NOFOLLOW, self._file_mode, self._directory)
        if os.fstat(fd.number).st_mode & 0o666 != self._file_mode:  # the umask took some of it away
            with contextlib.suppress(PermissionError):  # a file system whose permissions are its own affair
                os.fchmod(fd.number, self._file_mode)
        return fd

    def create_file(self, name: str) -> Descriptor:
        """A descriptor of a new, empty file; what had the name before is replaced."""
        self.unlink(name)
        return self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def close_file(self, fd: Descriptor) -> None:
        fd.close()

    def unlink(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        if self._left:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory.number)

    def is_named(self, fd: Descriptor, name: str) -> bool:
        """Whether the open file is the one that has this name now."""
        try:
            named = os.stat(name, dir_fd=self._directory.number, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(fd.number), named)

    def read_file(self, name: str, limit: int) -> bytes | None:
        """The first ``limit`` bytes of a small file, or None when there is none."""
        try:
            fd = self.open_file(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.pread(fd.number, limit, 0)
        finally:
            self.close_file(fd)

    def replace_file(self, name: str, content: bytes) -> None:
        """Puts a small file in place whole, in one atomic step that is durable on return."""
        temporary = f"{name}.tmp"
        self.write_file(temporary, content)
        self.rename(temporary, name)
        self.sync_directory()

    def write_file(self, name: str, content: bytes) -> None:
        """A new small file; durable on return but for its name."""
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

    # Plain C functions, not methods: a signal's handler cannot run between the system's answer and the
    # caller's note of it.
    sync = staticmethod(_sync_data)
    write = staticmethod(mapping.write_at)
    start_writeback = staticmethod(mapping.start_writeback)
    pace_writeback = staticmethod(mapping.pace_writeback)
    truncate = staticmethod(os.ftruncate)

    def write_paced(self, fd: Descriptor, data: Buffer, offset: int) -> int:
        """Writes a piece of a large file, and gives it to the disk at its pace; returns the offset after it."""
        stop = offset + memoryview(data).nbytes
        self.write(fd, data, offset)
        self.pace_writeback(fd, offset, stop)
        return stop

    def size(self, fd: Descriptor) -> int:
        return os.fstat(fd.number).st_size

    def stores_are_safe(self, fd: Descriptor) -> bool:
        """Whether frames may be stored through the mapping; else they are written with pwrite."""
        return mapping.stores_are_safe(fd)

    def allocate(self, fd: Descriptor, old_size: int, new_size: int) -> None:
        """Grows a file with a block for every byte; when that fails, it has its old size again."""
        try:
            if not self._fallocate(fd, old_size, new_size):
                self._write_zeros(fd, old_size, new_size)
        except OSError:
            # ext4 leaves the file grown by what it could get.
            self.truncate(fd.number, old_size)
            raise

    @staticmethod
    def _fallocate(fd: Descriptor, old_size: int, new_size: int) -> bool:
        """Has the system allocate the blocks; False where it cannot: macOS, and file systems on which musl refuses."""
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
        """Writes what an open file holds in [start, stop) again, to the disk and not into the page cache.

        ext4, when it could not write a page to a block that was allocated ahead, goes on as if that block had been
        written once: the page may be written again and synced, and yet the block reads as zeros when the cache is gone.
        A write past the cache is asked from its books. Where the system knows no such writes, nothing is done.

        Such a write drops what the cache held there, and whatever lies in one large page with it: so pieces end where
        no page of the cache goes beyond, and a piece is read as a whole before it is written. Nobody appends to the
        file meanwhile, unless ``stop`` is the end of a piece.
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
                with mmap.mmap(-1, room) as buffer:  # pages: as aligned as such a write asks for
                    if os.preadv(fd.number, [memoryview(buffer)[:size]], start) != size:
                        raise OSError(errno.EIO, "the system read less than there is")
                    if os.pwrite(past.number, buffer, start) != room:
                        raise OSError(errno.EIO, "the system wrote less than it was given")
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
    """The block, in which these answers of the system are no error."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


_directories = left_by_children(Directory.leave)
_exclusive: set[int] = set()  # the threads that are in a block of `Directory.exclusive`
os.register_at_fork(after_in_child=_exclusive.clear)


def make_directory(path: str | os.PathLike[str], files: type[Directory] = Directory) -> Directory:
    """The directory at ``path``, made when it is missing (0700), its parents too; all names durable on return."""
    path = os.path.abspath(os.fsdecode(path))
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
    # Also when it was there: who made it may have died before this.
    directory.sync_parent()
    return directory


def sync_name(path: str, *, made: bool = False) -> None:
    """Makes the name of a file or a directory durable; ``made`` says that this process has just made it."""
    try:
        parent = open_at(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        # A directory that may be searched but not read cannot be synced by itself. What was there before, its
        # owner has made; what is new, a sync of everything makes durable.
        if made:
            os.sync()
        return
    os.fsync(parent)


class storage_errors:
    """Turns a plain OSError of the block into a ``StorageError`` that says what was being done.

    No generator: on CPython 3.13 an error that leaves one keeps itself until the collector comes, and with it all that
    its frames hold: a log that was replaced, its pages, their room on a full disk.
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

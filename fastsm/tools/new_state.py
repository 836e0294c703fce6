"""Making a state completely or not at all: for tools that make one from something else."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from fastsm.disk.files import LOCK, Directory, absolute_path, make_directory, storage_errors
from fastsm.disk.published import NAME as PUBLISHED
from fastsm.errors import FastsmError
from fastsm.generation.names import CURRENT, NAMES
from fastsm.generation.unfinished import UNFINISHED, is_unfinished, mark_finished, mark_unfinished, remove_unfinished
from fastsm.machine import FastStateMachine

NOT_OURS_BUT_FINE = "lost+found"  # in the root of an ext4 volume


class UnfinishedDirectory(Directory):
    """A directory that counts as empty until :func:`mark_finished`."""

    unfinished = True

    def lock(self, timeout: float = 0) -> None:
        super().lock(timeout)
        require_empty(self)
        remove_unfinished(self)
        mark_unfinished(self)


@contextlib.contextmanager
def new_state(path: str | os.PathLike[str], **options: Any) -> Iterator[FastStateMachine]:
    """Yields a state machine to fill; it becomes the state at ``path``, and is closed, once the block has succeeded.

    ``path`` may be missing (with its parents), or an empty directory, even the root of a mounted volume with its
    ``lost+found``. Anything else is a ``StorageError``, and nothing is changed. If the block fails, what was made is
    removed; if the process is killed, the next opening of the directory, or the next call of this function, removes it.
    """
    path = absolute_path(path)
    with storage_errors(path, "making a new state"):
        made = not os.path.lexists(path)
        if made:
            make_directory(os.path.dirname(path)).close()
        else:
            directory = Directory(path, create=False)
            try:
                require_empty(directory)
            finally:
                directory.close()
    machine = None
    try:
        machine = FastStateMachine(path, _files=UnfinishedDirectory, **options)
        yield machine
        machine.save_hard_state()
        with storage_errors(path, "making a new state"):
            mark_finished(machine._directory)
    except BaseException:
        # The original error is more informative than one of these; the next opening removes what is left.
        with contextlib.suppress(FastsmError, OSError):
            if machine is not None:
                machine.close()
        with contextlib.suppress(FastsmError, OSError):
            remove(path, made)
        raise
    machine.close()


def require_empty(directory: Directory) -> None:
    """Raises OSError if there is anything except `lost+found` and what a killed tool left."""
    names = set(directory.names()) - {NOT_OURS_BUT_FINE, LOCK, PUBLISHED}
    if is_unfinished(directory):
        names = {name for name in names - {CURRENT, UNFINISHED} if not NAMES.fullmatch(name)}
    if names:
        raise OSError(errno.ENOTEMPTY, f"not empty: it has {min(names)!r}; name a new or an empty directory")


def remove(path: str, made: bool) -> None:
    """Removes unfinished files at a path, and the directory if it was made by this tool."""
    directory = Directory(path, create=False)
    try:
        directory.lock()
        remove_unfinished(directory)
        if made:
            directory.unlink(PUBLISHED)
            directory.unlink(LOCK)
            os.rmdir(path)
    finally:
        directory.close()

"""A directory that is there whole or not at all: for tools that make a state from something else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator

from fastsm.disk.files import make_directory, storage_errors, sync_name


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[str]:
    """A directory to fill, which becomes ``path`` when the block ends well, and is removed when it does not.

    ``path`` may be an empty directory; one that is not is a ``StorageError``.
    """
    path = os.path.abspath(os.fsdecode(path))
    with storage_errors(path, "making a new directory"):
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise OSError(errno.ENOTEMPTY, "it is there already; name a new directory")
        make_directory(os.path.dirname(path)).close()
        unfinished = tempfile.mkdtemp(prefix=f"{os.path.basename(path)}.unfinished-", dir=os.path.dirname(path))
    try:
        yield unfinished
        with storage_errors(path, "making a new directory"):
            os.rename(unfinished, path)
            sync_name(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise

"""A directory that a tool fills: it counts as empty until it is whole.

A tool that makes a state from something else (a snapshot, a dump) works in the directory itself, so that this may be
the root of a mounted volume. Before anything else it writes ``UNFINISHED``, and in the end it removes that file.
An opening after the tool was killed finds the file, removes what is there, and has an empty directory.
"""

from __future__ import annotations

import logging

from fastsm.disk.files import Directory
from fastsm.errors import CorruptionError
from fastsm.generation.names import CURRENT, own_names

UNFINISHED = "UNFINISHED"
MARK = b"FASTSM-U: a restore or a load is under way here, or was killed. What is here counts as nothing.\n"

logger = logging.getLogger("fastsm")


def mark_unfinished(directory: Directory) -> None:
    """Makes it so that what is written from now on counts as nothing; durable on return. Raises OSError."""
    directory.write_file(UNFINISHED, MARK)
    directory.sync_directory()


def mark_finished(directory: Directory) -> None:
    """Makes what was written, and is durable, the directory's state; durable on return. Raises OSError."""
    directory.unlink(UNFINISHED)
    directory.sync_directory()


def is_unfinished(directory: Directory) -> bool:
    """Return whether what is in a directory counts as nothing. Raises OSError."""
    try:
        return directory.read_file(UNFINISHED, len(MARK) + 1) == MARK
    except CorruptionError:  # no regular file, so it is not ours
        return False


def remove_unfinished(directory: Directory) -> None:
    """Removes what a tool that was killed left in a locked directory. Raises OSError."""
    if not is_unfinished(directory):
        return
    directory.unlink(CURRENT)
    directory.sync_directory()  # the mark goes last: whatever is left until then still counts as nothing
    for name in list(own_names(directory)):
        directory.unlink(name)
    mark_finished(directory)
    logger.warning("%s: removed what a restore or a load left that did not come to its end", directory.path)

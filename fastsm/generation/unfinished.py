"""A directory that a tool is filling: it counts as empty until it is complete.

A tool that makes a state from something else (a snapshot, a dump) works in the final directory, which may be the root
of a mounted volume. It first writes ``UNFINISHED``, and removes that file at the end. If the tool is killed, the next
opening finds the file, removes everything that was written, and sees an empty directory.
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
    """Makes the directory count as empty, whatever is written from now on; durable on return. Raises OSError."""
    directory.write_file(UNFINISHED, MARK)
    directory.sync_directory()


def mark_finished(directory: Directory) -> None:
    """Makes what was written, and is durable, the directory's state; durable on return. Raises OSError."""
    directory.unlink(UNFINISHED)
    directory.sync_directory()


def is_unfinished(directory: Directory) -> bool:
    """Returns whether a directory counts as empty because it is unfinished. Raises OSError."""
    try:
        return directory.read_file(UNFINISHED, len(MARK) + 1) == MARK
    except CorruptionError:  # not a regular file, so not made by us
        return False


def remove_unfinished(directory: Directory) -> None:
    """Removes what a killed tool has left in a locked directory. Raises OSError."""
    if not is_unfinished(directory):
        return
    directory.unlink(CURRENT)
    directory.sync_directory()  # the mark goes last: as long as it exists, all other files count as nothing
    for name in list(own_names(directory)):
        directory.unlink(name)
    mark_finished(directory)
    logger.warning("%s: removed the files of a restore or a load that did not finish", directory.path)

"""The file names in a state's directory, and which files of these names this library made."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from fastsm.disk.files import Directory, storage_errors
from fastsm.errors import CorruptionError

CURRENT = "CURRENT"
NAMES = re.compile(r"(?:log|base|table)-([1-9][0-9]{0,18})(?:\.tmp)?|CURRENT(?:-([1-9][0-9]{0,18}))?\.tmp")
NEWEST = "NEWEST"
# Segments of a Raft log (and NEWEST), which has a directory of its own
LOG_NAMES = re.compile(r"journal-([1-9][0-9]*)")
MAGIC = b"FASTSM-"  # the common start of all magics; the next byte tells the kinds of files apart
LOOKED_AT = 96  # bytes at the start of a file; they may all be zero in an unfinished file


def number_of(name: str) -> int | None:
    """Returns the generation in a file's name; None if the name has none."""
    found = NAMES.fullmatch(name)
    number = found and (found[1] or found[2])
    return int(number) if number else None


def is_own(directory: Directory, name: str) -> bool:
    """Returns whether this library made a file: it is empty, or starts with zeros or with one of our magics.

    Other files that happen to have such a name are left alone, whatever their type. Raises OSError if the file cannot
    be read: a state whose CURRENT is lost must not be taken for a new directory.
    """
    try:
        start = directory.read_file(name, LOOKED_AT)
    except CorruptionError:  # a symbolic link, a directory, a FIFO
        return False
    return start is not None and (not start.strip(b"\0") or start.startswith(MAGIC))


def own_names(directory: Directory, generation: int | None = None) -> Iterator[str]:
    """Yields the names of all files of generations, or of one generation, that this library made."""
    for name in directory.names():
        if NAMES.fullmatch(name) and (generation is None or number_of(name) == generation) and is_own(directory, name):
            yield name


def holds_state(directory: Directory) -> bool:
    """Returns whether a directory has files of a state machine. Raises OSError if they cannot be read."""
    return is_own(directory, CURRENT) or any(True for _ in own_names(directory))


def holds_raft_log(directory: Directory) -> bool:
    """Returns whether a directory has files of a Raft log. Raises OSError if they cannot be read."""
    return any(
        (name == NEWEST or LOG_NAMES.fullmatch(name)) and is_own(directory, name) for name in directory.names())


def free_generations(directory: Directory, first: int) -> Iterator[int]:
    """Yields numbers from ``first`` on that no file's name has at that time, so no file is replaced. Thread safe."""

    def is_free(number: int) -> bool:
        with storage_errors(directory.path, "listing"):
            return all(number_of(name) != number for name in directory.names())

    return filter(is_free, itertools.count(first))

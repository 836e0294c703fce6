"""The names in a state's directory, and which of the files with these names this library made."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from fastsm.disk.files import Directory, storage_errors
from fastsm.errors import CorruptionError

CURRENT = "CURRENT"
NAMES = re.compile(r"(?:log|base|table)-([1-9][0-9]{0,18})(?:\.tmp)?|CURRENT(?:-([1-9][0-9]{0,18}))?\.tmp")
NEWEST = "NEWEST"
LOG_NAMES = re.compile(r"journal-([1-9][0-9]*)")  # of a Raft log, which has a directory of its own, with NEWEST
MAGIC = b"FASTSM-"  # of all files; which of them it is, the next byte says
LOOKED_AT = 96  # bytes at the start; of a file that was being made they may all be zero


def number_of(name: str) -> int | None:
    """Return the generation in a file's name; None when it is another name, or names no generation."""
    found = NAMES.fullmatch(name)
    number = found and (found[1] or found[2])
    return int(number) if number else None


def is_own(directory: Directory, name: str) -> bool:
    """Return whether this library made a file: it is empty, starts with zeros, or with a magic of ours.

    What somebody else made, and what merely has such a name, is left alone, whatever kind of file it is. Raises OSError
    when it cannot be read: a state whose CURRENT is lost must not be taken for a new directory.
    """
    try:
        start = directory.read_file(name, LOOKED_AT)
    except CorruptionError:  # a symbolic link, a directory, a FIFO
        return False
    return start is not None and (not start.strip(b"\0") or start.startswith(MAGIC))


def own_names(directory: Directory, generation: int | None = None) -> Iterator[str]:
    """The names of all files of generations, or of one, that this library made."""
    for name in directory.names():
        if NAMES.fullmatch(name) and (generation is None or number_of(name) == generation) and is_own(directory, name):
            yield name


def holds_state(directory: Directory) -> bool:
    """Return whether files of a state machine are in a directory. Raises OSError when they cannot be read."""
    return is_own(directory, CURRENT) or any(True for _ in own_names(directory))


def holds_raft_log(directory: Directory) -> bool:
    """Return whether files of a Raft log are in a directory. Raises OSError when they cannot be read."""
    return any(
        (name == NEWEST or LOG_NAMES.fullmatch(name)) and is_own(directory, name) for name in directory.names())


def free_generations(directory: Directory, first: int) -> Iterator[int]:
    """Numbers from ``first`` on, in no file's name when they are taken: nobody's file is replaced. Thread safe."""

    def is_free(number: int) -> bool:
        with storage_errors(directory.path, "listing"):
            return all(number_of(name) != number for name in directory.names())

    return filter(is_free, itertools.count(first))

"""The input of ``fastsm demo``: a folder's files, their history as Raft entries, a model of the state."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from blake3 import blake3

from fastsm.command import batch, compare_and_swap, config, decode, delete, noop, put
from fastsm.types import Batch, CompareAndSwap, Config, Delete, Entry, LogId, Noop, Put

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
EDITED_BYTES = 16 * 1024  # an edited file keeps at most this much of its content
SMALL_BYTES = 64 * 1024  # a value that a command may contain twice
EDITING_TERMS = 6

# ---- the files ---------------------------------------------------------------------------------------


def standard_library() -> str:
    """Returns the folder of the running Python's standard library."""
    return sysconfig.get_paths()["stdlib"]


def file_names(source: str) -> list[bytes]:
    """Returns the regular, readable files below a folder: sorted relative paths, no caches, no installed packages."""
    names: list[bytes] = []
    folders = [source]
    while folders:
        with os.scandir(folders.pop()) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    if item.name not in SKIPPED_FOLDERS:
                        folders.append(item.path)
                elif item.is_file(follow_symlinks=False) and os.access(item.path, os.R_OK):
                    names.append(os.fsencode(os.path.relpath(item.path, source)))
    return sorted(names)


def read_file(source: str, name: bytes) -> bytes:
    with open(os.path.join(os.fsencode(source), name), "rb") as file:
        return file.read()


def digest(files: Mapping[bytes, bytes]) -> str:
    """Returns a checksum of names and contents, which shows whether two processes read the same files."""
    hasher = blake3()
    for name, content in files.items():
        hasher.update(b"%d %d " % (len(name), len(content)) + name)
        hasher.update(content)
    return hasher.hexdigest()


# ---- the history -------------------------------------------------------------------------------------


class Leader:
    """Proposes commands on the files, and keeps the state that they lead to."""

    def __init__(self, files: Mapping[bytes, bytes], draw: random.Random) -> None:
        self.files = files
        self.names = sorted(files)
        self.draw = draw
        self.state: dict[bytes, bytes] = {}

    def load(self) -> Iterator[bytes]:
        """Yields every file once, in random order: as a put, a compare-and-swap of nothing, or several in a batch."""
        yield config(b'{"voters": ["a", "b", "c"]}')
        names = self.draw.sample(self.names, len(self.names))
        while names:
            how = self.draw.random()
            if how < 0.1:
                yield batch([self.set(names.pop(), None) for _ in range(min(len(names), 5))])
            elif how < 0.2:
                yield self.swap(names[-1], None, self.files[names.pop()])
            else:
                yield self.set(names.pop(), None)

    def edit(self) -> Iterator[bytes]:
        """Yields overwrites, deletes, renames, swaps that match and swaps that do not; some files are put back."""
        for _ in range(len(self.names) * 6 // 5):
            name = self.draw.choice(self.names)
            value = self.state.get(name)
            small = value is not None and len(value) <= SMALL_BYTES
            how = self.draw.random()
            if how < 0.14:
                yield self.set(name, None)
            elif how < 0.24:
                yield self.remove(name)
            elif how < 0.34:
                yield self.swap(name, self.wrong(name), self.files[name][:EDITED_BYTES])
            elif how < 0.39:
                refused = compare_and_swap(name, self.wrong(name), None)
                yield batch([delete(self.draw.choice(self.names)), put(name, b"never seen"), refused])
            elif how < 0.49:
                others = {self.draw.choice(self.names): None for _ in range(4)}
                yield batch([self.set(other, self.edited(other)) for other in others])
            elif how < 0.54 and small and value is not None:
                yield batch([self.remove(name), self.set(name + b"~", value)])
            elif how < 0.7 and small:
                yield self.swap(name, value, None if how < 0.57 else self.edited(name))
            else:
                yield self.set(name, self.edited(name))

    def put_back(self) -> Iterator[bytes]:
        """Yields the shortest way from the present state back to the files."""
        yield config(b'{"voters": ["a", "b", "d"]}')
        for name in sorted(self.state.keys() | self.files.keys()):
            value = self.state.get(name)
            if name not in self.files:
                yield self.remove(name)
            elif value != self.files[name]:
                small = value is None or len(value) <= SMALL_BYTES
                if small and self.draw.random() < 0.3:
                    yield self.swap(name, value, self.files[name])
                else:
                    yield self.set(name, None)

    def edited(self, name: bytes) -> bytes:
        """Returns the file, cut at a random place, with a line added."""
        content = self.files[name]
        cut = self.draw.randrange(min(len(content), EDITED_BYTES) + 1)
        return content[:cut] + b"\n# edit %08x\n" % self.draw.getrandbits(32)

    def wrong(self, name: bytes) -> bytes | None:
        """Returns an expectation that does not match."""
        guess = self.edited(name)
        return None if name in self.state and self.state[name] == guess else guess

    def set(self, name: bytes, value: bytes | None) -> bytes:
        """Returns a put; None stands for the file's own content."""
        self.state[name] = self.files[name] if value is None else value
        return put(name, self.state[name])

    def remove(self, name: bytes) -> bytes:
        self.state.pop(name, None)
        return delete(name)

    def swap(self, name: bytes, expected: bytes | None, value: bytes | None) -> bytes:
        if self.state.get(name) == expected:
            assign(self.state, name, value)
        return compare_and_swap(name, expected, value)


def history(files: Mapping[bytes, bytes], seed: int) -> Iterator[Entry]:
    """Yields entries of several terms that leave each key with its file's content: a function of files and seed."""
    draw = random.Random(seed)
    leader = Leader(files, draw)
    terms = [leader.load, *[leader.edit] * EDITING_TERMS, leader.put_back]
    index = term = 0
    for commands in terms:
        term += draw.randint(1, 3)  # some elections have no winner
        index += 1
        yield Entry(index, term, noop())
        for command in commands():
            index += 1
            yield Entry(index, term, command)


def chunks(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    iterator = iter(entries)
    while chunk := list(islice(iterator, size)):
        yield chunk


# ---- the model ---------------------------------------------------------------------------------------


def replay(values: dict[bytes, bytes], command: object) -> bool:
    """Applies a decoded command to the values; returns its result. In plain Python on a dict."""
    match command:
        case Put(key, value):
            values[key] = value
        case Delete(key):
            values.pop(key, None)
        case CompareAndSwap(key, expected, new):
            if values.get(key) != expected:
                return False
            assign(values, key, new)
        case Batch(members):
            before = {m.key: values.get(m.key) for m in members if isinstance(m, (Put, Delete, CompareAndSwap))}
            if not all(replay(values, member) for member in members):
                for key, old in before.items():
                    assign(values, key, old)
                return False
        case Noop() | Config():
            pass
        case _:
            raise TypeError(f"not a decoded command: {command!r}")
    return True


def assign(values: dict[bytes, bytes], key: bytes, value: bytes | None) -> None:
    """Sets a key, or removes it for None."""
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value


@dataclass(slots=True)
class Model:
    """The state that a sequence of entries must lead to."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    applied: LogId = field(default_factory=LogId)
    membership: tuple[LogId, bytes] | None = None

    def apply(self, entry: Entry) -> bool:
        command = decode(entry.command)
        self.applied = LogId(entry.index, entry.term)
        if isinstance(command, Config):
            self.membership = (self.applied, command.data)
        return replay(self.values, command)

"""A disk that loses power: which parts of a directory survive for certain, and which states may be left.

A `Platter` implements the seam to the system (``FastStateMachine(..., _files=platter.files)``) for the first directory
that is opened and those in it. Names are synced directory by directory, and losses in one directory are independent of
losses in another. The files are real; the platter records which content and which names were synced. Before and after
every call that changes something it takes a `Point`, from which crash states are drawn: pages are old or new, or torn;
sizes and names that were not synced may be old or new.

The model assumes that a disk keeps what a successful sync covered, that sectors of 512 bytes are not torn, and that a
rename happens or does not. It assumes no order among changes that were not synced.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsm.disk.files import LOCK, Directory

PAGE = 4096
SECTOR = 512


class Image(NamedTuple):
    """The content of a file at one moment, without the zeros at its end."""

    content: bytes
    size: int

    def page(self, number: int) -> bytes:
        return self.content[number * PAGE : (number + 1) * PAGE].ljust(PAGE, b"\0")

    @property
    def pages(self) -> int:
        return -(-len(self.content) // PAGE)


NOTHING = Image(b"", 0)


def read_image(fd: int) -> Image:
    """Read what a file holds now, including stores through its mappings."""
    size = os.fstat(fd).st_size
    content = os.pread(fd, size, 0)
    words = np.flatnonzero(np.frombuffer(content, np.uint64, size // 8))
    used = int(words[-1] + 1) * 8 if len(words) else 0
    if size % 8 and any(content[size & ~7 :]):
        used = size
    return Image(content[:used], size)


class File:
    """One file, under any names: the content that the disk certainly holds, and contents that it may hold."""

    def __init__(self, fd: int, kept: Image = NOTHING) -> None:
        self.fd = fd
        self.kept = kept
        self.versions: list[Image] = []  # seen since the last sync; any page of any version may be on the disk
        # Pages that a failed sync left clean in the cache: not on the disk until they are written again.
        self.lost: dict[int, bytes] = {}
        self.live = kept
        self.syncs = 0

    def look(self) -> Image:
        """Record what the file holds now."""
        if self.fd >= 0:
            live = read_image(self.fd)
            if live != self.live:
                self.versions.append(live)
                self.live = live
        return self.live

    def keep(self, image: Image) -> None:
        """Record that a sync covered the image, except for pages that an earlier, failed sync marked clean."""
        still_lost = {n: page for n, page in self.lost.items() if n < image.pages and image.page(n) == page}
        content = bytearray(image.content)
        for number in still_lost:
            content[number * PAGE : (number + 1) * PAGE] = self.kept.page(number)
        self.kept = Image(bytes(content[: image.size]), image.size)
        self.lost = still_lost
        self.syncs += 1
        self.versions = [image] if self.live != image or still_lost else []

    def lose(self) -> None:
        """Record that a sync failed: dirty pages are marked clean. (Pages cut by a truncation do not matter.)"""
        live = self.look()
        for number in range(live.pages):
            if live.page(number) != self.kept.page(number):
                self.lost[number] = live.page(number)

    def written(self, offset: int, size: int) -> None:
        """Record that pages were written: they are part of the next sync, even if their bytes are unchanged."""
        for number in range(offset // PAGE, -(-(offset + size) // PAGE)):
            self.lost.pop(number, None)

    def state(self) -> FileState:
        return FileState(self.kept, (*self.versions, self.look()), dict(self.lost))


class Choice(NamedTuple):
    """A drawn file. A hole is a lost page before a kept one."""

    image: Image
    hole: bool = False
    torn: bool = False


class FileState:
    """A file at a `Point`: the content that is certainly on the disk, and all contents since."""

    def __init__(self, kept: Image, versions: tuple[Image, ...], lost: dict[int, bytes]) -> None:
        self.kept = kept
        self.versions = versions
        self.lost = lost

    @property
    def live(self) -> Image:
        return self.versions[-1]

    @cached_property
    def changed(self) -> list[int]:
        """The pages that a power loss may or may not keep."""
        images = {id(image): image for image in self.versions}.values()
        pages = max(image.pages for image in (self.kept, *images))
        return [n for n in range(pages) if any(image.page(n) != self.kept.page(n) for image in images)]

    @cached_property
    def sizes(self) -> list[int]:
        """The sizes that the file had, and page ends between the least and the greatest."""
        had = {self.kept.size, *(image.size for image in self.versions)}
        least, greatest = min(had), max(had)
        used = max(len(image.content) for image in (self.kept, *self.versions))
        stop = min(greatest, used + 2 * PAGE)
        return sorted(had | set(range(-(-least // PAGE) * PAGE, stop, PAGE)) - {0} | {least})

    def draw(self, rng: random.Random) -> Choice:
        """Draw a state that a power loss may leave of the file."""
        size = rng.choice((self.live.size, self.live.size, self.live.size, self.kept.size, rng.choice(self.sizes)))
        if not self.changed:
            return Choice(Image(self.kept.content[:size], size))
        pages = self._draw_pages(rng)
        torn = False
        if rng.random() < 0.4:
            torn = True
            some = self.changed if rng.random() < 0.1 else rng.sample(self.changed, 1)
            for number in some:
                pages[number] = self._tear(number, rng)
        content = bytearray(self.kept.content.ljust((self.changed[-1] + 1) * PAGE, b"\0"))
        lost = hole = False
        for number in self.changed:
            old = self.kept.page(number)
            if pages[number] == old:
                lost |= self.live.page(number) != old
            elif (number + 1) * PAGE <= size:
                hole |= lost
            content[number * PAGE : (number + 1) * PAGE] = pages[number]
        used = min(size, len(content))
        return Choice(Image(bytes(content[:used]), size), hole, torn)

    def _draw_pages(self, rng: random.Random) -> dict[int, bytes]:
        dice = rng.random()
        new = {number: self.live.page(number) for number in self.changed}
        if dice < 0.05:  # everything that was not synced is lost
            new = {number: self.kept.page(number) for number in self.changed}
        elif dice < 0.1:  # nothing is lost
            pass
        elif dice < 0.3:  # one page is lost
            number = rng.choice(self.changed)
            new[number] = self.kept.page(number)
        elif dice < 0.4:  # only one page is kept
            number = rng.choice(self.changed)
            new = {n: self.live.page(n) if n == number else self.kept.page(n) for n in self.changed}
        elif dice < 0.55:  # written in order
            stop = rng.choice(self.changed)
            new = {n: self.live.page(n) if n < stop else self.kept.page(n) for n in self.changed}
        elif dice < 0.85:
            chance = rng.choice((0.15, 0.5, 0.85))
            for number in self.changed:
                if rng.random() < chance:
                    new[number] = self.kept.page(number)
        else:  # written back by the system at different times
            for number in self.changed:
                new[number] = rng.choice((self.kept, *self.versions)).page(number)
        return new

    def _tear(self, number: int, rng: random.Random) -> bytes:
        old, new = self.kept.page(number), rng.choice(self.versions[-3:]).page(number)
        if rng.random() < 0.5:  # in order
            stop = rng.randrange(0, PAGE, SECTOR)
            pieces = (new[:stop], old[stop:])
        else:
            pieces = tuple(rng.choice((old, new))[at : at + SECTOR] for at in range(0, PAGE, SECTOR))
        return b"".join(pieces)


def folder_of(name: str) -> str:
    """Return the directory part of a file's name, with a slash at its end; empty if there is none."""
    return name[: name.rfind("/") + 1]


class Change(NamedTuple):
    """A change of names that was not synced: `name` now belongs to `file`, and `removed` no longer exists."""

    name: str | None
    file: int | None
    removed: str | None = None

    @property
    def folder(self) -> str:
        return folder_of(self.name or self.removed or "")

    def happen(self, names: dict[str, int]) -> None:
        if self.removed is not None:
            names.pop(self.removed, None)
        if self.name is not None and self.file is not None:
            names[self.name] = self.file


class Drawn(NamedTuple):
    """A directory as a power loss left it."""

    files: dict[str, Image]
    hole: bool
    torn: bool
    renamed: bool  # some unsynced change of names was lost

    def build(self, path: Path, *, holes: bool = True) -> None:
        """Make the directory; with `holes`, zeros after the content take no blocks."""
        path.mkdir(exist_ok=True)
        for found in path.rglob("*"):
            if found.is_file() and str(found.relative_to(path)) not in self.files and found.name != LOCK:
                found.unlink()
        for name, image in self.files.items():
            (path / name).parent.mkdir(exist_ok=True)
            fd = os.open(path / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(fd, image.content if holes else image.content.ljust(image.size, b"\0"))
            os.ftruncate(fd, image.size)
            os.close(fd)


class Point:
    """A moment at which the power may fail, or the process may be killed."""

    def __init__(self, platter: Platter, where: str) -> None:
        self.where = where
        self.states = {number: file.state() for number, file in platter.watched.items()}
        self.kept_names = dict(platter.kept_names)
        self.names = dict(platter.names)
        self.changes = list(platter.changes)

    @property
    def unsure(self) -> int:
        """The number of pages and names that a power loss may or may not keep."""
        return sum(len(state.changed) for state in self.states.values()) + len(self.changes)

    def draw(self, rng: random.Random) -> Drawn:
        """Draw a state that a power loss may leave."""
        names = dict(self.kept_names)
        dice = {"": rng.random()}
        renamed = False
        for change in self.changes:
            chance = dice.setdefault(change.folder, rng.random())
            if chance < 0.4 or (chance < 0.8 and rng.random() < 0.5):
                change.happen(names)
            else:
                renamed = True
        choices = {number: self.states[number].draw(rng) for number in sorted(set(names.values()))}
        return Drawn(
            {name: choices[number].image for name, number in names.items()},
            any(choice.hole for choice in choices.values()),
            any(choice.torn for choice in choices.values()),
            renamed,
        )

    def killed(self) -> Drawn:
        """Return what the next process finds if this one is killed: everything that was written."""
        return Drawn({name: self.states[number].live for name, number in self.names.items()}, False, False, False)


class Platter:
    """The disk under one directory: knows what survives. `note` is called before and after every change.

    Planted faults are subclasses.
    """

    def __init__(self, note: Callable[[str], None], *, stores: bool | None = None) -> None:
        self.note = note
        self.watched: dict[int, File] = {}
        self.kept_names: dict[str, int] = {}
        self.names: dict[str, int] = {}
        self.changes: list[Change] = []
        self.failing = False
        self.struck = 0  # syncs that have failed
        self.during_sync: Callable[[], object] | None = None
        self.files = _files_of(self, stores)
        self._inodes: dict[int, int] = {}
        self._root: str | None = None

    def folder(self, path: str) -> str:
        """Return the prefix that names of files have for the directory at a path."""
        if self._root is None:
            self._root = path
        return "" if path == self._root else os.path.relpath(path, self._root) + "/"

    def take_over(self, path: Path, drawn: Drawn, before: Point | None = None) -> None:
        """Continue with a directory that was built from `drawn`.

        After a power loss everything that is there is on the disk. After a kill, at the point `before`, only what was
        on the disk at that point is.
        """
        numbers = before.names if before else dict(zip(drawn.files, range(len(drawn.files)), strict=True))
        for name, number in numbers.items():
            fd = os.open(path / name, os.O_RDWR)
            file = self._watch(fd, number)
            os.close(fd)
            file.kept = drawn.files[name]
        if before:
            for number, state in before.states.items():
                file = self.watched.setdefault(number, File(-1))
                file.kept, file.lost = state.kept, dict(state.lost)
                file.versions, file.live = list(state.versions), state.live
            self.changes = list(before.changes)
        self.names = dict(numbers)
        self.kept_names = dict(before.kept_names if before else numbers)
        for file in self.watched.values():
            file.look()

    def close(self) -> None:
        """Close the descriptors."""
        for file in self.watched.values():
            if file.fd >= 0:
                os.close(file.fd)
        self.watched.clear()

    def _watch(self, fd: int, number: int | None = None) -> File:
        inode = os.fstat(fd).st_ino
        if inode not in self._inodes:
            number = max(self.watched, default=-1) + 1 if number is None else number
            self._inodes[inode] = number
            self.watched[number] = File(os.dup(fd))
        return self.watched[self._inodes[inode]]

    # ---- what the seam does ----------------------------------------------------------------------------

    def created(self, name: str, fd: int) -> None:
        self._watch(fd)
        number = self._inodes[os.fstat(fd).st_ino]
        if self.names.get(name) != number:
            self.change(Change(name, number))

    def change(self, change: Change) -> None:
        change.happen(self.names)
        self.changes.append(change)

    def fail_next(self) -> None:
        """Let the next sync of a file fail."""
        self.failing = True

    def sync(self, fd: int) -> None:
        file = self._watch(fd)
        if self.failing:
            self.failing = False
            self.struck += 1
            file.lose()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        covered, syncs = file.look(), file.syncs
        if self.during_sync:
            meanwhile, self.during_sync = self.during_sync, None
            meanwhile()
        if file.syncs == syncs:  # otherwise a sync that began later has ended already
            file.keep(covered)

    def sync_directory(self, folder: str = "") -> None:
        self.changes = [change for change in self.changes if change.folder != folder]
        kept = {name: file for name, file in self.kept_names.items() if folder_of(name) != folder}
        self.kept_names = kept | {name: file for name, file in self.names.items() if folder_of(name) == folder}

    def write(self, fd: int, data: Any, offset: int) -> None:
        Directory.write(fd, data, offset)
        self._watch(fd).written(offset, memoryview(data).nbytes)

    def truncate(self, fd: int, size: int) -> None:
        Directory.truncate(fd, size)


def _files_of(platter: Platter, stores: bool | None) -> type[Directory]:
    class WatchedDirectory(Directory):
        def __init__(self, path: Any, **options: Any) -> None:
            super().__init__(path, **options)
            self.folder = platter.folder(os.path.abspath(self.path))

        def stores_are_safe(self, fd: Any) -> bool:
            return super().stores_are_safe(fd) if stores is None else stores

        def open_file(self, name: str, flags: int = os.O_RDWR) -> Any:
            if name == LOCK or not flags & os.O_CREAT:
                return super().open_file(name, flags)
            platter.note("before create")
            fd = super().open_file(name, flags)
            platter.created(self.folder + name, int(fd))
            platter.note("after create")
            return fd

        def unlink(self, name: str) -> None:
            if self.folder + name not in platter.names:
                super().unlink(name)
                return
            platter.note("before unlink")
            super().unlink(name)
            platter.change(Change(None, None, self.folder + name))
            platter.note("after unlink")

        def rename(self, source: str, target: str) -> None:
            platter.note("before rename")
            super().rename(source, target)
            source, target = self.folder + source, self.folder + target
            platter.change(Change(target, platter.names[source], source))
            platter.note("after rename")

        def sync_directory(self) -> None:
            platter.note("before sync_directory")
            platter.sync_directory(self.folder)
            platter.note("after sync_directory")

        def allocate(self, fd: Any, old_size: int, new_size: int) -> None:
            platter.note("before allocate")
            super().allocate(fd, old_size, new_size)
            platter.note("after allocate")

    def noted(method: str) -> Callable[..., None]:
        def call(self: Directory, *arguments: Any) -> None:
            platter.note(f"before {method}")
            getattr(platter, method)(int(arguments[0]), *arguments[1:])  # the first argument is an open file
            platter.note(f"after {method}")

        return call

    for method in ("sync", "write", "truncate"):
        setattr(WatchedDirectory, method, noted(method))
    return WatchedDirectory


class QuietDirectory(Directory):
    """A directory for reading drawn states, where nothing needs to be durable."""

    sync = staticmethod(lambda fd: None)

    def sync_directory(self) -> None:
        pass

    def write_past_cache(self, *arguments: Any) -> None:
        pass

    def stores_are_safe(self, fd: Any) -> bool:
        return False


# ---- planted faults of more than one simulation ---------------------------------------------------------


class NoDirectorySync(Platter):
    """Names are never synced."""

    def sync_directory(self, folder: str = "") -> None:
        pass


class NoSync(Platter):
    """A sync does nothing, and counts as a success."""

    def sync(self, fd: int) -> None:
        pass

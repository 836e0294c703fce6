"""Disks that simulate code with a classic mistake, which the simulator of power losses must find."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from support.power import Platter


class NoSyncBeforeRename(Platter):
    """A file is renamed into place without a sync."""

    def sync(self, fd: int) -> None:
        written = {self._inode_of(name) for name in self.names if name.startswith("CURRENT") and name != "CURRENT"}
        if os.fstat(fd).st_ino not in written:
            super().sync(fd)

    def _inode_of(self, name: str) -> int:
        return os.fstat(self.watched[self.names[name]].fd).st_ino


class DurableUpToTheEnd(Platter):
    """A sync that began before the last frame was written counts for the whole log."""

    def sync(self, fd: int) -> None:
        file = self._watch(fd)
        file.look()
        if len(file.versions) < 2 or self.failing:
            super().sync(fd)
        else:
            file.keep(file.versions[-2])


class TailNotCut(Platter):
    """Recovery leaves the torn tail where it is."""

    def truncate(self, fd: int, size: int) -> None:
        pass


class CutNotSynced(Platter):
    """Recovery cuts the torn tail, but does not sync the cut."""

    cut = -1

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self.cut = fd

    def write(self, fd: int, data: Any, offset: int) -> None:
        super().write(fd, data, offset)
        self.cut = -1

    def sync(self, fd: int) -> None:
        if fd != self.cut:
            super().sync(fd)
        self.cut = -1


class NotWrittenAgain(Platter):
    """The first flush after an unclean end trusts the cache: it does not rewrite bytes that are there already."""

    def write(self, fd: int, data: Any, offset: int) -> None:
        content = bytes(data)
        if os.pread(fd, len(content), offset) != content:
            super().write(fd, content, offset)


class ErrorSwallowed(Platter):
    """A sync that fails counts as a success."""

    def sync(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            super().sync(fd)


class SyncedOnceMore(Platter):
    """A sync that fails is retried, and counts if the retry succeeds."""

    def sync(self, fd: int) -> None:
        try:
            super().sync(fd)
        except OSError:
            super().sync(fd)

"""Checking every byte of base and log against its checksum: on demand, when opening, or in the background."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import blake3

from fastsm.background import BackgroundCall
from fastsm.disk import snapshot_header
from fastsm.disk.base import Base
from fastsm.disk.files import storage_errors
from fastsm.errors import CorruptionError
from fastsm.generation.log import Log
from fastsm.generation.recovery import verify_file

PIECE = 64 << 20  # each piece takes the GIL twice, for the read and for the checksum

Progress = Callable[[int, int], None]

logger = logging.getLogger("fastsm")


class Verification:
    """Reads the files of a generation as they are now, even if they are closed or replaced in the meantime.

    It reads the files, not the mapping, so that a disk error raises an exception instead of a signal.
    """

    def __init__(self, log: Log) -> None:
        self.path: str = log.path
        self._base: Base | None = log.base
        with storage_errors(log.path, "opening the files to verify"):
            self._base_descriptor = None if log.base is None else log.base.duplicate_descriptor()
            self._log = log.verification()

    def run(self, progress: Progress | None = None) -> None:
        """Raises ``CorruptionError`` at the first damage, ``StorageError`` if a file cannot be read. Call it once."""
        descriptor, head, path, end, chain = self._log
        base_size = 0 if self._base is None else self._base.size
        try:
            if self._base is not None:
                self._check_base(self._base, progress, base_size + end)
            with storage_errors(path, "reading the log"):
                verify_file(descriptor, head, path, end, chain, shifted(progress, base_size))
        finally:
            self.close()

    def close(self) -> None:
        """Closes the descriptors. Idempotent."""
        with storage_errors(self._log[2], "closing a file that was verified"):
            try:
                self._log[0].close()
            finally:
                if self._base_descriptor is not None:
                    self._base_descriptor.close()

    def _check_base(self, base: Base, progress: Progress | None, total: int) -> None:
        hasher = blake3.blake3()
        descriptor = self._base_descriptor
        assert descriptor is not None
        done = 0
        buffer = memoryview(bytearray(min(PIECE, base.size)))
        while done < base.size:
            with storage_errors(base.path, "reading the base"):
                piece = buffer[: os.preadv(descriptor.number, [buffer[: base.size - done]], done)]
            if not piece:
                raise CorruptionError(base.path, done, f"{base.size} bytes", "the end of the file")
            if done == 0:
                hasher.update(piece[: snapshot_header.HEADER_BYTES - len(base.head.checksum)])
                hasher.update(piece[snapshot_header.HEADER_BYTES :])
            else:
                hasher.update(piece)
            done += len(piece)
            if progress is not None:
                progress(done, total)
        if hasher.digest() != base.head.checksum:
            raise CorruptionError(
                base.path, snapshot_header.HEADER_BYTES - len(base.head.checksum),
                f"BLAKE3 {base.head.checksum.hex()}", hasher.hexdigest())  # fmt: skip


def shifted(progress: Progress | None, done: int) -> Progress | None:
    """Returns the ``progress`` of a part that starts after ``done`` bytes of the whole."""
    if progress is None or done == 0:
        return progress
    return lambda more, total: progress(done + more, done + total)


class Interrupted(Exception):
    """Raised inside a background verification that was told to stop."""


class BackgroundVerification:
    """A verification on a thread of its own, which calls ``report(error or None)`` at the end.

    A lack of memory is no damage: then nothing is reported, and what was not verified stays so. Thread safe.
    """

    def __init__(self, verification: Verification, report: Callable[[Exception | None], None]) -> None:
        self._verification = verification
        self._report: Callable[[Exception | None], None] | None = report
        self._stopping = False
        self._thread: BackgroundCall | None = None
        try:
            self._thread = BackgroundCall(self._run)
        except RuntimeError:  # no thread can be started, so verify right here
            self._run()

    def wait(self, tick: Callable[[], None] = lambda: None) -> None:
        """Waits for the end; ``tick()`` is called during the wait, and may raise."""
        while not self._is_over():
            tick()

    def _is_over(self) -> bool:
        try:
            return self._thread is None or self._thread.wait(0.02)
        except MemoryError:  # of this wait, or of the thread, whose error is raised once
            return False

    def stop(self) -> None:
        """Ends the verification early, without a report. Idempotent."""
        self._stopping = True
        if self._thread is not None and not self._thread.is_this_thread():
            self.wait()

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._verification.run(self._check_stop)
        except Interrupted:
            self._report = None
        except MemoryError:
            self._report = None
            logger.warning(
                "%s: the verification in the background has ended for lack of memory: call verify()",
                self._verification.path)
        except Exception as found:
            error = found
        report, self._report = self._report, None
        if report is not None and not self._stopping:
            report(error)

    def _check_stop(self, done: int, total: int) -> None:
        if self._stopping:
            raise Interrupted

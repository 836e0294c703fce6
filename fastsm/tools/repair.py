"""The last resort for a directory that cannot be opened: keep what is before the damage, set aside what is behind.

Opening a directory never does this: bytes that were durable are gone, so entries that somebody may have been told of
are lost. A snapshot or another replica is the better way. A torn tail is no damage, opening cuts it by itself.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from fastsm.disk import format
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.mapping import Descriptor
from fastsm.errors import CorruptionError, FastsmError
from fastsm.generation import current as generation
from fastsm.generation.current import CURRENT
from fastsm.generation.log import Log, log_name
from fastsm.generation.recovery import Scan
from fastsm.generation.saved_table import table_name
from fastsm.generation.verification import Verification
from fastsm.lookup.terms import Terms
from fastsm.types import LogId

PIECE = 4 << 20


class RepairError(FastsmError):
    """Nothing that can be kept is worth having; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a directory, and what repairing it would cost.

    ``offset``: of the log, from where on it is cut; None when only ``CURRENT`` is written anew. ``kept``: the last
    entry that is left. ``lost``: the last entry of whole frames behind the damage, as far as any can be found.
    """

    path: str
    problem: str
    generation: int
    offset: int | None
    kept: LogId
    cut_bytes: int
    lost: LogId | None

    def __str__(self) -> str:
        if self.offset is None:
            return (
                f"{self.problem}. Repair writes CURRENT anew, for log-{self.generation}, whose frames are whole up to "
                f"entry {self.kept.index:,}")
        known = f"entries up to {self.lost.index:,} at least" if self.lost else "how many entries, nobody can tell"
        return (
            f"{self.problem}. Repair cuts the log at offset {self.offset:,}: what is left ends with entry "
            f"{self.kept.index:,} of term {self.kept.term:,}. Lost are {self.cut_bytes:,} bytes, {known}")


def examine(path: str | os.PathLike[str]) -> Damage | None:
    """What is wrong with a directory that nobody has open; None when opening it is all it needs. O(bytes).

    Nothing is written. Raises ``LockedError``, and ``RepairError`` when no repair can help.
    """
    with _Patient(path) as patient:
        return patient.examine()


def repair(path: str | os.PathLike[str]) -> tuple[Damage, str | None] | None:
    """Repairs a directory; returns what was wrong, and the path of the file that keeps what was cut. None: nothing was.

    The cut bytes are durable in their own file before anything is changed. A crash in between leaves the directory as
    it was, or half repaired: then it is repaired again. Raises as :func:`examine` does.
    """
    with _Patient(path) as patient:
        damage = patient.examine()
        if damage is None:
            return None
        return damage, patient.treat(damage)


class _Patient:
    """A directory, locked while it is looked at and mended."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        with storage_errors(self.path, "opening the directory"):
            self.directory = Directory(self.path, create=False)
        try:
            with storage_errors(self.path, "locking the directory"):
                self.directory.lock()
        except BaseException:
            self.directory.close()
            raise

    def __enter__(self) -> _Patient:
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.close()

    # ---- examine ---------------------------------------------------------------------------------------

    def examine(self) -> Damage | None:
        problem = None
        try:
            current = generation.read_current(self.directory)
            if current is None:
                return None  # a new directory
        except CorruptionError as error:
            problem = str(error)
            current = self.only_log()
        log = self.open_log(current)
        try:
            found = self.examine_log(log, current)
            if found is None and problem is not None:
                last = self.last_of(log, self.frames_end(log))
                return Damage(self.path, problem, current.generation, None, last, 0, None)
            return found
        finally:
            log.close()

    def only_log(self) -> format.CurrentFile:
        """What CURRENT must have said, when there is but one log that it can have named."""
        names = [name for name in self.directory.names() if re.fullmatch(r"log-\d+", name)]
        if len(names) != 1:
            raise RepairError(
                f"{self.path}: CURRENT is damaged, and there are {len(names)} logs that it may have named: "
                "restore the directory from a snapshot or a replica")
        path = self.directory.path_of(names[0])
        head = format.unpack_log_head(self.directory.read_file(names[0], format.LOG_HEADER_BYTES) or b"", path)
        return format.CurrentFile(head.generation, head.identity, format.LOG_HEADER_BYTES)

    def open_log(self, current: format.CurrentFile) -> Log:
        """The log, mapped whole, and its base checked: without either there is nothing to keep."""
        try:
            log = Log.open(self.directory, current)
        except CorruptionError as error:
            raise RepairError(
                f"{error.path} is damaged at its very start, and all else depends on it: restore the directory from a "
                f"snapshot or a replica ({error})") from error
        try:
            Verification(log).run()  # of the log, its header alone: that is how far it is known now
        except CorruptionError as error:
            log.close()
            raise RepairError(
                f"{error.path}: the base, on which all later entries build, is damaged: restore the directory from a "
                f"snapshot or a replica ({error})") from error
        except BaseException:
            log.close()
            raise
        return log

    def scan(self, log: Log) -> Scan:
        return Scan(log.mapping, log.allocated, log.head, log.path, Terms(log.head.base_index))

    def examine_log(self, log: Log, current: format.CurrentFile) -> Damage | None:
        scan = self.scan(log)
        try:
            scan.read_frames()
            scan.judge_durable(current.durable_offset)
            descriptor = log.verification()[0]
            try:
                scan.look_behind(descriptor)
            finally:
                descriptor.close()
        except CorruptionError as error:
            kept = self.last_of(log, scan.end)
            return Damage(
                self.path, str(error).partition(";")[0], log.head.generation, scan.end, kept,
                max(0, self.used(log) - scan.end), self.last_behind(log, scan.end))
        try:
            scan.judge_snapshot(None)
        except CorruptionError as error:
            raise RepairError(f"nothing can be cut to mend this: {error}") from error
        try:
            log.judge_current(current)
        except CorruptionError as error:
            problem = str(error).partition(";")[0]
            return Damage(self.path, problem, log.head.generation, None, self.last_of(log, scan.end), 0, None)
        return None

    def frames_end(self, log: Log) -> int:
        """Where the whole frames end."""
        scan = self.scan(log)
        scan.read_frames()
        return scan.end

    def last_of(self, log: Log, end: int) -> LogId:
        """The last entry of the frames up to ``end``."""
        last = LogId(log.head.base_index, log.head.base_term)
        buffer = memoryview(log.mapping)[log.start :]
        offset = format.LOG_HEADER_BYTES
        while offset < end:
            offset, _, runs, _ = format.unpack_frame(buffer, offset)
            if runs:
                last = LogId(runs[-1][0], runs[-1][1] or 0)
        return last

    def last_behind(self, log: Log, offset: int) -> LogId | None:
        """The last entry of the whole frames after the damage, if its own length and checksum lead to them."""
        buffer = memoryview(log.mapping)[log.start :]
        if offset + format.FRAME_STRUCT.size > log.allocated:
            return None
        checksum, length, *_ = format.FRAME_STRUCT.unpack_from(buffer, offset)
        if length < format.FRAME_STRUCT.size or length % 8 or offset + length > log.allocated:
            return None
        behind = Scan(
            log.mapping, log.allocated, log.head, log.path, Terms(log.head.base_index), offset + length, chain=checksum)
        with contextlib.suppress(CorruptionError):
            behind.read_frames()
        last = behind.last_applied()
        return last if behind.frames else None

    def used(self, log: Log) -> int:
        """Where the last word of the log that is not zero ends: behind it is only room."""
        buffer = memoryview(log.mapping)[log.start :]
        end = log.allocated
        while end > 0:
            piece = bytes(buffer[max(0, end - PIECE) : end]).rstrip(b"\0")
            if piece:
                return min(log.allocated, max(0, end - PIECE) + len(piece) + 7 & ~7)
            end = max(0, end - PIECE)
        return 0

    # ---- treat -----------------------------------------------------------------------------------------

    def treat(self, damage: Damage) -> str | None:
        name = log_name(damage.generation)
        path = self.directory.path_of(name)
        with storage_errors(path, "repairing"):
            descriptor = self.directory.open_file(name, os.O_RDWR)
            try:
                head = format.unpack_log_head(os.pread(descriptor.number, format.LOG_HEADER_BYTES, 0), path)
                end = self.directory.size(descriptor) if damage.offset is None else damage.offset
                kept = None if damage.offset is None else self.keep(descriptor, name, damage)
                self.directory.unlink(table_name(damage.generation))
                durable = format.LOG_HEADER_BYTES if damage.offset is None else end
                current = format.CurrentFile(head.generation, head.identity, durable)
                self.directory.replace_file(CURRENT, format.pack_current(current))
                if damage.offset is not None:
                    self.directory.truncate(descriptor.number, end)
                    self.directory.sync(descriptor)
            finally:
                self.directory.close_file(descriptor)
        return kept

    def keep(self, source: Descriptor, name: str, damage: Damage) -> str:
        """Copies what will be cut into a file beside, durably."""
        assert damage.offset is not None
        offset, stop = damage.offset, damage.offset + damage.cut_bytes
        kept = f"{name}.cut-at-{offset}"
        target = self.directory.create_file(kept)
        try:
            while offset < stop:
                piece = os.pread(source.number, min(PIECE, stop - offset), offset)
                if not piece:
                    break
                self.directory.write(target, piece, offset - damage.offset)
                offset += len(piece)
            self.directory.sync(target)
        finally:
            self.directory.close_file(target)
        self.directory.sync_directory()
        return self.directory.path_of(kept)

"""The last resort for a directory that cannot be opened: a new generation from what is intact; the rest is set aside.

Opening a directory never does this: durable bytes are gone, so entries that were acknowledged may be lost. A snapshot
or another replica is the better way. A torn tail is not damage: opening cuts it without repair.

Every kind of damage for which opening fails is covered here:

    CURRENT damaged, lost, or of another log    the log that goes furthest, with the base that it needs
    the log's header damaged                    made again from CURRENT and the base, if the frames prove it right
    a frame damaged, lost or malformed          the frames before it
    the log lost                                the base alone
    a snapshot's metadata ahead of the state    all frames, and the metadata that was recorded earlier
    PUBLISHED not made by fastsm                all frames; the file is set aside
    the base damaged or lost                    nothing, unless there is another generation: all entries need it
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fastsm.core.hard_state import append_metadata
from fastsm.disk import format, headers
from fastsm.disk.base import Base, base_name
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.published import NAME as PUBLISHED
from fastsm.disk.published import check_owned
from fastsm.errors import ChecksumMismatchError, CorruptionError, FastsmError, SnapshotFormatError
from fastsm.generation import current as generation
from fastsm.generation.log import Log, log_name
from fastsm.generation.names import CURRENT, free_generations, number_of, own_names
from fastsm.generation.recovery import Scan
from fastsm.generation.unfinished import is_unfinished
from fastsm.lookup.index import Index
from fastsm.lookup.terms import Terms
from fastsm.snapshot.file import Snapshot, open_snapshot
from fastsm.types import LogId, SnapshotMetadata

PIECE = 4 << 20
NO_SNAPSHOT = SnapshotMetadata(LogId(), bytes(32))  # recorded after wrong metadata, to override it
BETTER = "restore the directory from a snapshot or a replica"


class RepairError(FastsmError):
    """Nothing that can be kept is of any use; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a directory, and what repairing it would lose.

    ``generation``: the one whose base and log are kept. ``offset``: the log is kept up to here; None: to its end.
    ``kept``: the last entry that is kept. ``cut_bytes``: the bytes of the log after the offset. ``lost``: the last
    entry of intact frames found after the damage, if any. ``base_alone``: there is no readable log.
    """

    path: str
    problem: str
    generation: int
    offset: int | None
    kept: LogId
    cut_bytes: int
    lost: LogId | None
    base_alone: bool = False

    def __str__(self) -> str:
        ends = f"which ends with entry {self.kept.index:,} of term {self.kept.term:,}"
        if self.base_alone:
            what, loss = base_name(self.generation), "All later entries are lost; how many is unknown"
        elif self.offset is None:
            what, loss = log_name(self.generation), "No frame is lost"
        else:
            known = f"entries up to {self.lost.index:,} at least" if self.lost else "an unknown number of entries"
            what = f"everything before offset {self.offset:,} of {log_name(self.generation)}"
            loss = f"{self.cut_bytes:,} bytes are lost, with {known}"
        return f"{self.problem}. Repair makes a new generation from {what}, {ends}. {loss}"


def examine(path: str | os.PathLike[str]) -> Damage | None:
    """Returns what is wrong with a directory that no process has open; None if it can just be opened. O(bytes).

    Writes nothing. Raises ``LockedError``, and ``RepairError`` if no repair can help, or if the directory is not that
    of a state.
    """
    with _Patient(path) as patient:
        found = patient.examine()
        if found is None:
            return None
        damage, whole = found
        whole.close()
        return damage


def repair(path: str | os.PathLike[str]) -> tuple[Damage, str | None] | None:
    """Repairs a directory; returns what was wrong, and the old log's new path, if any. None: nothing was wrong.

    Makes a new generation from what is intact, next to the old one, whose files are set aside under other names:
    nothing is destroyed, and the disk needs room for both. A crash in between leaves the directory as it was, or half
    repaired; then it can be repaired again. Raises as :func:`examine` does.
    """
    with _Patient(path) as patient:
        found = patient.examine()
        if found is None:
            return None
        damage, whole = found
        try:
            return damage, patient.treat(damage, whole)
        finally:
            whole.close()


class _Patient:
    """A directory that is locked while it is examined and repaired."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        with storage_errors(self.path, "opening the directory"):
            self.directory = Directory(self.path, create=False)
        try:
            self.require_state()
            with storage_errors(self.path, "locking the directory"):
                self.directory.lock()
        except BaseException:
            self.directory.close()
            raise

    def require_state(self) -> None:
        """Raises unless there is a state, before the lock is taken, which would create a file."""
        with storage_errors(self.path, "looking at the directory"):
            known = CURRENT in self.directory.names() or any(own_names(self.directory)) or is_unfinished(self.directory)
        if not known:
            raise RepairError(
                f"{self.path}: not a state's directory: expected CURRENT or a log, found neither; give the directory "
                "that a FastStateMachine was opened with")

    def __enter__(self) -> _Patient:
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.close()

    # ---- examine ---------------------------------------------------------------------------------------

    def examine(self) -> tuple[Damage, Log] | None:
        """Returns what is wrong, and the log from which a new generation can be made; None: nothing is wrong."""
        if is_unfinished(self.directory):
            return None  # opening removes what is there
        current = None
        try:
            current = generation.read_current(self.directory)
            if current is None:
                return None  # a new directory
            log = Log.open(self.directory, current)
        except CorruptionError as error:
            return self.best_of_all(problem_of(error), current)
        try:
            self.check_base(log)
            damage = self.examine_log(log, current) or self.examine_published(log)
            if damage is not None:
                return damage, log
        except CorruptionError as error:
            log.close()
            return self.best_of_all(problem_of(error), None)
        except BaseException:
            log.close()
            raise
        log.close()
        return None

    def check_base(self, log: Log) -> None:
        """Raises ``CorruptionError`` unless every byte of a log's base is right and well-formed."""
        if log.base is None:
            return
        try:
            with Snapshot(log.base.duplicate_descriptor(), log.base.path) as snapshot:
                snapshot.verify()
        except (ChecksumMismatchError, SnapshotFormatError) as error:
            raise CorruptionError(log.base.path, None, "a base whose every byte is right", str(error)) from error
        Index().read_base(log.mapping, log.base)

    def best_of_all(self, problem: str, current: headers.CurrentFile | None) -> tuple[Damage, Log]:
        """Returns the generation that reaches furthest, of those with an intact base and a log with a header."""
        best: tuple[tuple[LogId, bool, int], Damage, Log] | None = None
        reasons = []
        for head, base_alone in self.heads(current):
            try:
                log = self.log_of(head, base_alone)
            except (CorruptionError, SnapshotFormatError) as error:
                reasons.append(problem_of(error))
                continue
            end = headers.LOG_HEADER_BYTES if base_alone else self.frames_end(log)
            kept = self.last_of(log, end)
            rank = kept, not base_alone, head.generation
            if best is not None and rank <= best[0]:
                log.close()
                continue
            cut = 0 if base_alone else max(0, self.used(log) - end)
            lost = self.last_after(log, end) if cut else None
            if best is not None:
                best[2].close()
            best = rank, Damage(
                self.path, problem, head.generation, end if cut else None, kept, cut, lost, base_alone), log
        if best is None:
            why = "; ".join(reasons) or "there is no other log, and no base"
            raise RepairError(f"{problem}. Nothing is left from which a state could be made ({why}): {BETTER}")
        return best[1], best[2]

    def heads(self, current: headers.CurrentFile | None) -> Iterator[tuple[headers.LogHead, bool]]:
        """Yields `(header, False)` for each log: as it is, or, if CURRENT names the log, as it must have been.

        Then yields `(header, True)` for each base without such a log. A log that can be read names its own base.
        """
        names = self.directory.names()
        with_log = set()
        for number in sorted({number_of(name) or 0 for name in names}):
            if log_name(number) not in names:
                continue
            try:
                content = self.directory.read_file(log_name(number), headers.LOG_HEADER_BYTES) or b""
                yield headers.unpack_log_head(content, self.directory.path_of(log_name(number))), False
                with_log.add(number)
            except CorruptionError:
                if current is not None and current.generation == number:
                    yield self.head_by_current(current), False
        for number in sorted({number_of(name) or 0 for name in names} - with_log):
            head = self.head_by_base(number, int.from_bytes(os.urandom(8), "little"))
            if head is not None:
                yield head, True

    def head_by_current(self, current: headers.CurrentFile) -> headers.LogHead:
        """Returns the header that a log must have had, from its identity in CURRENT and from its base."""
        head = self.head_by_base(current.generation, current.identity)
        return head or headers.LogHead(current.generation, current.identity)

    def head_by_base(self, number: int, identity: int) -> headers.LogHead | None:
        """Returns the header of a log that is stacked on a base; None without a readable base."""
        try:
            with open_snapshot(self.directory.path_of(base_name(number))) as base:
                last = base.metadata.last_included
                return headers.LogHead(number, identity, last.index, last.term, base.size, base.head.checksum)
        except FastsmError:
            return None

    def log_of(self, head: headers.LogHead, base_alone: bool) -> Log:
        """Returns the log with a header, mapped completely, and its checked base; ``CorruptionError`` if unusable."""
        name = log_name(head.generation)
        path = self.directory.path_of(name)
        base = Base.open(self.directory, head)
        try:
            with storage_errors(path, "opening the log"):
                if base_alone:  # any file will do, since it is not read
                    name = base_name(head.generation)
                descriptor = self.directory.open_file(name, os.O_RDONLY)
                size = headers.LOG_HEADER_BYTES if base_alone else self.directory.size(descriptor)
                if size < headers.LOG_HEADER_BYTES:
                    raise CorruptionError(path, None, f"{headers.LOG_HEADER_BYTES} bytes", f"{size} bytes")
                log = Log.adopt(self.directory, head, descriptor, size, base, True)
        except BaseException:
            if base is not None:
                base.close()
            raise
        try:
            self.check_base(log)
            self.check_frames(log, base_alone)
        except BaseException:
            log.close()
            raise
        return log

    def check_frames(self, log: Log, base_alone: bool) -> None:
        """Checks a reconstructed header: it is right only if a frame belongs to it, or if nothing follows it."""
        start = headers.LOG_HEADER_BYTES
        if base_alone or self.frames_end(log) > start or not self.used(log) > start:
            return
        raise CorruptionError(log.path, start, "a frame of this log", "other bytes")

    def scan(self, log: Log) -> Scan:
        return Scan(log.mapping, log.allocated, log.head, log.path, Terms(log.head.base_index))

    def examine_log(self, log: Log, current: headers.CurrentFile) -> Damage | None:
        scan = self.scan(log)
        try:
            scan.read_frames()
            scan.judge_durable(current.durable_offset)
            descriptor = log.verification()[0]
            try:
                scan.end_of_torn_tail(descriptor)
            finally:
                descriptor.close()
        except CorruptionError as error:
            kept = self.last_of(log, scan.end)
            return Damage(
                self.path, problem_of(error), log.head.generation, scan.end, kept,
                max(0, self.used(log) - scan.end), self.last_after(log, scan.end))
        try:
            scan.judge_snapshot(None)
        except CorruptionError as error:
            return Damage(self.path, problem_of(error), log.head.generation, None, scan.last_applied(), 0, None)
        try:
            log.judge_current(current)
        except CorruptionError as error:
            return Damage(self.path, problem_of(error), log.head.generation, None, scan.last_applied(), 0, None)
        return None

    def examine_published(self, log: Log) -> Damage | None:
        with storage_errors(self.directory.path_of(PUBLISHED), "reading"):
            try:
                check_owned(self.directory)
            except CorruptionError as error:
                kept = self.last_of(log, self.frames_end(log))
                return Damage(self.path, problem_of(error), log.head.generation, None, kept, 0, None)
        return None

    def frames_end(self, log: Log) -> int:
        """Returns the end of the intact frames."""
        scan = self.scan(log)
        with contextlib.suppress(CorruptionError):  # a malformed frame is not intact
            scan.read_frames()
        return scan.end

    def last_of(self, log: Log, end: int) -> LogId:
        """Returns the last entry of the frames up to ``end``."""
        last = LogId(log.head.base_index, log.head.base_term)
        buffer = memoryview(log.mapping)[log.start :]
        offset = headers.LOG_HEADER_BYTES
        while offset < end:
            offset, _, runs, _ = format.unpack_frame(buffer, offset)
            if runs:
                last = LogId(runs[-1][0], runs[-1][1] or 0)
        return last

    def last_after(self, log: Log, offset: int) -> LogId | None:
        """Returns the last entry of intact frames after the damage, if the damaged frame's header leads to them."""
        buffer = memoryview(log.mapping)[log.start :]
        if offset + format.FRAME_STRUCT.size > log.allocated:
            return None
        checksum, length, *_ = format.FRAME_STRUCT.unpack_from(buffer, offset)
        if length < format.FRAME_STRUCT.size or length % 8 or offset + length > log.allocated:
            return None
        rest = Scan(
            log.mapping, log.allocated, log.head, log.path, Terms(log.head.base_index), offset + length, chain=checksum)
        with contextlib.suppress(CorruptionError):
            rest.read_frames()
        last = rest.last_applied()
        return last if rest.frames else None

    def used(self, log: Log) -> int:
        """Returns the end of the log's last word that is not zero; only unused space follows."""
        buffer = memoryview(log.mapping)[log.start :]
        end = log.allocated
        while end > 0:
            piece = bytes(buffer[max(0, end - PIECE) : end]).rstrip(b"\0")
            if piece:
                return min(log.allocated, max(0, end - PIECE) + len(piece) + 7 & ~7)
            end = max(0, end - PIECE)
        return 0

    # ---- treat -----------------------------------------------------------------------------------------

    def treat(self, damage: Damage, whole: Log) -> str | None:
        """Makes the new generation, sets the old one aside, names the new one. Returns the old log's new path."""
        with storage_errors(self.path, "repairing"):
            taken = [number_of(name) or 0 for name in self.directory.names()]
        number = next(free_generations(self.directory, max(taken, default=0) + 1))
        log = None
        try:
            log = self.make(number, damage, whole)
        except BaseException:
            with storage_errors(self.path, "removing an unfinished repair"):
                generation.remove_generation(self.directory, number)
            raise
        try:
            with storage_errors(self.path, "repairing"):
                kept = self.set_aside(number, damage)
                self.directory.sync_directory()
            generation.write_current(self.directory, log)
        finally:
            log.close()
        return kept

    def make(self, number: int, damage: Damage, whole: Log) -> Log:
        """Makes the new generation; its files and their names are durable."""
        log = Log.create(self.directory, number, self.copy_base(whole.base, number))
        try:
            end = headers.LOG_HEADER_BYTES
            if not damage.base_alone:
                end = damage.offset if damage.offset is not None else self.frames_end(whole)
                log.copy_from(whole, headers.LOG_HEADER_BYTES, end)
            metadata = self.last_metadata(whole, end, damage.kept)
            if metadata is not None:
                append_metadata(log, metadata)
            log.sync()
            with storage_errors(self.path, "repairing"):
                self.directory.sync_directory()
        except BaseException:
            log.close()
            raise
        return log

    def copy_base(self, base: Base | None, number: int) -> Base | None:
        """Returns a synced copy of the base under the name of another generation."""
        if base is None or base.descriptor is None:
            return None
        name = base_name(number)
        with storage_errors(self.directory.path_of(name), "copying the base"):
            target = self.directory.create_file(name)
            self.copy(base.descriptor, target, base.size)
            self.directory.sync(target)
        return Base(self.directory, name, target, base.head)

    def copy(self, source: Descriptor, target: Descriptor, size: int) -> None:
        offset = 0
        while offset < size:
            piece = os.pread(source.number, min(PIECE, size - offset), offset)
            if not piece:
                raise CorruptionError(self.path, offset, f"{size} bytes", "the end of the file")
            offset = self.directory.write_paced(target, piece, offset)

    def last_metadata(self, log: Log, end: int, kept: LogId) -> SnapshotMetadata | None:
        """Returns the newest snapshot metadata in frames up to ``end`` whose snapshot is not newer than the state.

        ``NO_SNAPSHOT`` if all of the snapshots are newer; None if no frame has any metadata.
        """
        buffer = memoryview(log.mapping)[log.start :]
        offset, found = headers.LOG_HEADER_BYTES, None
        while offset < end:
            offset, _, _, place = format.unpack_frame(buffer, offset)
            while place < offset:
                index, operation, _, value, _, place = format.unpack_record(buffer, place)
                if format.OPERATIONS[operation] == "snapshot":
                    found = found or NO_SNAPSHOT
                    if index <= kept.index:
                        found = SnapshotMetadata(LogId(index, int.from_bytes(value[:8], "little")), value[8:])
        return found

    def set_aside(self, number: int, damage: Damage) -> str | None:
        """Renames what an opening would remove, or take for the state. The table and a copied base may be removed."""
        kept = None
        present = self.directory.names()
        names = {CURRENT, log_name(damage.generation), *own_names(self.directory)}
        try:
            check_owned(self.directory)
        except CorruptionError:
            names.add(PUBLISHED)
        for name in names:
            if name not in present or number_of(name) == number or name.startswith("table-"):
                continue
            if name == base_name(damage.generation):
                continue
            aside = self.unused_name(f"{name}.set-aside")
            self.directory.rename(name, aside)
            if name == log_name(damage.generation):
                kept = self.directory.path_of(aside)
        return kept

    def unused_name(self, name: str) -> str:
        """Returns an unused name, so that nothing that an earlier repair has kept is replaced."""
        names, number, unused = set(self.directory.names()), 1, name
        while unused in names:
            number += 1
            unused = f"{name}-{number}"
        return unused


def problem_of(error: Exception) -> str:
    """Returns an error's message without its advice."""
    return str(error).partition(";")[0]

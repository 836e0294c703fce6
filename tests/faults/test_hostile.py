"""Forged files with correct checksums give typed errors, take little memory, and never block.

Random inputs are in test_fuzz.py, forged states of snapshots in test_snapshot_file.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
import zstandard
from snapshot.test_codec import bomb

import fastsm.core.generations
from fastsm import CorruptionError, FastsmError, FastStateMachine, SnapshotFormatError, SnapshotReceiver, open_snapshot
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support import by_hand, snapshots
from support.faulty import contents
from support.inside import inside
from support.mutation import NUMBERS
from support.tables import SEGMENT, TableFile

MEMORY = 96 << 20  # a verification reads pieces of 64 MiB
TEBIBYTE = 1 << 40


def resident(name: str) -> int:
    """Return a line of the process's /proc status, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Check that the block takes no more than `MEMORY` at any time, including mapped pages of files.

    Only on Linux, and without a sanitizer, which would keep freed memory.
    """
    if not os.path.exists("/proc/self/clear_refs") or "FASTSM_SANITIZED" in os.environ:
        yield
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < MEMORY


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a state with base, log and table; a journal; a snapshot."""
    root = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)
        with FastStateMachine(root / "state", retain_entries=0) as machine:
            machine.apply([(i, 1, fastsm.put(b"key %d" % i, b"value")) for i in range(1, 50)])
            machine.write_snapshot(root / "snapshot")
            machine.compact()
            machine.apply([(50, 2, fastsm.put(b"key 1", b"again"))])
    journal = Journal(root / "journal")
    for index in range(1, 10):
        journal.add(b"command", index, 1)
    journal.close()
    return root


@pytest.fixture
def copy(directories: Path, tmp_path: Path) -> Path:
    """Provide a copy of the directories for one test."""
    shutil.copytree(directories, tmp_path / "copy")
    return tmp_path / "copy"


def use(root: Path, name: str) -> str:
    """Open and read everything that a file belongs to; return "" or the name of the typed error."""
    try:
        if name.startswith("journal"):
            journal = Journal(root / "journal")
            assert len(journal) in (9, 0)  # 0 with another identity: then no frame is valid, as after a power loss
            journal.abandon()
        elif name == "snapshot":
            with open_snapshot(root / "snapshot") as snapshot:
                snapshot.verify()
        else:
            with FastStateMachine(root / "state", verify_on_open="full", read_only=True) as machine:
                right = machine.get(b"key 1") == b"again" and len(dict(machine.items())) == 49
                # If a table was plausible, values are what its forger chose.
                assert right or (name == "table" and inside(machine).index.loaded)
    except FastsmError as error:
        return type(error).__name__
    return ""


# ---- every field of every header -------------------------------------------------------------------------

FILES: dict[str, tuple[str, list[str]]] = {
    "CURRENT": ("state/CURRENT", by_hand.CURRENT_FIELDS),
    "log": ("state/log-2", by_hand.LOG_FIELDS),
    "base": ("state/base-2", by_hand.SNAPSHOT_FIELDS),
    "table": ("state/table-2", by_hand.TABLE_FIELDS),
    "journal": ("journal/journal-1", by_hand.SEGMENT_FIELDS),
    "journal's newest": ("journal/NEWEST", by_hand.NEWEST_FIELDS),
    "snapshot": ("snapshot/snapshot.fsm", by_hand.SNAPSHOT_FIELDS),
}


def sealed(name: str, data: bytes, size: int) -> bytes:
    """Return the file with the correct checksum of its changed header."""
    if name in ("snapshot", "base"):
        return snapshots.sealed(data)
    return data[: size - 8] + struct.pack("<Q", xxhash.xxh64_intdigest(data[: size - 8])) + data[size:]


def fields(layouts: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the offset and width of each number of a header; of fields of bytes, their first and last eight."""
    at = 0
    for layout in layouts:
        size = struct.calcsize("<" + layout)
        yield at, min(size, 8)
        if size > 8:
            yield at + size - 8, 8
        at += size


@pytest.mark.parametrize("name", FILES)
def test_any_number_in_any_field_is_a_typed_error_or_harmless(copy: Path, directories: Path, name: str) -> None:
    """Any number in any header field, with a correct checksum, is a typed error, or the content is unchanged."""
    path, layouts = FILES[name]
    file = copy / path
    content = file.read_bytes()
    size = struct.calcsize("<" + "".join(layouts))
    endings = []
    for at, width in fields(layouts):
        true = int.from_bytes(content[at : at + width], "little")
        for number in {*NUMBERS, true - 8, true - 1, true + 1, true + 8} - {true}:
            if not 0 <= number < 1 << 8 * width:
                continue
            lying = content[:at] + number.to_bytes(width, "little") + content[at + width :]
            if name == "journal":  # opening it may cut invalid frames, so it is restored
                shutil.rmtree(file.parent)
                shutil.copytree(directories / "journal", file.parent)
            file.write_bytes(sealed(name, lying, size))
            with little_memory():
                endings.append(use(copy, name))
    refused = sum(ending != "" for ending in endings)
    assert len(endings) > (100 if name == "journal's newest" else 150)
    assert refused > 0.5 * len(endings) or name == "table"
    file.write_bytes(content)
    assert use(copy, name) == ""


# ---- files that are not regular, and huge files ----------------------------------------------------------

OTHERS = ["FIFO", "a link", "a directory"]


def replace(path: Path, kind: str) -> None:
    """Put something else in a file's place."""
    path.rename(path.with_name("elsewhere"))
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "a link":
        path.symlink_to("elsewhere")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", FILES)
def test_nothing_but_a_file_is_opened(copy: Path, name: str, kind: str) -> None:
    """A FIFO, a link or a directory is refused without blocking; in place of a table it is ignored."""
    replace(copy / FILES[name][0], kind)
    assert (use(copy, name) == "") == (name == "table")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_receiver_takes_nothing_but_a_file(tmp_path: Path, kind: str) -> None:
    """A receiver refuses anything but a regular file in place of the partial file, and leaves it unchanged."""
    part = tmp_path / "in" / "snapshot.fsm.part"
    part.parent.mkdir()
    part.write_bytes(b"content")
    replace(part, kind)
    with pytest.raises(FastsmError):
        SnapshotReceiver(part.parent)
    assert (part.with_name("elsewhere")).read_bytes() == b"content"


@pytest.mark.parametrize("name", FILES)
def test_a_sparse_tebibyte_takes_no_time(copy: Path, name: str) -> None:
    """A file extended to a sparse tebibyte is refused by its sizes, or read only up to the end of its frames."""
    os.truncate(copy / FILES[name][0], TEBIBYTE)
    with little_memory():
        assert (use(copy, name) == "") == (name in ("log", "journal", "table")) or name == "log"
    # After a clean close a log is as long as CURRENT says, or longer by the room allocated ahead.


TABLES: dict[str, Callable[[TableFile], object]] = {
    "segments": lambda t: t.change(segments=(TEBIBYTE - t.sections.segments) // SEGMENT),
    "a deep directory": lambda t: t.change(depth=38),
    "dead words": lambda t: t.change(dead_words=TEBIBYTE >> 3),
    "runs": lambda t: t.change(runs=TEBIBYTE // 24),
    "metadata": lambda t: t.change(metadata_size=TEBIBYTE),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_larger_than_its_log_allows_is_not_read(copy: Path, kind: str) -> None:
    """A table whose sizes add up to a sparse tebibyte is not read; its checksum would take minutes."""
    table = TableFile(copy / "state" / "table-2")
    TABLES[kind](table)
    table.write()
    os.truncate(table.path, table.saved.sections.end)
    with little_memory(), FastStateMachine(copy / "state", read_only=True) as machine:
        assert not inside(machine).index.loaded
        assert machine.get(b"key 1") == b"again"


def test_a_base_of_runs_without_end_is_corrupt(directory: Path) -> None:
    """A base with 512 GiB of runs in a hole is corrupt, and is read piece by piece."""
    directory.mkdir()
    runs = (1 << 39) // 24 - 100
    front = by_hand.snapshot((2**40, 2**40), [], [], keys=0)
    for name, number in (("runs", runs), ("stored size", 24 * runs)):
        front = snapshots.with_field(front, name, number)
    size = len(front) + 24 * runs
    (directory / "base-1").write_bytes(front)
    os.truncate(directory / "base-1", size)
    (directory / "log-1").write_bytes(by_hand.log_head(base=(2**40, 2**40), size=size, checksum=front[128:160]))
    (directory / "CURRENT").write_bytes(by_hand.current())
    with little_memory(), pytest.raises(CorruptionError) as caught:
        FastStateMachine(directory, verify_on_open="off")
    assert (caught.value.path, caught.value.offset) == (str(directory / "base-1"), 160)


def test_a_partial_file_without_end_is_begun_anew(tmp_path: Path) -> None:
    """A receiver that finds a partial file of a sparse tebibyte starts from the beginning."""
    (tmp_path / "snapshot.fsm.part").touch()
    os.truncate(tmp_path / "snapshot.fsm.part", TEBIBYTE)
    with little_memory(), SnapshotReceiver(tmp_path) as receiver:
        assert (receiver.offset, receiver.size) == (0, None)


# ---- bombs -----------------------------------------------------------------------------------------------

def bombs() -> dict[str, bytes]:
    """Return snapshots of a few KiB that announce, or expand to, 256 MiB."""
    size = 256 << 20
    frame = bomb(size)
    zeros = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    head = snapshots.with_field(by_hand.snapshot((1, 1), [], [], keys=1), "codec", 1)
    head = snapshots.with_field(head, "runs", 1)
    found = {}
    for name, stored, announced in (
        ("more than it announces", frame, 64), ("all that it announces", frame, size - 24),
        ("zeros", zeros, size - 24), ("less than it announces", bomb(1 << 20), size - 24),
    ):
        data = snapshots.with_field(head, "records size", announced)
        data = snapshots.with_field(data, "stored size", len(stored)) + stored
        found[name] = snapshots.sealed(data, flat=b"")
    return found


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    """A bomb is refused in little memory when it is verified, received or installed."""
    data = bombs()[name]
    (tmp_path / "file").write_bytes(data)
    with FastStateMachine(tmp_path / "state") as machine, SnapshotReceiver(tmp_path / "in") as receiver:
        before = contents(tmp_path / "state")
        for call in (
            lambda: snapshots.check(tmp_path / "file"),
            lambda: (receiver.write(0, data), receiver.finish()),
            lambda: machine.install_snapshot(None, tmp_path / "file"),
        ):
            with little_memory(), pytest.raises((SnapshotFormatError, fastsm.ChecksumMismatchError)):
                call()
        assert contents(tmp_path / "state") == before
        assert os.listdir(tmp_path / "in") == []

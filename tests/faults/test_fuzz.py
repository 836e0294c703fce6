"""Every decoder with a hundred thousand hostile inputs, the kept corpus, and regressions that fuzzing found.

``python -m tests.fuzz`` runs for as long as you like; its docs say how to reproduce an input.
"""

from __future__ import annotations

import functools
import random
import struct
import sys
from pathlib import Path

import pytest

import fastsm.core.generations
import fastsm.snapshot.file
from fastsm import CorruptionError, FastStateMachine, OrderError, SnapshotFormatError
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support import by_hand, snapshots
from support.faulty import memory_directory
from support.fuzz_worker import CORPUS, TARGETS, corpus_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz import ROUND, SHARES, Process, Totals

# ---- inputs ----------------------------------------------------------------------------------------------

def test_there_are_a_hundred_thousand_inputs() -> None:
    """The shares of all targets add up to at least 100,000 inputs."""
    assert ROUND * sum(SHARES.values()) >= 100_000
    assert SHARES.keys() == TARGETS.keys()


@functools.cache
def run_of(target: str) -> Totals:
    """Run a target's share of the inputs; return the totals."""
    totals = Totals()
    problem = Process(target, 1, 0, ROUND * SHARES[target], "").end(totals)
    assert problem is None, problem
    return totals


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_harm(target: str) -> None:
    """Every input gives a typed error or the correct state, and at least 30 % are decoded past the header."""
    totals = run_of(target)
    totals.show(endings=True)
    assert totals.deep[target] >= 0.3 * totals.inputs[target] or target == "tables"  # tables are mostly refused
    # A table is used or refused; other outcomes come only from the log.
    assert len(totals.endings[target]) > (2 if target == "tables" else 3)


def test_nearly_every_line_of_the_decoders_runs() -> None:
    """At least 97 % of the lines of the plain reader run; it makes the same decisions as the compiled code."""
    hit, lines = set[tuple[str, int]](), set[tuple[str, int]]()
    for target in TARGETS:
        hit |= run_of(target).hit
        lines |= run_of(target).lines
    plain = {(file, line) for file, line in lines if file == "page_reader.py"}
    assert len(plain) > 150
    assert len(plain & hit) >= 0.97 * len(plain), sorted(plain - hit)


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs_do_no_harm(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept inputs, one for each outcome, do no harm."""
    for module, name in ((fastsm.snapshot.file, "PIECE"), (fastsm.core.generations, "SAVE_TABLE_ABOVE")):
        monkeypatch.setattr(module, name, getattr(module, name))  # targets change them; this restores them
    kept = corpus_of(target)
    assert kept or target == "tables"  # tables are large, and are made here instead
    with memory_directory() as root:
        runner = TARGETS[target](root, list(kept.values()))
        for data in kept.values():
            runner.run(data, random.Random(1))
        runner.close()


def test_the_corpus_is_small() -> None:
    """The corpus is small enough to be read by people."""
    sizes = [path.stat().st_size for path in CORPUS.glob("*/*")]
    assert len(sizes) > 50
    assert sum(sizes) < 100_000


def test_a_finding_is_told_with_the_command_to_get_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding, even one that ends the process, is reported with the command that reproduces it."""
    monkeypatch.setenv("FASTSM_FUZZ_PLANTED", "7")
    for name, status in (("commands", 1), ("logs", -9)):
        problem = Process(name, 3, 0, 20, "").end(Totals())
        assert problem is not None
        assert f"status {status} at input 7" in problem
        assert f"--targets {name} --seed 3 --first 7 --inputs 1" in problem


# ---- findings --------------------------------------------------------------------------------------------

def test_a_log_that_starts_after_an_entry_without_a_base_is_corrupt(directory: Path) -> None:
    """A log that starts after an entry, but has no base, is corrupt; it once opened as an empty state."""
    directory.mkdir()
    (directory / "CURRENT").write_bytes(by_hand.current())
    for fields in ({"base": (6, 1)}, {"base": (0, 1)}, {"checksum": b"\1" * 32}):
        (directory / "log-1").write_bytes(by_hand.log_head(**fields))  # type: ignore[arg-type]
        with pytest.raises(CorruptionError) as caught:
            FastStateMachine(directory)
        assert caught.value.offset == 32


def test_a_base_whose_attachment_is_not_padded_with_zeros_is_corrupt(directory: Path) -> None:
    """A base with nonzero padding after its attachment is corrupt; once only an install refused it."""
    directory.mkdir()
    base = by_hand.snapshot((1, 1), [by_hand.term_run(1, 1, 1)], [by_hand.record(1, 1, b"k", b"v")], attachment=b"mine")
    (directory / "CURRENT").write_bytes(by_hand.current())
    for padding in (b"\0", b"\1"):
        changed = snapshots.sealed(base[:167] + padding + base[168:])
        (directory / "base-1").write_bytes(changed)
        (directory / "log-1").write_bytes(by_hand.log_head(base=(1, 1), size=len(changed), checksum=changed[128:160]))
        if padding == b"\0":
            with FastStateMachine(directory, read_only=True) as machine:
                assert machine.get(b"k") == b"v"
        else:
            with pytest.raises(CorruptionError) as caught:
                FastStateMachine(directory)
            assert (caught.value.path, caught.value.offset) == (str(directory / "base-1"), 164)


def test_a_frame_that_announces_a_wrong_size_is_refused(directory: Path, tmp_path: Path) -> None:
    """A frame that announces a wrong size is refused; once an empty one that announced 128 bytes passed."""
    data = snapshots.with_field(by_hand.snapshot((0, 0), [], []), "codec", 1)
    for size, right in ((0, True), (128, False)):
        frame = bytes.fromhex("28b52ffd20") + bytes([size]) + b"\1\0\0"
        stored = snapshots.with_field(data, "stored size", len(frame)) + frame
        (tmp_path / "file").write_bytes(snapshots.sealed(stored, flat=b""))
        if right:
            snapshots.check(tmp_path / "file")
        else:
            with pytest.raises(SnapshotFormatError, match="128 bytes, says the frame"):
                snapshots.check(tmp_path / "file")


STATE, ENTRY, CUT, START, BASE, VOTE, COMMIT, BORDER = 7, 1, 2, 3, 4, 5, 6, 8
EMPTY = (1, 0, 0, 0, 0, 0, 0, 0, 0)
ENTRIES = [(ENTRY, 1, 1, b"one"), (ENTRY, 2, 1, b"two"), (ENTRY, 3, 1, b"three")]
LARGEST = 2**64 - 1

JOURNALS: dict[str, tuple[tuple[int, ...], list[tuple[int, int, int, bytes]]]] = {
    "a vote for what is no text": (EMPTY, [(VOTE, 1, 1, b"\xff\xfe")]),
    "a cut far past the end": (EMPTY, [*ENTRIES, (CUT, LARGEST - 7, 0, b"")]),
    "a cut after the end of nothing": (EMPTY, [(CUT, 2**40, 0, b"")]),
    "a cut before the border": (EMPTY, [*ENTRIES, (START, 2, 1, b""), (CUT, 2, 0, b"")]),
    "a start after the end": (EMPTY, [*ENTRIES, (START, 4, 1, b"")]),
    "a start that is there already": (EMPTY, [*ENTRIES, (START, 2, 1, b""), (START, 2, 1, b"")]),
    "a start of another term": (EMPTY, [*ENTRIES, (START, 2, 2, b"")]),
    "a border of the largest number": (EMPTY, [*ENTRIES, (BORDER, LARGEST, 1, b"")]),
    "an entry that leaves a gap after a border": (EMPTY, [(BORDER, 7, 1, b""), (ENTRY, 9, 1, b"")]),
    "an entry whose term is below the border's": (EMPTY, [(BORDER, 7, 5, b""), (ENTRY, 8, 4, b"")]),
    "a base before everything": (EMPTY, [(BASE, 0, 1, b"")]),
    "a start far past the end": (EMPTY, [*ENTRIES, (START, LARGEST - 1, 0, b"")]),
    "an entry of the largest number": (EMPTY, [(ENTRY, LARGEST, 1, b"")]),
    "an entry of the largest term": (EMPTY, [(ENTRY, 1, LARGEST, b"")]),
    "a base of the largest number": (EMPTY, [(BASE, LARGEST, 1, b"")]),
    "a state up to the largest number": ((1, LARGEST, 0, 0, 0, 0, 0, 0, 0), []),
    "a state that keeps what is after its end": ((9, 3, 0, 0, 0, 0, 0, 0, 0), ENTRIES),
    "a state of a vote for what is no text": ((1, 0, 1, 1, 0, 0, 0, 0, 0), []),
}


def write_journal(path: Path, state: tuple[int, ...], items: list[tuple[int, int, int, bytes]]) -> None:
    """Write a journal of one segment, with correct checksums."""
    path.mkdir(exist_ok=True)
    content = by_hand.sealed(by_hand.SEGMENT, b"FASTSM-J", 0, 0, 1, by_hand.IDENTITY, bytes(56))
    previous = by_hand.head_checksum(content)
    for kind, index, term, data in [(STATE, 0, 0, struct.pack("<10Q", *state, 0) + b"\xff" * state[3]), *items]:
        item = struct.pack("<QQII", index, term, len(data), kind) + data
        frame = by_hand.frame(len(content), [], item + bytes(-len(item) % 8), previous=previous)
        content, previous = content + frame, by_hand.frame_checksum(frame)
    (path / "journal-1").write_bytes(content)
    (path / "NEWEST").write_bytes(by_hand.newest(1, by_hand.IDENTITY))


@pytest.mark.parametrize("kind", JOURNALS)
def test_a_journal_that_makes_no_sense_is_corrupt(directory: Path, kind: str) -> None:
    """Invalid journals with correct checksums are corrupt; once they crashed, or could be opened only once."""
    write_journal(directory, *JOURNALS[kind])
    content = (directory / "journal-1").read_bytes()
    with pytest.raises(CorruptionError):
        Journal(directory)
    assert (directory / "journal-1").read_bytes() == content


def test_the_table_of_journals_starts_from_a_good_one(directory: Path) -> None:
    """The items that the invalid journals are made from are accepted if they are valid."""
    write_journal(directory, EMPTY, [*ENTRIES, (START, 1, 1, b""), (CUT, 3, 0, b""), (VOTE, 1, 2, b"node")])
    journal = Journal(directory)
    assert (journal[:], journal.term, journal.vote) == ([(b"two", 2, 1)], 2, "node")
    journal.close()


def test_a_journal_takes_no_entry_that_it_would_not_read_back(directory: Path) -> None:
    """An index or a term above the largest is an ``OrderError``."""
    journal = Journal(directory)
    for index, term in ((LARGEST, 1), (1, LARGEST)):
        with pytest.raises(OrderError, match="expected an index"):
            journal.add(b"", index, term)
    journal.add(b"", LARGEST - 1, LARGEST - 1)
    journal.close()
    journal = Journal(directory)
    assert journal[:] == [(b"", LARGEST - 1, LARGEST - 1)]
    journal.close()


def test_a_journal_that_was_emptied_may_go_on_anywhere(directory: Path) -> None:
    """An emptied journal may continue at any entry, and can be opened again; once it could not."""
    write_journal(directory, (3, 2, 0, 0, 0, 0, 0, 0, 0), [])
    for _ in range(2):
        journal = Journal(directory)
        if not len(journal):
            journal.add(b"any", 1, 0)
        assert journal[:] == [(b"any", 1, 0)]
        journal.close()

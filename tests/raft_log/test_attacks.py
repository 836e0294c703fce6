"""``RaftLog`` and callers that are hostile, careless, or at the limits of numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsm import CorruptionError, Entry, FastStateMachine, LogId, NotRunningError, OrderError, RaftLog
from fastsm.tools import inspection
from support.faulty import contents, memory_directory
from support.inside import inside
from support.power import Platter, Point, QuietDirectory

pytestmark = pytest.mark.usefixtures("quiet")

LARGEST = 2**64 - 2


# ---- what callers hand over -----------------------------------------------------------------------------


class SaysOtherwise(tuple[Any, ...]):
    """A tuple that claims to have other items, new ones at each access."""

    __slots__ = ()

    def __getitem__(self, place: Any) -> Any:
        return (1, 1, os.urandom(3_000_000) if place == 2 else 0)[place]

    def __len__(self) -> int:
        return 1 << 40


def test_an_entry_is_what_its_tuple_holds(tmp_path: Path) -> None:
    """Whatever a subclass claims, only the tuple's own items are read."""
    with RaftLog(tmp_path / "log") as log:
        log.append([SaysOtherwise((1, 1, b"held")), SaysOtherwise((2, 1, b"held, too"))])
        assert log.entries(1, 2) == [Entry(1, 1, b"held"), Entry(2, 1, b"held, too")]


class Closes:
    """A number whose conversion closes a log."""

    def __init__(self, log: RaftLog) -> None:
        self.log = log

    def __index__(self) -> int:
        self.log.close()
        return 0


@pytest.mark.parametrize(
    "call", [
        lambda log, number: log.term(number), lambda log, number: log.entries(number, 5),
        lambda log, number: log.entries(0, number), lambda log, number: log.entries(1, 5, max_bytes=number),
        lambda log, number: log.truncate_after(number), lambda log, number: log.compact((number, 1)),
        lambda log, number: log.save_hard_state(number), lambda log, number: log.append([(number, 1, b"")]),
    ],
)  # fmt: skip
def test_a_number_that_closes_the_log_meets_a_closed_log(
    tmp_path: Path, call: Callable[[RaftLog, Any], object]
) -> None:
    """Every call with an argument whose ``__index__`` closes the log is a ``NotRunningError``."""
    log = RaftLog(tmp_path / "log")
    with pytest.raises(NotRunningError):
        call(log, Closes(log))


def test_a_generator_that_raises_or_calls_the_log(tmp_path: Path) -> None:
    """A generator's error is raised and nothing is appended; entries that it appends itself come first."""
    with RaftLog(tmp_path / "log") as log:

        def raising() -> Any:
            yield Entry(1, 1, b"one")
            raise KeyError("half way")

        def calling() -> Any:
            yield Entry(1, 1, b"one")
            log.append([Entry(1, 1, b"first"), Entry(2, 2, b"second")])
            yield Entry(2, 1, b"two")

        with pytest.raises(KeyError, match="half way"):
            log.append(raising())
        assert log.last_index == 0
        with pytest.raises(OrderError) as caught:
            log.append(calling())
        assert caught.value.index == 2
        assert log.entries(1, 9) == [Entry(1, 1, b"first"), Entry(2, 2, b"second")]


def test_a_vote_is_the_name_of_a_node(tmp_path: Path) -> None:
    """65,535 bytes are kept across new segments; more is a ``ValueError``, and nothing has changed."""
    with RaftLog(tmp_path / "log") as log:
        log.save_hard_state(1, b"v" * 65_535)
        with pytest.raises(ValueError, match="65535"):
            log.save_hard_state(2, b"v" * 65_536)
        assert log.hard_state() == (1, b"v" * 65_535)
    with RaftLog(tmp_path / "log") as log:
        assert log.hard_state() == (1, b"v" * 65_535)


# ---- the largest numbers --------------------------------------------------------------------------------


def test_the_largest_index_is_an_index(tmp_path: Path) -> None:
    """Entry 2**64 - 2 is appended, read, kept by a truncation after it, removed by one before it, and compacted."""
    log = RaftLog(tmp_path / "log")
    log.compact(LogId(LARGEST - 1, LARGEST))
    log.append([(LARGEST, LARGEST, b"last")])
    log.truncate_after(LARGEST)
    assert log.entries(LARGEST, 2**80) == [Entry(LARGEST, LARGEST, b"last")]
    for number in (LARGEST + 1, 2**64, 2**80, -1):
        assert log.term(number) is None
        with pytest.raises(OrderError):
            log.truncate_after(number)
        with pytest.raises(OrderError):
            log.append([(number, LARGEST, b"")])
    inside(log).abandon()
    log = RaftLog(tmp_path / "log")
    assert (log.first_index, log.last_index, log.last_term) == (LARGEST, LARGEST, LARGEST)
    log.truncate_after(LARGEST - 1)
    assert log.last_index == LARGEST - 1
    log.append([(LARGEST, LARGEST, b"again")])
    log.compact(LogId(LARGEST, LARGEST))
    log.truncate_after(LARGEST)
    log.sync()
    assert log.durable_index == log.last_index == LARGEST
    assert log.entries(LARGEST + 1, 2**80) == []
    with pytest.raises(OrderError):
        log.append([(LARGEST, LARGEST, b"")])
    log.close()
    with RaftLog(tmp_path / "log") as log:
        assert (log.first_index, log.last_index, log.durable_index) == (LARGEST + 1, LARGEST, LARGEST)


# ---- what counts as durable ------------------------------------------------------------------------------


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("up_to", [(5, 1), (10, 1), (5, 2), (100, 2)])
@pytest.mark.parametrize("goes_on", [False, True])
def test_after_a_kill_what_counts_as_durable_survives_a_power_loss(
    synced: bool, up_to: tuple[int, int], goes_on: bool
) -> None:
    """After compacting without a sync, a kill, an opening and a power loss, the log reaches ``durable_index``."""
    with memory_directory() as root:
        platter = Platter(lambda _: None)
        log = RaftLog(root / "log", _files=platter.files)
        log.append([(index, 1, b"one") for index in range(1, 11)])
        if synced:
            log.sync()
        log.compact(up_to)
        if goes_on:
            log.append([(log.last_index + 1, 2, b"more")])
        before = log.durable_index
        inside(log).abandon()
        log = RaftLog(root / "log", _files=platter.files)
        durable = log.durable_index
        assert before <= durable <= log.last_index
        moment = Point(platter, "now")
        for seed in range(50):
            moment.draw(random.Random(seed)).build(root / "drawn")
            again = RaftLog(root / "drawn", _files=QuietDirectory)
            assert again.last_index >= durable
            inside(again).abandon()
        inside(log).abandon()
        platter.close()


def test_a_tool_does_not_call_durable_what_is_not(tmp_path: Path) -> None:
    """Next to an owner that has compacted without a sync, ``inspect`` shows no durable entry, and syncs nothing."""
    with RaftLog(tmp_path / "log") as log:
        log.append([(index, 1, b"one") for index in range(1, 11)])
        log.compact((10, 1))
        assert log.durable_index == 0
        assert inspection.inspect(tmp_path / "log").as_dict()["durable_index"] == 0
        log.sync()
        log.append([(11, 1, b"a frame that says so")])
        assert inspection.inspect(tmp_path / "log").as_dict()["durable_index"] == 10


# ---- directories of another kind -------------------------------------------------------------------------


def test_a_state_is_not_taken_for_an_empty_log(tmp_path: Path) -> None:
    """Making a new log in the directory of a state, whose node would vote again, is an error; nothing is written."""
    FastStateMachine(tmp_path).close()
    before, names = contents(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(CorruptionError, match="files of a state machine; give log and state a directory each"):
        RaftLog(tmp_path)
    assert (contents(tmp_path), sorted(os.listdir(tmp_path))) == (before, names)
    FastStateMachine(tmp_path).close()


def test_a_log_is_not_taken_for_an_empty_state(tmp_path: Path) -> None:
    """Making a new state in the directory of a log is an error, too."""
    RaftLog(tmp_path).close()
    before = contents(tmp_path)
    with pytest.raises(CorruptionError, match="files of a Raft log; give state and log a directory each"):
        FastStateMachine(tmp_path)
    assert contents(tmp_path) == before
    RaftLog(tmp_path).close()


@pytest.mark.parametrize("name", ["CURRENT", "log-1", "journal-x", "notes"])
def test_files_with_other_names_stay_unchanged(tmp_path: Path, name: str) -> None:
    """A file whose name is not one of a Raft log's stays unchanged, and does not prevent a new log."""
    (tmp_path / name).write_bytes(b"somebody else's")
    with RaftLog(tmp_path) as log:
        log.append([(1, 1, b"one")])
    with RaftLog(tmp_path) as log:
        assert log.last_index == 1
    assert (tmp_path / name).read_bytes() == b"somebody else's"

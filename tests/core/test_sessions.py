"""Sessions: a command in a `once` takes effect once, however often it is proposed, and wherever the state is moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Answer, FastStateMachine, LogId, MemoryStateMachine, open_snapshot
from fastsm.disk.format import is_session_value
from fastsm.tools.json_lines import dump_log, dump_state, line_bytes, load
from support.answering import PROCEDURES, Commands, same
from support.inside import inside

Machine = FastStateMachine | MemoryStateMachine
NO_SESSION, STALE = Answer(False, None, "no session"), Answer(False, None, "stale")


@pytest.fixture(params=["fast", "model"])
def machine(request: pytest.FixtureRequest, directory: Path) -> Iterator[Machine]:
    if request.param == "model":
        yield MemoryStateMachine(procedures=PROCEDURES)
    else:
        with FastStateMachine(directory, procedures=PROCEDURES) as fast:
            yield fast
            inside(fast).check()


def apply(machine: Machine, *commands: bytes) -> list[Any]:
    first = machine.last_applied().index + 1
    return list(machine.apply([(first + i, 1, command) for i, command in enumerate(commands)]))


@pytest.mark.parametrize("together", [False, True])
def test_a_repetition_gives_what_was_answered(machine: Machine, together: bool) -> None:
    """A repetition, in one chunk or across several, returns the first answer and changes nothing."""
    add = fastsm.add(b"n", 1)
    commands = [fastsm.open_session(), *[fastsm.once(1, 1, add)] * 3, fastsm.once(1, 2, add), fastsm.once(1, 1, add)]
    answers = apply(machine, *commands) if together else [apply(machine, each)[0] for each in commands]
    assert answers == [Answer(True, 1), *[Answer(True, 1)] * 3, Answer(True, 2), STALE]
    assert machine.get(b"n") == b"2"
    assert machine.modified(b"n") == LogId(5, 1)


@pytest.mark.parametrize(
    ("command", "answer"),
    [(fastsm.put(b"k", b""), True), (fastsm.delete(b"k"), True), (fastsm.noop(), True), (fastsm.batch([]), True),
     (fastsm.compare_and_swap(b"k", b"no", b""), False), (fastsm.read(b"k"), Answer(True, b"v")),
     (fastsm.read(b"none"), Answer(True, None)), (fastsm.add(b"k", 1), Answer(False, None, "not a number")),
     (fastsm.add(b"n", -(2**63)), Answer(True, -(2**63))), (fastsm.delete_prefix(b""), Answer(True, 1)),
     (fastsm.batch([fastsm.add(b"n", 2), fastsm.noop()]), Answer(True, [2, True])),
     (fastsm.transaction([fastsm.absent(b"k")], [], [fastsm.read(b"k")]), Answer(False, [b"v"], "mismatch")),
     (fastsm.call("move", b"k|m"), Answer(True, [b"v", 0])), (fastsm.call("fail"), Answer(False, None, "failed")),
     (fastsm.call("move", b"x|y"), Answer(False, [b"x", 1], "abort"))])
def test_every_command_may_be_inside(machine: Machine, command: bytes, answer: Any) -> None:
    """The result is that of the command alone, and a refusal is remembered too."""
    first = apply(machine, fastsm.put(b"k", b"v"), fastsm.open_session(), fastsm.once(2, 7, command))[2]
    assert first == answer
    assert type(first) is type(answer)
    before = list(machine.items())
    assert apply(machine, fastsm.once(2, 7, fastsm.put(b"k", b"another")))[0] == answer
    assert list(machine.items()) == before


def test_unknown_and_forgotten_sessions(machine: Machine) -> None:
    """The answers of unknown and forgotten sessions do not say whether the command was applied; nothing changes."""
    put = fastsm.put(b"k", b"v")
    assert apply(
        machine, fastsm.once(1, 1, put), fastsm.open_session(), fastsm.forget(2), fastsm.forget(2), fastsm.forget(9),
        fastsm.once(2, 1, put)) == [NO_SESSION, Answer(True, 2), True, False, False, NO_SESSION]
    assert machine.len() == 0


def test_a_result_too_large_is_refused_and_remembered(machine: Machine) -> None:
    """The limit is one MiB of a value."""
    fits = bytes(1 << 20)
    assert apply(machine, fastsm.open_session(), fastsm.put(b"k", fits), fastsm.once(1, 1, fastsm.read(b"k")))[2] == (
        Answer(True, fits))
    both = fastsm.transaction([], [fastsm.put(b"other", b""), fastsm.read(b"k")])
    for _ in range(2):
        assert apply(machine, fastsm.once(1, 2, both)) == [Answer(False, None, "too large")]
    assert machine.get(b"other") is None


def test_a_command_that_raises_leaves_no_trace(machine: Machine) -> None:
    """A command that raises leaves no record in its session, so that the next try counts."""
    with pytest.raises(fastsm.UnknownCommandError):
        apply(machine, fastsm.open_session(), fastsm.once(1, 1, fastsm.call("unknown")))
    assert machine.last_applied() == (0, 0)
    assert apply(machine, fastsm.noop(), fastsm.once(1, 1, fastsm.noop())) == [True, NO_SESSION]


@pytest.mark.parametrize(
    "inner", [fastsm.add(b"n", 1), fastsm.put(b"n", b"1"), fastsm.call("count_up", b"n", version=2)])
def test_a_chunk_that_was_refused_is_not_remembered(tmp_path: Path, inner: bytes) -> None:
    """A command and its remembered result are applied together: after a later error in the chunk, a retry does both."""
    troubled = []

    @fastsm.procedure
    def trouble(tx: Any, payload: bytes) -> None:
        if troubled:
            raise MemoryError

    procedures = [*PROCEDURES, trouble]
    model = MemoryStateMachine(procedures=procedures)
    with FastStateMachine(tmp_path / "state", procedures=procedures) as fast:
        for machine in (fast, model):
            apply(machine, fastsm.open_session())
            commands = [fastsm.once(1, 1, inner), fastsm.call("trouble")]
            troubled.append(True)
            with pytest.raises(fastsm.ProcedureError):
                apply(machine, *commands)
            troubled.clear()
            assert machine.get(b"n") is None
            first, _ = apply(machine, *commands)
            assert machine.modified(b"n") == (2, 1)
            assert apply(machine, fastsm.once(1, 1, inner)) == [first]
        same(fast, model)


@pytest.mark.parametrize(
    "make", [lambda: fastsm.once(1, 0, fastsm.noop()), lambda: fastsm.once(-1, 1, fastsm.noop()),
             lambda: fastsm.once(1, 1, fastsm.config(b"")), lambda: fastsm.once(1, 1, fastsm.open_session()),
             lambda: fastsm.once(1, 1, fastsm.forget(1)), lambda: fastsm.once(1, 1, fastsm.once(1, 1, fastsm.noop())),
             lambda: fastsm.once(1, 1, b""), lambda: fastsm.once(1, 1, fastsm.noop(), expires=2**63),
             lambda: fastsm.open_session(expires=-1), lambda: fastsm.forget(2**64),
             lambda: fastsm.batch([fastsm.once(1, 1, fastsm.noop())]),
             lambda: fastsm.transaction([], [fastsm.forget(1)])])
def test_an_invalid_session_command_is_refused_when_it_is_made(make: Any) -> None:
    """Sequences below 1, numbers beyond 64 bits, and commands where they are not allowed are refused."""
    with pytest.raises(fastsm.CommandError):
        make()


@pytest.mark.parametrize("way", ["reopen", "crash", "compact", "snapshot", "past"])
def test_sessions_go_where_the_state_goes(tmp_path: Path, way: str) -> None:
    """After reopening, a kill, a compaction and an install, a repetition returns the first answer."""
    add = fastsm.add(b"n", 5)
    where, machine = tmp_path / "state", FastStateMachine(tmp_path / "state", retain_entries=0)
    apply(machine, fastsm.open_session(), fastsm.open_session(), fastsm.once(1, 1, add), fastsm.once(2, 1, add),
          fastsm.once(1, 2, add), fastsm.forget(2))
    expected = [Answer(True, 15), STALE, NO_SESSION]
    repetitions = [fastsm.once(1, 2, add), fastsm.once(1, 1, add), fastsm.once(2, 1, add)]
    if way == "reopen":
        machine.close()
        machine = FastStateMachine(where)
    elif way == "crash":
        machine.flush()
        shutil.copytree(where, tmp_path / "copy")
        machine.close()
        machine = FastStateMachine(tmp_path / "copy")
    elif way == "compact":
        machine.compact()
        assert machine.stats().base.index == 6
        inside(machine).check()
        machine.close()
        machine = FastStateMachine(where)
    else:
        last = LogId(4, 1) if way == "past" else None
        machine.write_snapshot(tmp_path, last)
        with open_snapshot(tmp_path) as snapshot:
            snapshot.verify()
            assert (snapshot.keys, snapshot.sessions) == (1, 2 if way == "past" else 1)
        machine.close()
        machine = FastStateMachine(tmp_path / "other")
        machine.install_snapshot(None, tmp_path)
        if way == "past":
            expected = [Answer(True, 15), Answer(True, 5), Answer(True, 10)]
            repetitions = [repetitions[1], repetitions[2], repetitions[0]]
            expected = [expected[1], expected[2], expected[0]]
    assert apply(machine, *repetitions) == expected
    assert machine.get(b"n") == b"15"
    inside(machine).check()
    machine.close()


def test_reset_forgets_sessions(machine: Machine) -> None:
    """Sessions are part of the state."""
    apply(machine, fastsm.open_session())
    machine.clear()
    assert apply(machine, fastsm.noop(), fastsm.once(1, 1, fastsm.noop()))[1] == NO_SESSION


@pytest.mark.parametrize("kind", ["state", "snapshot", "log"])
@pytest.mark.parametrize("seed", range(3))
def test_dump_and_load_keep_sessions(tmp_path: Path, seed: int, kind: str) -> None:
    """The loaded state has the same checksum, and continues in the same way."""
    commands, model = Commands(seed), MemoryStateMachine(procedures=PROCEDURES)
    with FastStateMachine(tmp_path / "state", procedures=PROCEDURES) as machine:
        for _ in range(10):
            chunk = commands.chunk(model.last_applied().index + 1, 15)
            assert machine.apply(chunk) == model.apply(chunk)
        machine.write_snapshot(tmp_path / "snapshot")
    source = tmp_path / ("snapshot" if kind == "snapshot" else "state")
    lines = dump_log(source) if kind == "log" else dump_state(source)
    load(tmp_path / "loaded", [line_bytes(line) for line in lines])
    with FastStateMachine(tmp_path / "loaded", procedures=PROCEDURES) as loaded:
        same(loaded, model)
        loaded.write_snapshot(tmp_path / "again")
        with open_snapshot(tmp_path / "again") as again, open_snapshot(tmp_path / "snapshot") as first:
            assert again.state_checksum == first.state_checksum
        chunk = commands.chunk(model.last_applied().index + 1, 40)
        assert loaded.apply(chunk) == model.apply(chunk)


def test_only_whole_results_are_a_session() -> None:
    """A result in a file is checked before anything is made from it; depth and counts are bounded."""
    head = (5).to_bytes(8, "little") + b"\xff" * 8
    listed = b"\x05\x01\x00\x00\x00"
    good = [b"\0", b"\1", b"\2\0", b"\x03\1", b"\x0a\2", b"\2\3" + bytes(8), b"\2\4\1\0\0\0x",
            b"\2" + 8 * listed + b"\0"]
    bad = [b"", b"\0\0", b"\2", b"\x0b\0", b"\2\6", b"\2\3" + bytes(7), b"\2\4\2\0\0\0x", b"\2\5\xff\xff\xff\xff\0",
           b"\2" + 9 * listed + b"\0", b"\2\4\0\0\0"]
    for result in good:
        assert is_session_value(head + result), result
    for result in bad:
        assert not is_session_value(head + result), result
    opened = bytes(8) + bytes(8)
    assert is_session_value(opened)
    assert not is_session_value(opened + b"\0")
    assert not is_session_value(bytes(15))
    assert not is_session_value(bytes(8) + b"\xfe" + b"\xff" * 7)

"""Dump and load: a state as lines of JSON, and the same state made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastsm
from fastsm import LogId
from fastsm.errors import SnapshotRangeError, StorageError
from fastsm.tools import json_lines
from support.histories import History


def dumped(lines):
    return [json_lines.line_bytes(line) for line in lines]


def snapshot_of(path: Path, out: Path) -> bytes:
    with fastsm.FastStateMachine(path, read_only=True) as machine:
        machine.write_snapshot(out)
    return (out / "snapshot.fsm").read_bytes()


@pytest.fixture
def filled(directory, machine_at):
    """Provide a directory with a base, a log, a membership, binary keys, several terms and gaps between them."""
    history = History(11, contiguous=False, large=False)
    with machine_at(directory, contiguous=False) as machine:
        for chunk, _ in zip(history, range(60), strict=False):
            machine.apply(chunk)
        machine.compact(machine.last_applied().index // 2)
        machine.update_last_applied(LogId(history.last.index + 9, history.last.term + 2))
    return directory


@pytest.mark.parametrize("seed", range(8))
def test_a_loaded_dump_is_the_same_state(tmp_path, machine_at, seed):
    """A loaded state has the same snapshot, byte for byte, as the dumped one: indexes, terms, membership."""
    history = History(seed, contiguous=bool(seed % 2), large=False)
    with machine_at(tmp_path / "a", contiguous=bool(seed % 2)) as machine:
        for chunk, _ in zip(history, range(30), strict=False):
            machine.apply(chunk)
    json_lines.load(tmp_path / "b", dumped(json_lines.dump_state(tmp_path / "a")))
    json_lines.load(tmp_path / "c", dumped(json_lines.dump_log(tmp_path / "a")))
    expected = snapshot_of(tmp_path / "a", tmp_path / "sa")
    assert snapshot_of(tmp_path / "b", tmp_path / "sb") == expected
    assert snapshot_of(tmp_path / "c", tmp_path / "sc") == expected


def test_a_directory_and_its_snapshot_dump_the_same(filled, tmp_path):
    """A state's dump has the same lines from its directory and from its snapshot, flat or compressed."""
    expected = dumped(json_lines.dump_state(filled))
    for codec in ("none", "zstd"):
        with fastsm.FastStateMachine(filled, read_only=True) as machine:
            machine.write_snapshot(tmp_path / codec, compress=codec)
        assert dumped(json_lines.dump_state(tmp_path / codec)) == expected
    json_lines.load(tmp_path / "again", expected)
    assert snapshot_of(tmp_path / "again", tmp_path / "s") == (tmp_path / "none" / "snapshot.fsm").read_bytes()


def test_the_first_line_says_what_the_others_are(directory, machine_at):
    """The first line has last applied, runs and number of keys; then comes a line for each record, and an end mark."""
    with machine_at(directory) as machine:
        machine.apply([(1, 1, fastsm.put("grün".encode(), b"\xff")), (2, 3, fastsm.delete(b"x\x1b[2J"))])
        machine.apply([(3, 3, fastsm.config(b"nodes"))])
    assert [json.loads(line) for line in dumped(json_lines.dump_state(directory))] == [
        {"operation": "state", "last_applied": [3, 3], "end": True, "runs": [[1, 1, 1], [2, 3, 3]], "keys": 1},
        {"operation": "put", "index": 1, "term": 1, "key": "grün", "value_base64": "/w=="},
        {"operation": "config", "index": 3, "term": 3, "value": "nodes"},
        {"operation": "end", "lines": 2},
    ]
    log = dumped(json_lines.dump_log(directory))
    assert json.loads(log[2]) == {"operation": "delete", "index": 2, "term": 3, "key": "x\x1b[2J"}
    assert json.loads(log[-2]) == {"operation": "close", "index": 3, "term": 3}
    assert all(line.decode().strip().isprintable() for line in log), "a terminal would obey this"


def test_a_dump_by_prefix_holds_those_keys_alone(directory, tmp_path, machine_at):
    """A dump by prefix names the prefix, has only its keys, and can be loaded with the same last applied entry."""
    with machine_at(directory) as machine:
        machine.apply([(1, 1, fastsm.put(b"a/1", b"1")), (2, 1, fastsm.put(b"b/1", b"2")), (3, 1, fastsm.noop())])
    lines = dumped(json_lines.dump_state(directory, prefix=b"b/"))
    assert json.loads(lines[0]) == {"operation": "state", "last_applied": [3, 1], "end": True, "prefix": "b/"}
    assert json_lines.load(tmp_path / "new", lines) == (LogId(3, 1), 1, 1)


def test_a_dump_of_a_part_of_the_log(filled):
    """A dump of a part of the log includes both given entries; a log that starts after a base cannot be loaded."""
    whole = [json.loads(line) for line in dumped(json_lines.dump_log(filled))]
    base = whole[0]["base"][0]
    first, last = base + 5, base + 40
    part = [json.loads(line) for line in dumped(json_lines.dump_log(filled, first=first, last=last))]
    assert part[0]["first"] == first
    assert part[1:-1] == [line for line in whole[1:-1] if first <= line["index"] <= last]
    with pytest.raises(json_lines.LoadError, match="line 1: this log starts after a base"):
        json_lines.load(filled.parent / "no", dumped(json_lines.dump_log(filled)))


def test_a_dump_as_of_an_earlier_entry(directory, machine_at):
    """A dump as of an earlier entry has the state after it; before the base there is none."""
    with machine_at(directory) as machine:
        machine.apply([(i, 1, fastsm.put(b"k", b"%d" % i)) for i in range(1, 6)])
        machine.apply([(6, 2, fastsm.put(b"k", b"6"))])
        machine.compact(5)
        machine.apply([(i, 2, fastsm.put(b"k", b"%d" % i)) for i in range(7, 10)])
    head, line, _ = dumped(json_lines.dump_state(directory, as_of=8))
    assert json.loads(head)["runs"] == [[1, 5, 1], [6, 8, 2]]
    assert json.loads(head)["last_applied"] == [8, 2]
    assert json.loads(line)["value"] == "8"
    with pytest.raises(SnapshotRangeError):
        dumped(json_lines.dump_state(directory, as_of=3))


def test_lines_written_by_hand_are_entries_of_their_own(tmp_path):
    """Handwritten lines need no first line, no indexes, which then count from 1, and no terms, which are then 1."""
    lines = [
        b'{"key": "a", "value": "1"}\n', b"\n", b'{"key_base64": "/w==", "value": ""}',
        b'{"operation": "delete", "key": "a"}',
    ]
    assert json_lines.load(tmp_path / "new", lines) == (LogId(3, 1), 3, 1)
    with fastsm.FastStateMachine(tmp_path / "new") as machine:
        assert list(machine.items()) == [(b"\xff", b"")]
        assert machine.entry_term(2) == 1


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([b"{"], "line 1: expected a JSON object"),
        ([b"[]"], "line 1: expected a JSON object, found list"),
        ([b'{"key": "a", "value": "b"}', b'{"key": "a"}'], 'line 2: expected "value" or "value_base64"'),
        ([b'{"key": "a", "value": 1}'], 'line 1: expected "value"'),
        ([b'{"key": "a", "key_base64": "", "value": "b"}'], 'line 1: expected "key"'),
        ([b'{"key": "a", "value_base64": "?"}'], "line 1: value_base64: "),
        ([b'{"operation": "append", "key": "a"}'],
         "line 1: expected put, delete, touch or config, found operation 'append'"),
        ([b'{"key": "a", "value": "", "expires": -1}'], "line 1: expected expires"),
        ([b'{"key": "a", "value": "", "expires": "5"}'], "line 1: expected expires"),
        ([b'{"operation": "touch", "key": "a", "expires": 9223372036854775808}'], "line 1: expected expires"),
        ([b'{"operation": "clock", "clock": null}'], "line 1: expected the clock"),
        ([b'{"operation": "state", "clock": -1}'], "line 1: expected a clock"),
        (
            [b'{"index": 5, "key": "a", "value": ""}', b'{"index": 4, "key": "a", "value": ""}'],
            "line 2: expected an index",
        ),
        ([b'{"index": "5", "key": "a", "value": ""}'], "line 1: expected an index"),
        ([b'{"operation": "state", "last_applied": 7}'], "line 1: expected last_applied"),
        ([b'{"operation": "state", "runs": [[1, 2]]}'], "line 1: expected runs"),
        ([b'{"operation": "state", "keys": true}'], "line 1: expected a number of keys"),
        ([b"[" * 100_000], "line 1: expected a JSON object"),
        ([b'{"a":' * 100_000], "line 1: expected a JSON object"),
        ([b'{"index": ' + b"9" * 5000 + b"}"], "line 1: expected a JSON object"),
        ([b'{"index": true, "key": "a", "value": ""}'], "line 1: expected an index"),
        ([b'{"index": 18446744073709551615, "key": "a", "value": ""}'], "line 1: expected an index"),
        ([b'{"index": 0, "key": "a", "value": ""}'], "line 1: expected an index of at least 1"),
        (
            [b'{"operation": "append"}', b'{"index": 0}'],
            "line 1: expected put, delete, touch or config, found operation 'append'",
        ),
        (
            [b'{"operation": "raft log", "end": true, "term": 3}', b'{"operation": "entry", "index": 1, "term": 1}'],
            "line 1: this is the dump of a Raft log",
        ),
        (
            [b'{"operation": "state", "last_applied": [1, 1]}', b'{"index": 5, "key": "a", "value": ""}'],
            "line 1: expected entries up to",
        ),
        ([], "line 1: expected a line of a dump"),
        ([b"\n", b"  \n"], "line 1: expected a line of a dump"),
        ([b'{"key": "a", "value": ""}', b'{"operation": "end", "lines": 2}'], "line 2: expected 2 lines before this"),
        ([b'{"operation": "end", "lines": 0}', b'{"key": "a", "value": ""}'], "line 2: expected nothing after the end"),
    ],
)
def test_wrong_lines_leave_no_directory(tmp_path, lines, says):
    """The error of a wrong line names the line, and the new directory is removed."""
    with pytest.raises(json_lines.LoadError) as raised:
        json_lines.load(tmp_path / "new", lines)
    assert str(raised.value).startswith(says)
    assert list(tmp_path.iterdir()) == []


HEAD = '{"operation": "state", "last_applied": [9, 2], "runs": [[1, 5, 1], [6, 9, 2]]}'


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (['{"term": 5, "key": "a", "value": ""}', '{"term": 4, "key": "a", "value": ""}'], 2),
        (['{"index": 3, "term": 5, "key": "a", "value": ""}', "", '{"index": 3, "term": 6, "key": "b"}'], 3),
        ([HEAD, '{"index": 3, "term": 2, "key": "a", "value": ""}'], 2),
        ([HEAD, '{"index": 3, "key": "a", "value": ""}', '{"index": 12, "term": 2, "key": "a", "value": ""}'], 3),
        (['{"operation": "state", "last_applied": [9, 2], "runs": [[1, 5, 2], [6, 9, 1]]}'], 1),
        (['{"operation": "state", "last_applied": [9, 2], "runs": [[1, 5, 1], [5, 9, 2]]}'], 1),
        (['{"operation": "state", "last_applied": [9, 1], "runs": [[1, 5, 1], [6, 9, 2]]}'], 1),
        (['{"operation": "state", "last_applied": [8, 2], "runs": [[1, 5, 1], [6, 9, 2]]}'], 1),
        (['{"operation": "state", "last_applied": [9, 1]}', '{"index": 3, "term": 2, "key": "a", "value": ""}'], 1),
        (['{"key": "a", "value": ""}', '{"key": "%s", "value": ""}' % ("k" * 70_000)], 2),
    ],
)
def test_a_line_that_no_raft_log_could_hold_is_refused(tmp_path, lines, wrong):
    """Falling terms, entries of another term than announced, and oversized keys are errors that name the line."""
    with pytest.raises(json_lines.LoadError) as raised:
        json_lines.load(tmp_path / "new", [line.encode() for line in lines])
    assert raised.value.line == wrong
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_empty_is_not_loaded_into(filled):
    """A directory that is not empty is refused, and its files stay."""
    before = sorted(path.name for path in filled.iterdir())
    with pytest.raises(StorageError, match="name a new or an empty directory"):
        json_lines.load(filled, [b'{"key": "a", "value": "1"}'])
    assert sorted(path.name for path in filled.iterdir()) == before


# ---- dumps that were cut, indexes that are large -------------------------------------------------------

@pytest.mark.parametrize("kind", ["state", "prefix", "as of", "log", "snapshot"])
def test_a_dump_cut_at_any_line_is_an_error_and_makes_nothing(tmp_path, machine_at, kind):
    """A dump that lacks lines at the end or in the middle is a ``LoadError``, and makes no directory."""
    with machine_at(tmp_path / "a") as machine:
        machine.apply([(i, 1, fastsm.put(b"key %d" % i, b"value")) for i in range(1, 8)])
        machine.apply([(8, 2, fastsm.delete(b"key 3")), (9, 2, fastsm.config(b"nodes"))])
        machine.write_snapshot(tmp_path / "snapshots")
    lines = dumped({
        "state": lambda: json_lines.dump_state(tmp_path / "a"),
        "prefix": lambda: json_lines.dump_state(tmp_path / "a", prefix=b"key"),
        "as of": lambda: json_lines.dump_state(tmp_path / "a", as_of=9),
        "log": lambda: json_lines.dump_log(tmp_path / "a"),
        "snapshot": lambda: json_lines.dump_state(tmp_path / "snapshots"),
    }[kind]())
    for cut in range(len(lines)):
        with pytest.raises(json_lines.LoadError, match=r"cut short|did the dump fail"):
            json_lines.load(tmp_path / "new", lines[:cut])
        assert not (tmp_path / "new").exists()
    for missing in range(1, len(lines) - 1):
        with pytest.raises(json_lines.LoadError, match="cut short"):
            json_lines.load(tmp_path / "new", lines[:missing] + lines[missing + 1 :])
    json_lines.load(tmp_path / "new", lines)


def test_a_dump_of_before_the_end_mark_loads(tmp_path):
    """A dump without an end mark, from an older release, loads; if it announces its keys, fewer are an error."""
    lines = [
        b'{"operation": "state", "last_applied": [3, 1], "runs": [[1, 3, 1]], "keys": 2}',
        b'{"operation": "put", "index": 1, "term": 1, "key": "a", "value": "1"}',
        b'{"operation": "put", "index": 3, "term": 1, "key": "b", "value": "2"}',
    ]
    assert json_lines.load(tmp_path / "new", lines) == (LogId(3, 1), 2, 2)
    with pytest.raises(json_lines.LoadError, match="line 1: expected 2 keys, as this line says, found 1"):
        json_lines.load(tmp_path / "cut", lines[:2])
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("index", [2**63 - 1, 2**63, 2**64 - 2])
def test_the_largest_indexes_and_terms_load(tmp_path, machine_at, index):
    """A dump with the largest indexes and terms loads as an equal state."""
    with machine_at(tmp_path / "a", contiguous=False) as machine:
        machine.apply([(5, 1, fastsm.put(b"a", b"")), (index, 2**64 - 2, fastsm.put(b"b", b""))])
    json_lines.load(tmp_path / "b", dumped(json_lines.dump_state(tmp_path / "a")))
    json_lines.load(tmp_path / "c", dumped(json_lines.dump_log(tmp_path / "a")))
    expected = snapshot_of(tmp_path / "a", tmp_path / "sa")
    assert snapshot_of(tmp_path / "b", tmp_path / "sb") == snapshot_of(tmp_path / "c", tmp_path / "sc") == expected


def test_a_dump_that_ends_early_is_a_state_as_of_its_end(tmp_path: Path) -> None:
    """Last applied of a loaded partial log is its last entry, after which Raft then sends the rest."""
    with fastsm.FastStateMachine(tmp_path / "state") as machine:
        machine.apply([(index, 1, fastsm.put(b"%d" % index, b"")) for index in range(1, 6)])
    last, entries, keys = json_lines.load(tmp_path / "new", dumped(json_lines.dump_log(tmp_path / "state", last=2)))
    assert (last, entries, keys) == (LogId(2, 1), 2, 2)

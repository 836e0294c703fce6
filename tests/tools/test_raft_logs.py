"""``fastsm inspect``, ``verify`` and ``dump`` on the directory of a Raft log."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastsm
from fastsm import CorruptionError, FastsmError, RaftLog, StorageError
from fastsm.cli import app
from fastsm.tools import inspection, json_lines
from support.faulty import contents

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide the path of a closed log of several segments."""
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 4096)
    with RaftLog(tmp_path / "log") as log:
        log.save_hard_state(3, b"node-\xff")
        for index in range(1, 21):
            log.append([(index, 2, b"command %d" % index * 50)])
        log.append([(21, 3, b"\xff")])
        log.compact((7, 2))
    return tmp_path / "log"


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    return found.exit_code, found.output


def test_inspect_shows_what_there_is(path: Path) -> None:
    """inspect shows a log in words and as JSON, and writes nothing."""
    before = contents(path)
    code, text = run("inspect", path)
    assert code == 0
    assert "8 to 21, the last of term 3" in text
    assert "term 3, a vote for" in text
    code, text = run("inspect", path, "--json")
    found = json.loads(text)
    assert (found["kind"], found["first_index"], found["last_index"], found["term"]) == ("raft log", 8, 21, 3)
    assert (found["border_index"], found["border_term"], found["torn_bytes"], found["clean"]) == (7, 2, 0, True)
    assert contents(path) == before


def test_verify_names_the_damage(path: Path) -> None:
    """verify prints a sentence for a sound log; damage has status 1 and the name of the file."""
    code, text = run("verify", path)
    assert code == 0
    assert "14 entries up to 21" in text
    newest = max(path.glob("journal-*"), key=lambda each: int(each.name.partition("-")[2]))
    content = bytearray(newest.read_bytes())
    content[150] ^= 1
    newest.write_bytes(content)
    code, text = run("verify", path)
    assert code == 1
    assert newest.name in text


def test_dump_writes_entries_and_hard_state(path: Path) -> None:
    """dump writes a line for each entry, all or a range, and for the hard state; load refuses them as a state."""
    lines = list(json_lines.dump_state(path))
    assert lines[0]["operation"] == "raft log"
    assert (lines[0]["term"], lines[0]["border_index"]) == (3, 7)
    assert [line["index"] for line in lines[1:-1]] == list(range(8, 22))
    assert lines[1]["command"] == "command 8" * 50
    assert lines[-2]["command_base64"] == "/w=="
    assert [line.get("index") for line in json_lines.dump_log(path, first=5, last=9)][1:-1] == [8, 9]
    with pytest.raises(FastsmError):
        list(json_lines.dump_state(path, prefix=b"k"))
    with pytest.raises(json_lines.LoadError, match="line 1: this is the dump of a Raft log"):
        json_lines.load(path.parent / "loaded", [json_lines.line_bytes(line) for line in lines])


def test_tools_look_next_to_the_owner(path: Path) -> None:
    """While an owner appends, compacts and syncs, the tools show a whole log, and do not disturb the owner."""
    stop = threading.Event()
    with RaftLog(path) as log:

        def work() -> None:
            while not stop.is_set():
                log.append([(log.last_index + 1, 3, bytes(1500))])
                log.sync()
                if log.last_index % 7 == 0:
                    log.compact((log.last_index - 3, 3))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(20):
                report = inspection.inspect(path)
                assert report.problem is None, report.problem
                inspection.verify(path)
                assert len(list(json_lines.dump_state(path))) >= 2
        finally:
            stop.set()
            thread.join()
        log.verify()


def test_a_torn_tail_is_told_of(path: Path) -> None:
    """A torn tail, which an opening would cut, is reported and stays."""
    with RaftLog(path) as log:
        log.append([(22, 3, bytes(700))])
        log.sync()
        shutil.copytree(path, path.parent / "killed")
    killed = path.parent / "killed"
    newest = max(killed.glob("journal-*"), key=lambda each: int(each.name.partition("-")[2]))
    data = bytearray(newest.read_bytes().rstrip(b"\0"))
    newest.write_bytes(data + b"torn" * 10)
    before = contents(killed)
    report = inspection.inspect(killed)
    assert report.as_dict()["torn_bytes"] >= 40
    assert "torn tail" in inspection.verify(killed)
    assert contents(killed) == before


@pytest.mark.parametrize("lost", ["NEWEST", "journal"])
def test_a_lost_file_is_a_problem(path: Path, lost: str) -> None:
    """inspect names a missing file, with status 1; verify and dump raise."""
    name = lost if lost == "NEWEST" else min(each.name for each in path.glob("journal-*"))
    (path / name).unlink()
    assert inspection.inspect(path).problem is not None
    code, text = run("inspect", path)
    assert code == 1
    assert "damaged; restore all of it" in text
    assert "fastsm repair" not in text, "it refuses Raft logs"
    with pytest.raises(CorruptionError):
        inspection.verify(path)
    with pytest.raises(CorruptionError):
        list(json_lines.dump_state(path))


def test_commands_for_a_state_say_what_it_is(path: Path) -> None:
    """``get`` and other commands for a state say that this is a log, and name the commands that read it."""
    with pytest.raises(StorageError, match="a Raft log; `fastsm inspect`"):
        inspection.require_state(path)
    with pytest.raises(StorageError, match="a Raft log"):
        inspection.is_directory(str(path))


def test_a_log_that_was_not_begun(tmp_path: Path) -> None:
    """A segment without NEWEST, as an interrupted first opening leaves it, is an empty log."""
    RaftLog(tmp_path / "log").close()
    os.truncate(tmp_path / "log" / "journal-1", 96)
    (tmp_path / "log" / "NEWEST").unlink()
    assert inspection.inspect(tmp_path / "log").as_dict()["last_index"] == 0
    assert "0 entries" in inspection.verify(tmp_path / "log")
    assert len(list(json_lines.dump_state(tmp_path / "log"))) == 2
    RaftLog(tmp_path / "log").close()


def test_the_journal_of_pysyncobj_is_such_a_log(tmp_path: Path) -> None:
    """The tools read the directory of a PySyncObj node's journal, which has the same format."""
    pysyncobj = pytest.importorskip("fastsm.integrations.pysyncobj")
    journal = pysyncobj.FastJournal(tmp_path / "journal")
    journal.add(b"first", 1, 0)
    journal.setCurrentTerm(4, "node:1")
    journal.close()
    assert [line.get("command") for line in json_lines.dump_state(tmp_path / "journal")] == [None, "first", None]
    assert "term 4, a vote for node:1" in dict(inspection.inspect(tmp_path / "journal").rows())["hard state"]

"""`fastsm watch`, as a user runs it, while this process is the owner."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, put
from support.command_line import RUN


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FastStateMachine]:
    """Provide an owner with two entries."""
    with FastStateMachine(tmp_path / "state", auto_compact=False, retain_entries=0) as opened:
        opened.apply([(1, 1, put(b"color", b"blue")), (2, 1, put(b"size", b"9"))])
        yield opened


def started(machine: FastStateMachine, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command with its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "watch", machine.path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(machine.path).parent)  # fmt: skip


def next_line(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_each_change_is_a_line_at_once(machine: FastStateMachine) -> None:
    """Each change is written to the pipe immediately, even across a compaction; Ctrl-C ends the command silently."""
    with started(machine, "--from", "1", "--prefix", "co") as process:
        assert next_line(process) == {"operation": "put", "index": 1, "term": 1, "key": "color", "value": "blue"}
        machine.apply([(3, 1, fastsm.delete(b"color")), (4, 1, put(b"other", b""))])
        assert next_line(process) == {"operation": "delete", "index": 3, "term": 1, "key": "color"}
        machine.apply([(5, 2, put(b"co\xff", b"\xff"))])
        assert next_line(process) == {
            "operation": "put", "index": 5, "term": 2, "key_base64": "Y2//", "value_base64": "/w=="}
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 0


def test_the_command_ends_when_the_reader_of_the_pipe_is_gone(machine: FastStateMachine) -> None:
    """The command ends silently when the pipe's reader is gone, even if there is nothing to write."""
    with started(machine, "--from", "2") as process:
        assert next_line(process)["index"] == 2
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_changes_that_are_gone_are_one_line(machine: FastStateMachine) -> None:
    """If changes are compacted away, the error is one line, with the oldest entry from which a watch can begin."""
    machine.compact()
    with started(machine, "--from", "1") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.count(b"\n") == 1
    assert b"The oldest possible start is 3" in err

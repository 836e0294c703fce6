"""The commands that inspect, copy and repair, as a user types them: their output and their status."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fastsm
from fastsm.cli import app

COMMANDS = [
    "bench", "demo", "inspect", "verify", "get", "scan", "dump", "load", "snapshot", "restore", "compact", "repair",
]


@pytest.fixture
def run():
    """Provide a function that runs the command in this process."""

    def call(*arguments, stdin=None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture
def state(directory, machine_at):
    """Provide a closed directory with two text keys, a binary key, a membership and two terms."""
    with machine_at(directory) as machine:
        machine.apply([
            (1, 1, fastsm.put(b"user/anna", b"42")), (2, 1, fastsm.put(b"user/bert", b"\xff\x00")),
            (3, 2, fastsm.put(b"\xfe", b"x" * 3000)), (4, 2, fastsm.config(b"nodes")),
            (5, 2, fastsm.put(b"user/anna", b"43")),
        ])
    return directory


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(run, name):
    """The --help of every command has an example."""
    done = run(name, "--help")
    assert done.exit_code == 0
    assert f"fastsm {name}" in done.output
    assert "Example" in done.output


def test_inspect_in_a_pipe_is_lines_and_json(run, state):
    """In a pipe, inspect prints a label and a text in each line; --json prints the same for programs."""
    done = run("inspect", state)
    assert done.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["keys"] == "3"
    assert "2 runs: 1 from 1 to 2, 2 from 3 to 5" in done.stdout
    found = json.loads(run("inspect", state, "--json").stdout)
    assert (found["kind"], found["keys"], found["durable_index"], found["owner"]) == ("directory", 3, 5, None)
    assert found["membership"] == {"index": 4, "term": 2, "data_hex": b"nodes".hex()}


def test_a_damaged_directory_has_status_1_everywhere(run, state):
    """Every command on a damaged directory has status 1 and names the place of the damage in one line."""
    log = state / "log-1"
    data = bytearray(log.read_bytes())
    data[150] ^= 1
    log.write_bytes(data)
    for name in ("inspect", "verify", "dump", "get", "snapshot", "compact"):
        more = {"get": ["user/anna"], "snapshot": [state.parent / "out"]}.get(name, [])
        done = run(name, state, *more)
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"{log}, offset 96" in done.stdout + done.stderr
        assert "Traceback" not in done.output
    assert "log-1" in run("inspect", state).stdout
    assert not (state.parent / "out" / "snapshot.fsm").exists()


def test_repair_asks_before_it_cuts(run, state):
    """Without --yes, repair only reports; with it, it repairs and names the old log; then nothing is left to do."""
    log = state / "log-1"
    data = bytearray(log.read_bytes())
    data[150] ^= 1
    log.write_bytes(bytes(data))
    told = run("repair", state)
    assert (told.exit_code, log.read_bytes()) == (1, bytes(data))
    assert "a new generation from everything before offset 96 of log-1" in told.stdout
    assert "--yes" in told.stderr
    done = run("repair", state, "--yes")
    assert done.exit_code == 0
    assert f"{log}.set-aside" in done.stdout
    assert run("repair", state).stdout == f"{state}: nothing to repair; opening it is enough.\n"


def test_get_prints_the_bytes_of_the_value(run, state):
    """get prints the value's bytes without a newline, or JSON; a missing key has status 1; keys may be Base64."""
    assert run("get", state, "user/bert").stdout_bytes == b"\xff\x00"
    assert run("get", state, "/g==", "--base64").stdout_bytes == b"x" * 3000
    assert json.loads(run("get", state, "user/anna", "--json").stdout) == {
        "index": 5, "term": 2, "key": "user/anna", "value": "43"}
    missing = run("get", state, "user/cora")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == f"fastsm: {state}: no key user/cora\n"
    assert run("get", state, "not Base64!", "--base64").exit_code == 2


def test_scan_in_a_pipe_is_json_lines_sorted_by_key(run, state):
    """scan prints the keys with a prefix, as JSON lines in a pipe; --limit and --after page through them."""
    lines = [json.loads(line) for line in run("scan", state, "user/").stdout.splitlines()]
    assert lines == [{"key": "user/anna", "value": "43"}, {"key": "user/bert", "value_base64": "/wA="}]
    assert len(run("scan", state, "--limit", 1).stdout.splitlines()) == 1
    assert [json.loads(line)["key"] for line in run("scan", state, "user/", "--after", "user/anna").stdout.splitlines()
            ] == ["user/bert"]


def test_dump_and_load_are_each_other_reversed(run, state, tmp_path):
    """A loaded dump dumps the same; load reads standard input or a file, and refuses a directory that is not empty."""
    text = run("dump", state).stdout
    assert len(text.splitlines()) == 6
    done = run("load", tmp_path / "new", stdin=text)
    assert done.stdout == f"{tmp_path / 'new'}: 3 keys, 5 entries, entry 5 of term 2.\n"
    assert run("dump", tmp_path / "new").stdout == text
    (tmp_path / "lines").write_text(text)
    assert run("load", tmp_path / "two", tmp_path / "lines").exit_code == 0
    again = run("load", tmp_path / "new", stdin=text)
    assert again.exit_code == 1
    assert "name a new or an empty directory" in again.stderr
    wrong = run("load", tmp_path / "three", stdin="{}\n")
    assert wrong.stderr == 'fastsm: line 1: expected "key" or "key_base64", one of them, as a string\n'


def test_dump_of_the_log_by_range(run, state):
    """--from and --to select entries of the log, both inclusive."""
    lines = [json.loads(line) for line in run("dump", state, "--log", "--from", 2, "--to", 3).stdout.splitlines()]
    assert [(line["operation"], line.get("index")) for line in lines] == [
        ("log", None), ("put", 2), ("put", 3), ("end", None)]
    assert run("dump", state, "--from", 2).exit_code == 2
    assert run("dump", state, "--log", "--prefix", "a").exit_code == 2


def test_snapshot_and_restore(run, state, tmp_path):
    """snapshot writes a snapshot, restore makes a new directory of it, and refuses one that exists already."""
    done = run("snapshot", state, tmp_path / "out", "--compress", "zstd")
    assert done.exit_code == 0
    assert "as of entry 5 of term 2" in done.stdout
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["codec"] == "zstd"
    assert "3 keys as of entry 5 of term 2" in run("verify", tmp_path / "out").stdout
    assert run("restore", tmp_path / "out", tmp_path / "new").exit_code == 0
    assert run("dump", tmp_path / "new").stdout == run("dump", state).stdout
    assert run("restore", tmp_path / "out", tmp_path / "new").exit_code == 1
    assert run("restore", tmp_path / "nothing", tmp_path / "new2").exit_code == 1
    assert not (tmp_path / "new2").exists()


def test_compact_says_what_it_gave_back(run, state, tmp_path):
    """compact names the new base; having nothing to do is no error, but an empty folder is."""
    assert "nothing to do" in run("compact", state).stdout
    assert "with a base as of entry 5" in run("compact", state, "--retain", 0).stdout
    assert "nothing to do" in run("compact", state, "--retain", 0).stdout
    (tmp_path / "empty").mkdir()
    assert run("compact", tmp_path / "empty").exit_code == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_directory_in_use_is_read_and_not_changed(run, state, machine_at, tmp_path):
    """While an owner has the directory open, reading works, and changes are refused with the owner's process id."""
    machine = machine_at(state)
    for arguments in (["inspect", state], ["verify", state], ["dump", state], ["get", state, "user/anna"],
                      ["scan", state], ["snapshot", state, tmp_path / "out"]):
        assert run(*arguments).exit_code == 0
    assert f"process {os.getpid()}" in run("inspect", state).stdout
    for arguments in (["compact", state], ["repair", state], ["repair", state, "--yes"]):
        done = run(*arguments)
        assert done.exit_code == 1
        assert "already open, by this process" in done.stderr
    assert machine.apply([(6, 2, fastsm.noop())]) == [True]


def test_nothing_to_look_at_is_one_line(run, tmp_path):
    """A missing path, an empty folder and another kind of file are errors of one line."""
    (tmp_path / "text").write_text("hello, this is no snapshot")
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "text", "empty"):
        for name in ("inspect", "verify", "dump"):
            done = run(name, tmp_path / place)
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
            assert str(tmp_path / place) in done.stderr


def test_a_reader_that_goes_away_is_no_traceback(directory, machine_at):
    """`fastsm dump | head -1` ends without a traceback."""
    with machine_at(directory) as machine:
        machine.apply([(1, 1, fastsm.put_many([b"%d" % i for i in range(30_000)], [b"v" * 50] * 30_000))])
    code = "import sys; from fastsm.__main__ import main; sys.argv[0] = 'fastsm'; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "dump", str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert json.loads(process.stdout.readline())["keys"] == 30_000
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")

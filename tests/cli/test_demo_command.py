"""The command ``fastsm demo``, as a user runs it."""

import os
import re
import resource
import signal
import subprocess
import time

import pytest

import fastsm
from support.command_line import RUN, SECONDS, command, in_terminal, open_when_let_go, run, running, wait_for_entries


@pytest.fixture
def source(tmp_path):
    """A folder of small files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(40):
        (folder / f"file{number}").write_bytes(b"line\n" * number * number)
    return folder


def test_the_demo_in_a_pipe_is_plain_lines(tmp_path, source):
    """Without a terminal: no colours, no boxes, no wrapped lines; the verdict is the last."""
    done = run(tmp_path, "demo", "--source", source, "--seed", 1, "--chunk", 20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.replace("\n", "").isprintable()
    lines = done.stdout.splitlines()
    assert lines[0] == f"fastsm demo --seed 1: {source} as a Raft log"
    assert lines[-1].startswith("All 40 keys equal their files.")
    for label in ("keys", "entries", "killed after", "recovered", "apply, child", "apply, parent", "get"):
        assert any(line.startswith(f"{label}  ") for line in lines)


def test_the_seed_decides_the_history(tmp_path, source):
    """The same seed gives the same entries again."""
    told = [run(tmp_path, "demo", "--source", source, "--seed", 5).stdout for _ in range(2)]
    counts = [next(line for line in text.splitlines() if line.startswith("entries")) for text in told]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("columns", [60, 120])
def test_the_demo_in_a_terminal_fits_its_width(tmp_path, source, columns):
    """Every step is ticked off, and no line of the table is longer than the terminal is wide."""
    drawn, status = in_terminal(tmp_path, columns, "demo", "--source", source, "--seed", 1, "--chunk", 20)
    assert status == 0
    for text in ("✓", "compare with files", "killed after", "╰", "All 40 keys equal their files."):
        assert text in drawn
    assert "…" not in drawn
    table = [line for line in drawn.split("\r\n") if "│" in line]
    assert len(table) >= 12
    assert len({line.count("│") for line in table}) == 1


def test_the_demo_in_an_ascii_pipe_does_not_fail(tmp_path, source):
    """Signs that the encoding lacks are replaced."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run(tmp_path, "demo", "--source", source, env=environment)
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_a_kept_directory_holds_every_file(tmp_path, source):
    """--directory keeps the state and says where; a second run refuses to touch it."""
    place = tmp_path / "state"
    done = run(tmp_path, "demo", "--source", source, "--directory", place)
    assert done.stdout.endswith(f"The state is kept in {place}\n")
    with fastsm.FastStateMachine(place) as machine:
        for path in source.iterdir():
            assert machine.get(path.name.encode()) == path.read_bytes()
    again = run(tmp_path, "demo", "--source", source, "--directory", place)
    assert again.returncode == 1
    assert again.stderr == f"fastsm: {place}: not empty; name a new directory\n"


def test_a_mismatch_is_one_line_and_status_1(tmp_path, source):
    """When the model disagrees, the user reads where."""
    lie = "import fastsm.tools.demo as d; d.read_file = lambda s, n, r=d.read_file: r(s, n) + b'!'; "
    done = run(tmp_path, "demo", "--source", source, code="import sys; " + lie + RUN.partition("; ")[2])
    assert done.returncode == 1
    assert done.stderr.startswith("fastsm: ")
    assert done.stderr.count("\n") == 1
    # The child reads the files as they are: that is told first. A lie that begins later is a mismatch.
    lie = (
        "import fastsm.tools.demo as d; v = d.Demo.verify; "
        "d.Demo.verify = lambda self, m: (setattr(d, 'read_file', lambda s, n: b'!'), v(self, m)); "
    )
    done = run(tmp_path, "demo", "--source", source, code="import sys; " + lie + RUN.partition("; ")[2])
    assert done.returncode == 1
    assert done.stderr.startswith("fastsm: MISMATCH: at the end of the history: key 'file0' is 0 bytes, expected 1")
    assert done.stderr.count("\n") == 1
    assert "All 40 keys" not in done.stdout


@pytest.mark.parametrize("arguments", [["--chunk", "0"], ["--seed", "x"], ["surplus"]])
def test_wrong_arguments_have_status_2(tmp_path, arguments):
    """Usage errors are told apart from failures."""
    assert run(tmp_path, "demo", *arguments).returncode == 2


def test_a_missing_folder_is_one_line(tmp_path):
    """The system's word on it, and the path."""
    done = run(tmp_path, "demo", "--source", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr == f"fastsm: {tmp_path / 'nowhere'}: No such file or directory\n"


def test_no_room_in_the_child_is_one_line(tmp_path, source):
    """What ended the child is told, in one line, with no traceback."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = run(tmp_path, "demo", "--source", source, preexec_fn=small_files)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the child process ended by itself" in done.stderr
    assert "File too large" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback(tmp_path, source):
    """`fastsm demo | head -1` ends quietly."""
    with running(tmp_path, "demo", "--source", source) as process:
        process.stdout.close()
        assert process.wait(SECONDS) == 1
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_signal_leaves_no_child_behind(tmp_path, number, status):
    """Whatever ends the parent alone, its child ends too, and lets the directory go."""
    place = tmp_path / "state"
    with running(tmp_path, "demo", "--directory", place, "--chunk", 1) as process:
        wait_for_entries(place)
        os.kill(process.pid, number)
        assert process.wait(SECONDS) == status
        message = "fastsm: interrupted\n" if number == signal.SIGINT else ""
        assert process.stderr.read() == message
    with open_when_let_go(place) as machine:
        assert machine.last_applied().index > 0


def test_an_interrupt_removes_the_temporary_directory(tmp_path):
    """Ctrl-C, which the whole process group gets, leaves no files either."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = f"import tempfile; tempfile.tempdir = {str(scratch)!r}; {RUN}"
    with subprocess.Popen(
        command("demo", "--chunk", "1", code=code), cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + SECONDS
        while not list(scratch.glob("fastsm-demo-*/state/log-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(SECONDS) == 130
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_demo_kills_early_and_after_entries_that_were_never_flushed(tmp_path, source, seed):
    """The kill comes in the first three quarters; what was applied and not flushed is named, and recovered as well."""
    done = run(tmp_path, "demo", "--source", source, "--seed", seed, "--chunk", 20)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line[:18].strip(): line[20:] for line in done.stdout.splitlines()}
    last = int(re.match(r"([\d,]+) of", lines["entries"])[1].replace(",", ""))
    killed, flushed = (
        int(number.replace(",", "")) for number in re.match(
            r"entry ([\d,]+); those after ([\d,]+) were never flushed", lines["killed after"]).groups()
    )
    assert flushed < killed <= -(-last * 3 // 4)
    assert f"{killed - flushed:,} unflushed" in lines["apply in a child"]

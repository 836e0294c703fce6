"""The command ``fastsm`` as a user runs it: in processes of its own."""

import contextlib
import json
import os
import pathlib
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time

import pytest

import fastsm

# What `python -m fastsm` does, but without the current folder in front of everything.
RUN = "import sys; from fastsm.__main__ import main; sys.argv[0] = 'fastsm'; main()"
SECONDS = 60


@pytest.fixture
def source(tmp_path):
    """A folder of small files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(40):
        (folder / f"file{number}").write_bytes(b"line\n" * number * number)
    return folder


def command(*arguments, code=RUN):
    return [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code, *map(str, arguments)]


def run(tmp_path, *arguments, code=RUN, **options):
    """Runs the command in an empty folder, its output in pipes."""
    cwd = tmp_path / "cwd"
    cwd.mkdir(exist_ok=True)
    return subprocess.run(
        command(*arguments, code=code), cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False, **options
    )


@contextlib.contextmanager
def running(tmp_path, *arguments):
    """The command under way, in a process group of its own."""
    with subprocess.Popen(
        command(*arguments), cwd=tmp_path, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_entries(directory):
    """Until a child has begun to write its log."""
    deadline = time.monotonic() + SECONDS
    while not any(path.stat().st_size > 10**6 for path in directory.glob("log-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_when_let_go(directory):
    """Opens the directory as soon as no process holds it."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return fastsm.FastStateMachine(directory)
        except fastsm.LockedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def in_terminal(tmp_path, columns, *arguments):
    """What the command draws in a terminal, and its status."""
    controller, terminal = pty.openpty()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "LINES")},
        "TERM": "xterm-256color",
        "COLUMNS": str(columns),
        "PYTHONUTF8": "1",
    }
    try:
        process = subprocess.Popen(
            command(*arguments), cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
        )
        os.close(terminal)
        drawn = b""
        with contextlib.suppress(OSError):  # EIO: the last process with the terminal open has ended
            while select.select([controller], [], [], SECONDS)[0]:
                piece = os.read(controller, 65536)
                if not piece:
                    break
                drawn += piece
        return drawn.decode(), process.wait(SECONDS)
    finally:
        os.close(controller)


# ---- the command -------------------------------------------------------------------------------------


def test_the_version_is_printed(tmp_path):
    """--version says name and version, and nothing else."""
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastsm {fastsm.__version__}\n", "")


def test_help_names_the_subcommands(tmp_path):
    """--help and no argument at all both show what there is."""
    for arguments in (["--help"], []):
        done = run(tmp_path, *arguments)
        assert "demo" in done.stdout + done.stderr


def test_the_help_of_demo_names_its_options(tmp_path):
    """The options that users need are there; the one of the tests is not."""
    done = run(tmp_path, "demo", "--help", env={**os.environ, "COLUMNS": "100", "TERM": "dumb"})
    assert done.returncode == 0
    for option in ("--directory", "--seed", "--chunk"):
        assert option in done.stdout
    assert "--source" not in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_what_to_install(tmp_path, missing):
    """One sentence on stderr, and status 1."""
    done = run(tmp_path, "demo", code=f"import sys; sys.modules['{missing}'] = None; " + RUN.partition("; ")[2])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert 'pip install "fastsm[cli]"' in done.stderr


def test_a_module_missing_inside_the_package_is_not_called_an_extra(tmp_path):
    """A broken installation shows its traceback: installing the extra would not help."""
    done = run(tmp_path, "demo", code="import sys; sys.modules['fastsm.tools.demo'] = None; " + RUN.partition("; ")[2])
    assert done.returncode == 1
    assert "fastsm[cli]" not in done.stderr
    assert "fastsm.tools.demo" in done.stderr


# ---- demo --------------------------------------------------------------------------------------------


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


# ---- looking, in a terminal --------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 160])
def test_what_is_drawn_fits_the_terminal(tmp_path, columns):
    """inspect, scan and get in a narrow and in a wide terminal: no line is longer, nothing in it is obeyed."""
    with fastsm.FastStateMachine(tmp_path / "state") as machine:
        machine.apply([(1, 1, fastsm.put(b"a long key " * 9, b"\x1b[2J\x07 a long value " * 30))])
        machine.apply([(2, 7, fastsm.config(b"\x1b[31m nodes " * 9))])
        machine.apply([(3, 7, fastsm.put(b"leased", b"a long value " * 30, expires=2**63 - 1))])
    for arguments in (["inspect", "state"], ["scan", "state"]):
        drawn, status = in_terminal(tmp_path, columns, *arguments)
        assert status == 0
        assert "\x1b[2J" not in drawn
        assert "\x1b[31m nodes" not in drawn
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)
        assert max(map(len, re.split("[\r\n]+", plain))) <= columns
        assert plain.count("long") >= 8 or "last applied" in plain
    drawn, status = in_terminal(tmp_path, columns, "get", "state", "a long key " * 9)
    assert (status, "\x1b[2J" in drawn) == (0, False)
    assert r"\x1b[2J" in drawn


# ---- streams and permissions ---------------------------------------------------------------------------

@pytest.fixture
def state(tmp_path):
    """A small state, and a snapshot of it."""
    with fastsm.FastStateMachine(tmp_path / "state") as machine:
        machine.apply([(1, 1, fastsm.put(b"color", b"blue"))])
        machine.write_snapshot(tmp_path / "snapshots")
    (tmp_path / "lines").write_text('{"key": "a", "value": "b"}\n')
    return tmp_path / "state"


def each_command(tmp_path, state):
    """A call of each command that takes a directory, by name."""
    lines = tmp_path / "lines"
    return {
        "inspect": ["inspect", state], "inspect --json": ["inspect", state, "--json"], "verify": ["verify", state],
        "get": ["get", state, "color"], "scan": ["scan", state], "dump": ["dump", state],
        "dump --log": ["dump", state, "--log"], "load": ["load", state / "new", lines],
        "snapshot": ["snapshot", state, tmp_path / "out"],
        "restore": ["restore", tmp_path / "snapshots", state / "new"],
        "compact": ["compact", state], "repair": ["repair", state],
    }


NAMES = list(each_command(pathlib.Path(tempfile.gettempdir()), pathlib.Path("state")))


@pytest.mark.parametrize("name", ["--version", *NAMES])
@pytest.mark.parametrize("output", ["closed", "full"])
def test_an_output_that_takes_nothing_is_one_line(tmp_path, state, name, output):
    """Closed, or on a full disk: one line on stderr and status 1, and no traceback at the interpreter's end."""
    target = tmp_path / "made"
    arguments = {**each_command(tmp_path, state), "--version": ["--version"]}[name]
    arguments = [target if argument == state / "new" else argument for argument in arguments]
    redirect = ">&-" if output == "closed" else ">/dev/full"
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *command(*arguments)], stderr=subprocess.PIPE, text=True,
        timeout=SECONDS, check=False, cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert re.fullmatch("fastsm: standard output: [A-Z][a-z ]+\n", done.stderr)


def test_closed_streams_do_not_become_a_state_s_files(tmp_path, state):
    """With all three closed the files of the state get other numbers, and what is done is done."""
    done = subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command("compact", state, "--retain", "0")], timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    with fastsm.FastStateMachine(state) as machine:
        assert machine.get(b"color") == b"blue"
        assert machine.stats().base.index == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's place")
@pytest.mark.parametrize("name", [*NAMES, "bench"])
def test_a_lack_of_permission_is_one_line(tmp_path, state, name):
    """Another user's directory: one line that names it, status 1."""
    os.chmod(tmp_path, 0o711)
    (tmp_path / "cwd").mkdir(mode=0o777)
    arguments = each_command(tmp_path, state) | {"bench": ["bench", "--directory", state]}
    # What the command imports is this user's, so it is imported first: by the same command on a place that is none.
    nowhere = [str(argument).replace(str(tmp_path), "/dev/null") for argument in arguments[name]]
    code = (
        f"import contextlib, io, os, fastsm.cli, fastsm.__main__\nwith contextlib.suppress(SystemExit), "
        f"contextlib.redirect_stderr(io.StringIO()):\n    fastsm.cli.app({nowhere!r})\n"
        "os.setegid(65534); os.seteuid(65534)\n" + RUN
    )
    done = run(tmp_path, *arguments[name], code=code)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch("fastsm: [^\n]*Permission denied[^\n]*\n", done.stderr), done.stderr
    assert str(tmp_path) in done.stderr


# ---- wrong paths --------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    """The folder that commands run in, with a state, a snapshot of it, an empty folder, and a file of another kind."""
    cwd = tmp_path / "cwd"
    (cwd / "empty").mkdir(parents=True)
    (cwd / "notes").write_bytes(b"some text")
    with fastsm.FastStateMachine(cwd / "state") as machine:
        machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
        machine.write_snapshot(cwd / "out")
    return cwd


NOTHING = "No such file or directory"
NEITHER = "expected a state directory or a snapshot, found a directory with neither CURRENT nor snapshot.fsm in it"
NO_STATE = "expected a state directory, found a directory without CURRENT"
FILE = "expected a state directory, found a file"
A_SNAPSHOT = "expected a state directory, found a snapshot; `fastsm restore` makes a state directory from it"
EITHER = ("inspect", "verify", "dump")
STATE = ("get", "scan", "count", "compact", "repair", "snapshot")
WRONG_PATHS = [
    *((name, "nowhere", NOTHING) for name in (*EITHER, *STATE)),
    *((name, "empty", NEITHER) for name in EITHER),
    *((name, path, says) for name in STATE for path, says in
      (("empty", NO_STATE), ("notes", FILE), ("out", A_SNAPSHOT))),
    ("get", "out/snapshot.fsm", A_SNAPSHOT),
    ("restore", "nowhere", NOTHING),
    ("restore", "empty", "expected a snapshot, found a directory without snapshot.fsm"),
    ("restore", "state", "expected a snapshot, found a state directory; `fastsm snapshot` writes one"),
]


RANGES = [
    ([], "a ab b c"),
    (["a"], "a ab"),
    (["--prefix", "a"], "a ab"),
    (["--from", "ab"], "ab b c"),
    (["--to", "b"], "a ab"),
    (["--from", "ab", "--to", "c"], "ab b"),
    (["a", "--from", "aa"], "ab"),
    (["--from", "YWI=", "--base64"], "ab b c"),
    (["--from", "x", "--to", "a"], ""),
]


@pytest.mark.parametrize(("arguments", "keys"), RANGES, ids=str)
def test_ranges_are_listed_and_counted(tmp_path, arguments, keys):
    """`scan` gives the keys of a range in their order, in reverse and up to a limit too; `count` how many they are."""
    (tmp_path / "cwd").mkdir()
    with fastsm.FastStateMachine(tmp_path / "cwd" / "state") as machine:
        machine.apply([(i, 1, fastsm.put(key.encode(), b"")) for i, key in enumerate(["c", "ab", "b", "a"], 1)])
    expected = keys.split()
    assert run(tmp_path, "count", "state", *arguments).stdout == f"{len(expected)}\n"
    for more, found in (([], expected), (["--reverse", "--limit", "2"], expected[::-1][:2])):
        done = run(tmp_path, "scan", "state", *arguments, *more)
        assert (done.returncode, done.stderr) == (0, "")
        assert [json.loads(line)["key"] for line in done.stdout.splitlines()] == found


def test_deadlines_are_shown(tmp_path):
    """`scan` and `get --json` give the deadline of a key that has one, under the name that `dump` gives it."""
    (tmp_path / "cwd").mkdir()
    with fastsm.FastStateMachine(tmp_path / "cwd" / "state") as machine:
        machine.apply([(1, 1, fastsm.put(b"lease", b"ann", expires=7_000)), (2, 1, fastsm.put(b"other", b"bob"))])
        machine.apply([(3, 1, fastsm.touch(b"lease", 9_000))])
    found = [json.loads(line) for line in run(tmp_path, "scan", "state").stdout.splitlines()]
    assert found == [{"key": "lease", "value": "ann", "expires": 9_000}, {"key": "other", "value": "bob"}]
    assert json.loads(run(tmp_path, "get", "state", "lease", "--json").stdout)["expires"] == 9_000
    assert "expires" not in json.loads(run(tmp_path, "get", "state", "other", "--json").stdout)
    for columns in (40, 80):
        drawn, _ = in_terminal(tmp_path / "cwd", columns, "scan", "state")
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)
        assert re.search("lease +3 B +9000 +ann", plain)  # short keys are in one line
        assert re.search("other +3 B +bob", plain)


def test_a_prefix_is_given_once(tmp_path, places):
    """PREFIX and --prefix together are wrong arguments."""
    done = run(tmp_path, "scan", "state", "a", "--prefix", "b")
    assert done.returncode == 2
    assert "PREFIX or --prefix" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("name", "path", "says"), WRONG_PATHS, ids=lambda value: value if len(value) < 20 else "")
def test_a_wrong_path_is_told_what_is_there_and_what_helps(tmp_path, places, name, path, says):
    """One line, status 1, and nothing is made."""
    more = {"get": ["a"], "snapshot": ["new"], "restore": ["new"]}.get(name, [])
    done = run(tmp_path, name, path, *more)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"fastsm: {path}: {says}\n")
    assert not (places / "new").exists()


def test_damage_is_told_once(tmp_path, places):
    """`inspect` shows the problem among what it found; the line of the error only says where help is."""
    log = places / "state" / "log-1"
    data = bytearray(log.read_bytes())
    data[130] ^= 1
    log.write_bytes(data)
    done = run(tmp_path, "inspect", "state")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("expected a frame") == 1
    assert done.stderr == "fastsm: state: damaged; `fastsm repair state` says what can be kept\n"


def test_the_shell_can_complete_the_command(tmp_path):
    """`--install-completion` is offered, and `--show-completion` prints a script."""
    done = run(tmp_path, "--help", env={**os.environ, "COLUMNS": "120", "TERM": "dumb"})
    assert "--install-completion" in done.stdout


# ---- the moment of the kill --------------------------------------------------------------------------


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


@pytest.mark.parametrize("place", ["the path itself", "snapshot.fsm in a folder", "CURRENT in a folder"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "FIFO"), ("verify", "FIFO"), ("get", "FIFO", "key"), ("scan", "FIFO"), ("count", "FIFO"),
        ("dump", "FIFO"), ("compact", "FIFO"), ("repair", "FIFO"), ("snapshot", "FIFO", "new"),
        ("restore", "FIFO", "new"),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_no_command_waits_for_a_fifo_without_a_writer(tmp_path, arguments, place):
    """A FIFO in place of a directory or a snapshot is an error at once, and nothing is made of it."""
    path = tmp_path / "fifo"
    if place != "the path itself":
        path.mkdir()
    os.mkfifo(path if place == "the path itself" else path / place.partition(" ")[0])
    done = run(tmp_path, *(str(path) if one == "FIFO" else one for one in arguments))
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr.replace("\n", "")
    assert os.listdir(tmp_path / "cwd") == []

"""The command ``fastsm`` as a user runs it: in processes of its own."""

import json
import os
import pathlib
import re
import subprocess
import tempfile

import pytest

import fastsm
from fastsm.disk import headers
from support.command_line import RUN, SECONDS, command, in_terminal, run

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


def test_files_of_another_release_are_not_called_damaged(tmp_path, places):
    """`inspect` says that this release cannot read them; `repair`, which would refuse them, is not recommended."""
    current = places / "state" / "CURRENT"
    changed = bytearray(current.read_bytes()[:-8])
    changed[8] = 7
    current.write_bytes(headers.with_checksum(bytes(changed)))
    done = run(tmp_path, "inspect", "state")
    advice = "this release cannot read it; use the release that wrote it"
    assert (done.returncode, done.stderr) == (1, f"fastsm: state: {advice}\n")
    assert "version 7" in done.stdout


def test_the_shell_can_complete_the_command(tmp_path):
    """`--install-completion` is offered, and `--show-completion` prints a script."""
    done = run(tmp_path, "--help", env={**os.environ, "COLUMNS": "120", "TERM": "dumb"})
    assert "--install-completion" in done.stdout


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

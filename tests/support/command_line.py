"""The command ``fastsm`` in a process of its own: in pipes, under way, or in a terminal."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time

import fastsm

# What `python -m fastsm` does, but without the current folder in front of everything.
RUN = "import sys; from fastsm.__main__ import main; sys.argv[0] = 'fastsm'; main()"
SECONDS = 60


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

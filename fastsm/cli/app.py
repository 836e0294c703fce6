"""What all commands share: the application, errors in one line, tables, progress bars."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, NoReturn

import typer
from rich.box import ROUNDED
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastsm
from fastsm.streams import give_up_output
from fastsm.tools.demo import MismatchError

TRY, LOOK, MOVE, REPAIR = "Try it", "Look", "Move", "Repair"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastsm {fastsm.__version__}")
        raise typer.Exit


@app.callback()
def fastsm_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """The Raft state machine for Python: the log is the store.

    DIR is the directory of a state machine, SNAPSHOT a snapshot's file or the directory that contains it. A directory
    that a process has open can be examined without disturbing that process; commands that would change it are refused,
    and name the process.
    """
    # Warnings of the library would mix with what is drawn here, which says the same.
    logging.getLogger("fastsm").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for file names, or symbols, that the terminal's encoding lacks


# ---- errors ------------------------------------------------------------------------------------------


def fail(message: object, status: int = 1) -> NoReturn:
    """Prints one line, and exits with a status."""
    typer.echo(f"fastsm: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turns errors that a user may encounter into one line; SIGTERM and SIGHUP clean up as Ctrl-C does."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except MismatchError as error:
        fail(f"MISMATCH: {error}")
    except (fastsm.FastsmError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            give_up_output()  # the reader of the output is gone
            raise typer.Exit(1) from None
        if isinstance(error, OSError) and error.strerror and error.filename:
            fail(f"{os.fsdecode(error.filename)}: {error.strerror}")
        if isinstance(error, OSError) and error.strerror:
            give_up_output()  # an error without a file name is one of the output stream
            fail(f"standard output: {error.strerror}")
        fail(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- arguments ---------------------------------------------------------------------------------------

Coded = Annotated[bool, typer.Option("--base64", help="The key is given in Base64.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def key_bytes(text: str, coded: bool) -> bytes:
    """Returns the bytes of a key: as it was typed in the shell, or, if ``coded``, decoded from Base64."""
    if not coded:
        return os.fsencode(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise typer.BadParameter(f"expected Base64: {error}") from None


# ---- output ------------------------------------------------------------------------------------------


def drawn(pairs: list[tuple[str, str]]) -> Table:
    """Returns labels and texts in a box."""
    table = Table(box=ROUNDED, show_header=False, border_style="dim")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in pairs:
        table.add_row(label, printable(text))
    return table


def show(pairs: list[tuple[str, str]]) -> None:
    """Prints labels and texts: a box in a terminal, plain lines in a pipe."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        console.print(drawn(pairs))
        return
    width = max((len(label) for label, _ in pairs), default=0)
    for label, text in pairs:
        print(f"{label:{width}}  {printable(text)}")


def printable(text: str) -> str:
    """Returns text from a file without control characters that a terminal would interpret."""
    return text if text.isprintable() else ascii(text)[1:-1]


def write_bytes(data: bytes) -> None:
    """Writes bytes as they are, whatever the terminal's encoding is."""
    sys.stdout.buffer.write(data)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Draws a progress bar in bytes on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows on stderr, if that is a terminal, that something without a known end is running."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield

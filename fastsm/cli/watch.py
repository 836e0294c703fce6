"""The command that follows a live directory: watch."""

from __future__ import annotations

import contextlib
import select
import sys
from typing import Annotated

import typer

from fastsm.cli.app import LOOK, app, key_bytes, told_in_one_line
from fastsm.cli.look import Dir
from fastsm.reading.reader import Reader
from fastsm.tools import inspection
from fastsm.tools.json_lines import change_line, line_bytes

PAUSE = 0.2  # seconds between two checks whether the output still has a reader


@app.command(rich_help_panel=LOOK)
def watch(
    directory: Dir,
    prefix: Annotated[str, typer.Option(help="Only keys with this prefix.", show_default=False)] = "",
    coded: Annotated[bool, typer.Option("--base64", help="The prefix is given in Base64.")] = False,
    first: Annotated[
        int | None, typer.Option("--from", min=0, help="From this entry on.", show_default="what comes from now on")
    ] = None,
    durable: Annotated[bool, typer.Option("--durable", help="Only what would survive a power loss.")] = False,
) -> None:
    """Follow a state: each change of a key as a line of JSON, as soon as its owner applies it. Ctrl-C ends it.

    It continues through restarts of the owner. Status 1 if entries that it should report are gone: compacted, or part
    of a state that was replaced.

    Example: `fastsm watch /var/lib/node/state --prefix user/ | jq .key`
    """
    with told_in_one_line(), contextlib.suppress(KeyboardInterrupt):
        inspection.require_state(directory)
        with (
            Reader(directory) as reader,
            reader.watch(key_bytes(prefix, coded), start=first, durable=durable) as changes,
        ):
            while True:
                for change in changes.read(timeout=PAUSE):
                    sys.stdout.buffer.write(line_bytes(change_line(change)))
                    sys.stdout.buffer.flush()
                require_reader()


def require_reader() -> None:
    """Raises ``BrokenPipeError`` if the output no longer has a reader, even if there is nothing to write."""
    poll = select.poll()
    poll.register(1, 0)  # a pipe or socket whose other end is gone is reported whatever events are requested
    if any(found & (select.POLLERR | select.POLLHUP) for _, found in poll.poll(0)):
        raise BrokenPipeError

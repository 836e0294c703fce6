"""Commands that only read: inspect, verify, get, scan, count."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastsm.cli.app import (
    LOOK,
    AsJson,
    Coded,
    app,
    bar,
    fail,
    key_bytes,
    printable,
    show,
    told_in_one_line,
    waiting,
    write_bytes,
)
from fastsm.reading.reader import Reader
from fastsm.tools import inspection
from fastsm.tools.json_lines import line_bytes, text_or_base64
from fastsm.units import count_text, size_text

GAP = 2  # between the columns of a table

Place = Annotated[Path, typer.Argument(metavar="DIR|SNAPSHOT", show_default=False)]
Dir = Annotated[Path, typer.Argument(metavar="DIR", show_default=False)]


@app.command(rich_help_panel=LOOK)
def inspect(place: Place, as_json: AsJson = False) -> None:
    """Show what a directory or a snapshot contains, and what opening it would find.

    Status 1 if it is damaged. Does not check every byte; `fastsm verify` does.

    Example: `fastsm inspect /var/lib/node/state --json | jq .last_applied_index`
    """
    with told_in_one_line():
        report = inspection.inspect(place)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            show(report.rows())
    if report.problem is not None:
        fail(f"{place}: {report.advice}")


@app.command(rich_help_panel=LOOK)
def verify(place: Place) -> None:
    """Check every byte of a directory or a snapshot against its checksum.

    Status 0 if everything is right; otherwise 1, and one line that names file and offset.

    Example: `fastsm verify /var/lib/node/snapshots && echo sound`
    """
    with told_in_one_line():
        with bar("verify") as progress:
            found = inspection.verify(place, progress)
        print(f"Every byte is right: {found}.")


@app.command(rich_help_panel=LOOK)
def get(
    directory: Dir,
    key: Annotated[str, typer.Argument(show_default=False)],
    coded: Coded = False,
    as_json: AsJson = False,
) -> None:
    """Print the value of a key: byte for byte in a pipe, as text in a terminal. Status 1 if there is no such key.

    Example: `fastsm get /var/lib/node/state color`
    """
    with told_in_one_line():
        inspection.require_state(directory)
        with Reader(directory) as state:
            name = key_bytes(key, coded)
            value, modified, expires = state.get(name), state.modified(name), state.deadline(name)
        if value is None or modified is None:
            fail(f"{directory}: no key {ascii(key)[1:-1]}")
        if as_json:
            line = {"index": modified.index, "term": modified.term}
            write_bytes(line_bytes(line | pair_line(name, value, expires)))
        elif sys.stdout.isatty():
            print(shown(value, len(value)))
        else:
            write_bytes(value)


Prefix = Annotated[str, typer.Argument(show_default="all keys")]
PrefixOption = Annotated[str | None, typer.Option("--prefix", help="The same as PREFIX.", show_default=False)]
From = Annotated[str | None, typer.Option("--from", help="Only this key and those after it.", show_default=False)]
To = Annotated[str | None, typer.Option("--to", help="Only keys before this one.", show_default=False)]


@app.command(rich_help_panel=LOOK)
def scan(
    directory: Dir,
    prefix: Prefix = "",
    prefix_option: PrefixOption = None,
    start: From = None,
    end: To = None,
    after: Annotated[str | None, typer.Option(help="Only keys after this one.", show_default=False)] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="From the last key to the first.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="At most this many keys.", show_default="all")] = None,
    coded: Coded = False,
    as_json: AsJson = False,
) -> None:
    """List the keys of a range or with a prefix, in their order, and their values.

    A table in a terminal, JSON lines in a pipe.

    Example: `fastsm scan /var/lib/node/state user/ --limit 20`
    """
    bounds = bounds_of(prefix, prefix_option, start, end, coded)
    if after is not None:
        following = key_bytes(after, coded) + b"\0"
        bounds["start"] = max(following, bounds["start"] or b"")
    with told_in_one_line():
        inspection.require_state(directory)
        with ExitStack() as stack:
            with waiting("scanning"):
                state = stack.enter_context(Reader(directory))
                ordered = state.ordered(**bounds, reverse=reverse)  # one by one, since memory may not suffice for all
            found = ((key, value, state.deadline(key)) for key, value in islice(ordered, limit))
            console = Console(highlight=False)
            if as_json or not console.is_terminal:
                for key, value, expires in found:
                    write_bytes(line_bytes(pair_line(key, value, expires)))
                return
            pairs = list(found)
            console.print(table_of(pairs, console.width))
            console.print(f"{count_text(len(pairs), 'key')} as of entry {state.last_applied().index:,}", style="dim")


@app.command(rich_help_panel=LOOK)
def count(
    directory: Dir,
    prefix: Prefix = "",
    prefix_option: PrefixOption = None,
    start: From = None,
    end: To = None,
    coded: Coded = False,
) -> None:
    """Print the number of keys in a range or with a prefix.

    Example: `fastsm count /var/lib/node/state --from job/2026-01 --to job/2026-02`
    """
    bounds = bounds_of(prefix, prefix_option, start, end, coded)
    with told_in_one_line():
        inspection.require_state(directory)
        with waiting("counting"), Reader(directory) as state:
            print(state.count(**bounds))


def bounds_of(
    prefix: str, prefix_option: str | None, start: str | None, end: str | None, coded: bool
) -> dict[str, bytes | None]:
    """Returns the bounds as typed, as arguments of the machine's methods."""
    if prefix and prefix_option is not None:
        raise typer.BadParameter("expected PREFIX or --prefix, found both")
    typed = {"start": start, "end": end, "prefix": prefix or prefix_option}
    return {name: None if text is None else key_bytes(text, coded) for name, text in typed.items()}


def pair_line(key: bytes, value: bytes, expires: int | None) -> dict[str, object]:
    """Returns a pair for JSON, with its deadline if it has one, under the name that a dump uses."""
    line = text_or_base64("key", key) | text_or_base64("value", value)
    return line if expires is None else line | {"expires": expires}


def table_of(pairs: list[tuple[bytes, bytes, int | None]], width: int) -> Table:
    """Returns a table: whole keys, on up to half of the width; values if there is room; deadlines if there are any."""
    keys = [shown(key, len(key)) for key, _, _ in pairs]
    widest = max(min(max(map(len, keys), default=3), width // 2), 3)
    deadlines = [str(expires) for _, _, expires in pairs if expires is not None]
    digits = max(map(len, ["expires", *deadlines])) if deadlines else 0
    room = width - widest - (GAP + 8) - (GAP + digits if deadlines else 0) - GAP  # else all columns are cut
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("key", style="cyan", overflow="fold", width=widest)
    table.add_column("bytes", justify="right", no_wrap=True, width=8)
    if deadlines:
        table.add_column("expires", justify="right", no_wrap=True, width=digits)
    table.add_column("value", no_wrap=True, overflow="ellipsis", width=max(1, room))
    for key, (_, value, expires) in zip(keys, pairs, strict=True):
        cells: list[Text | str] = [Text(key), size_text(len(value)), Text(shown(value, width))]
        if deadlines:
            cells.insert(2, "" if expires is None else str(expires))
        table.add_row(*cells)
    return table


def shown(data: bytes, limit: int) -> str:
    """Formats bytes for a terminal."""
    try:
        return printable(data[:limit].decode("utf-8"))
    except UnicodeDecodeError:
        return ascii(data[:limit])[2:-1]

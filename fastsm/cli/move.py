"""Commands that move a state: dump, load, snapshot, restore."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import typer

from fastsm.cli.app import MOVE, app, bar, key_bytes, told_in_one_line, waiting, write_bytes
from fastsm.cli.look import Dir, Place
from fastsm.machine import FastStateMachine
from fastsm.tools import inspection, json_lines
from fastsm.tools.new_state import new_state
from fastsm.types import LogId, log_id_text
from fastsm.units import count_text, size_text


@app.command(rich_help_panel=MOVE)
def dump(
    place: Place,
    log: Annotated[bool, typer.Option("--log", help="The records of the log, instead of the state.")] = False,
    prefix: Annotated[str, typer.Option(help="Only keys with this prefix.", show_default=False)] = "",
    coded: Annotated[bool, typer.Option("--base64", help="The prefix is given in Base64.")] = False,
    as_of: Annotated[
        int | None, typer.Option(min=0, help="The state after this entry.", show_default="last applied")
    ] = None,
    first: Annotated[int, typer.Option("--from", min=0, help="With --log: from this entry on.")] = 0,
    last: Annotated[
        int | None, typer.Option("--to", min=0, help="With --log: up to this entry.", show_default="the end")
    ] = None,
) -> None:
    """Write the state, or the log, as JSON lines: bytes that are text as text, others in Base64.

    Every byte is checked first. `fastsm load` reads the lines.

    Example: `fastsm dump /var/lib/node/state --prefix user/ > users.jsonl`
    """
    if log and (prefix or as_of is not None):
        raise typer.BadParameter("--log takes --from and --to, not --prefix or --as-of")
    if not log and (first or last is not None):
        raise typer.BadParameter("--from and --to need --log")
    with told_in_one_line():
        if log:
            lines = json_lines.dump_log(place, first=first, last=last)
        else:
            lines = json_lines.dump_state(place, prefix=key_bytes(prefix, coded), as_of=as_of)
        for line in lines:
            write_bytes(json_lines.line_bytes(line))


@app.command(rich_help_panel=MOVE)
def load(
    directory: Dir,
    file: Annotated[Path | None, typer.Argument(help="JSON lines.", show_default="standard input")] = None,
) -> None:
    """Make a new directory from JSON lines, as written by `fastsm dump` or by hand.

    From a whole dump it makes the same state, with its indexes and terms. By hand, `{"key": "a", "value": "b"}`
    suffices. The state is made completely or not at all: a dump that was cut short, or filtered, is an error.

    Example: `fastsm dump old | fastsm load new`
    """
    with told_in_one_line(), opened(file) as stream:
        with waiting("loading"):
            last, entries, keys = json_lines.load(directory, read_lines(stream))
        made = count_text(keys, "key"), count_text(entries, "entry", "entries"), log_id_text(last)
        print(f"{directory}: {', '.join(made)}.")


def opened(file: Path | None) -> BinaryIO:
    return sys.stdin.buffer if file is None else open(file, "rb")


def read_lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    yield from stream


@app.command(rich_help_panel=MOVE)
def snapshot(
    directory: Dir,
    out: Annotated[Path, typer.Argument(help="A directory, in which snapshot.fsm is written.", show_default=False)],
    compress: Annotated[Literal["none", "zstd"], typer.Option(help="zstd needs fastsm[zstd].")] = "none",
    as_of: Annotated[
        int | None, typer.Option(min=0, help="The state after this entry.", show_default="last applied")
    ] = None,
) -> None:
    """Write a snapshot of a state, even while its owner has it open. DIR does not record it.

    Every byte is checked first.

    Example: `fastsm snapshot /var/lib/node/state /backup/today --compress zstd`
    """
    with told_in_one_line():
        inspection.require_state(directory)
        reading = FastStateMachine(directory, read_only=True, verify_on_open="full")
        with bar("snapshot") as progress, reading as machine:
            included = None if as_of is None else LogId(as_of, machine.entry_term(as_of) or 0)
            metadata = machine.write_snapshot(out, included, compress=compress, progress=progress)
        size = size_text((out / "snapshot.fsm").stat().st_size)
        print(f"{out / 'snapshot.fsm'}: {size}, as of {log_id_text(metadata.last_included)}.")
        print(f"BLAKE3 {metadata.checksum.hex()}")


@app.command(rich_help_panel=MOVE)
def restore(
    snapshot: Annotated[Path, typer.Argument(metavar="SNAPSHOT", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty directory.", show_default=False)],
) -> None:
    """Make a state from a snapshot, which is checked and not changed.

    The state is made completely or not at all. DIR may be the root of a mounted, empty volume.

    Example: `fastsm restore /backup/today /var/lib/node/state`
    """
    with told_in_one_line():
        inspection.require_snapshot(snapshot)
        with bar("restore") as progress, new_state(directory) as machine:
            machine.install_snapshot(None, snapshot, progress=progress)
            keys, last = machine.len(), machine.last_applied()
        print(f"{directory}: {count_text(keys, 'key')} as of {log_id_text(last)}.")

"""Commands that change a directory that no process has open: compact, repair."""

from __future__ import annotations

from typing import Annotated

import typer

from fastsm.cli.app import REPAIR, app, bar, fail, printable, told_in_one_line, waiting
from fastsm.cli.look import Dir
from fastsm.machine import FastStateMachine
from fastsm.tools import inspection
from fastsm.tools.repair import examine
from fastsm.tools.repair import repair as repair_directory
from fastsm.units import size_text


@app.command(rich_help_panel=REPAIR)
def compact(
    directory: Dir,
    retain: Annotated[
        int, typer.Option(min=0, help="Snapshots as of any of this many last entries stay possible.")
    ] = 10_000,
) -> None:
    """Free the space of overwritten and deleted values.

    Example: `fastsm compact /var/lib/node/state --retain 0`
    """
    with told_in_one_line():
        inspection.require_state(directory)
        opened = FastStateMachine(directory, auto_compact=False, verify_on_open="full")
        with bar("compact") as progress, opened as machine:
            before = machine.stats()
            machine.compact(max(before.base.index, before.last_applied.index - retain), progress=progress)
            after = machine.stats()
        sizes = [size_text(stats.log_bytes + stats.base_bytes) for stats in (before, after)]
        if after.generation == before.generation:
            print(f"{directory}: nothing to do, all but the last {retain:,} entries are compact ({sizes[0]}).")
        else:
            print(f"{directory}: {sizes[0]} became {sizes[1]}, with a base as of entry {after.base.index:,}.")


@app.command(rich_help_panel=REPAIR)
def repair(
    directory: Dir,
    yes: Annotated[bool, typer.Option("--yes", help="Repair it. The old files are kept under other names.")] = False,
) -> None:
    """Show what is wrong with a directory that cannot be opened, and what repairing it would lose.

    Nothing is changed without --yes. A snapshot or another replica is the better way: repair loses entries that may
    have been acknowledged. Status 1 if something is wrong and was not repaired.

    Example: `fastsm repair /var/lib/node/state --yes`
    """
    with told_in_one_line():
        inspection.require_state(directory)
        with waiting("examining"):
            damage = examine(directory)
        if damage is None:
            print(f"{directory}: nothing to repair; opening it is enough.")
            return
        print(printable(f"{damage}."))
        if not yes:
            fail(f"{directory}: damaged, and nothing was changed; --yes repairs it")
        done = repair_directory(directory)
        kept = done[1] if done is not None else None
        print(f"{directory}: repaired." + (f" The log as it was is {kept}" if kept else ""))

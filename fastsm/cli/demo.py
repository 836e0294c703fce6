"""``fastsm demo``: draws what ``fastsm.tools.demo`` does."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from fastsm.cli.app import TRY, app, drawn, told_in_one_line
from fastsm.tools import demo as demos
from fastsm.tools.demo import Result, Work
from fastsm.tools.demo_history import standard_library
from fastsm.units import size_text, time_text

STEPS: dict[demos.Step, str] = {
    "read": "read files",
    "child": "apply in a child",
    "recover": "recover",
    "compare": "compare with model",
    "rest": "apply the rest",
    "reopen": "close and reopen",
    "verify": "compare with files",
}


@app.command(rich_help_panel=TRY)
def demo(
    directory: Annotated[
        Path | None,
        typer.Option(help="A new or empty directory, which is kept.", show_default="a temporary one"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Determines the history and the moment of the kill.", show_default="random"),
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Entries per call of apply.")] = 1000,
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Kill a process that applies entries, recover, and compare every key.

    The files of Python's standard library become Raft entries of several terms: puts, deletes,
    compare-and-swaps, batches. A child process applies them and is killed with SIGKILL, after entries that were
    never flushed. What it left is recovered here, compared with a model, and completed; then every key is
    compared with its file.

    Example: `fastsm demo --seed 7 --directory /tmp/state`
    """
    console = Console(highlight=False)
    lively = console.is_interactive
    with told_in_one_line():
        folder = str(source) if source else standard_library()
        seed = secrets.randbelow(10_000) if seed is None else seed
        title = f"[bold]fastsm demo --seed {seed}[/]: {escape(folder)} as a Raft log"
        console.print(title, soft_wrap=not lively)
        with drawn_steps(console) if lively else printed_steps() as report:
            place = None if directory is None else str(directory)
            result = demos.run_demo(place, source=folder, seed=seed, chunk=chunk, report=report)
        if lively:
            console.print(drawn(numbers(result)))
        else:
            print()
            for label, text in numbers(result):
                print(f"{label:18}  {text}")
        console.print(
            f"[bold green]All {result.files:,} keys equal their files.[/] {time_text(result.seconds)} in all."
        )
        if directory is not None:
            console.print(f"The state is kept in {escape(result.directory)}", soft_wrap=True)


class BarOrOutcome(ProgressColumn):
    """A bar while the step runs, then its outcome."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(ratio=1))
        self.bar = BarColumn(bar_width=None)

    def render(self, task: Task) -> RenderableType:
        outcome = task.fields.get("outcome")
        if outcome is None:
            return self.bar.render(task)
        return Text(outcome, no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def drawn_steps(console: Console) -> Iterator[demos.Reporter]:
    """Draws a line for each step, while it runs."""
    tick = "✓" if console.encoding.lower().startswith("utf") else "*"
    tasks: dict[demos.Step, TaskID] = {}
    columns = (
        TextColumn("{task.fields[mark]}", style="green"),
        TextColumn("{task.description}", style="bold"),
        BarOrOutcome(),
        TextColumn("{task.fields[spent]}", style="dim", justify="right"),
    )
    with Progress(*columns, console=console, expand=True) as progress:

        def report(now: demos.Progress) -> None:
            if now.step not in tasks:
                tasks[now.step] = progress.add_task(STEPS[now.step], mark=" ", spent="", outcome=None)
            task = tasks[now.step]
            progress.update(task, completed=now.done, total=now.total)
            if now.outcome is not None:
                spent = time_text(progress.tasks[task].elapsed or 0)
                progress.update(task, completed=now.total, mark=tick, spent=spent, outcome=now.outcome)

        yield report


@contextlib.contextmanager
def printed_steps() -> Iterator[demos.Reporter]:
    """Prints a line for each finished step, for pipes and logs."""

    def report(now: demos.Progress) -> None:
        if now.outcome is not None:
            print(f"{STEPS[now.step]:18}  {now.outcome}", flush=True)

    yield report


def numbers(result: Result) -> list[tuple[str, str]]:
    """Returns the numbers of a demo, as labels and texts."""
    recovery = result.recovery
    killed = f"entry {result.acknowledged.index:,}; those after {result.flushed.index:,} were never flushed"
    more = result.recovered.index - result.acknowledged.index
    balance = f"{more:,} more" if more else "none lost"
    end = "clean" if recovery.clean else "unclean"
    torn = f"{size_text(recovery.torn_bytes)} torn and cut off" if recovery.torn_bytes else "nothing torn"
    return [
        ("keys", f"{result.files:,}, {size_text(result.file_bytes)}"),
        ("entries", f"{result.entries:,} of {result.terms} terms, {size_text(result.command_bytes)}"),
        ("killed after", killed),
        ("recovered", f"entry {result.recovered.index:,} of term {result.recovered.term}, {balance}"),
        ("found", f"{recovery.frames:,} frames, {size_text(recovery.log_bytes)}"),
        ("end of the log", f"{end}, {torn}"),
        ("recovery", f"{time_text(result.recover_seconds)}, {time_text(recovery.seconds)} of it for the log"),
        ("reopening", f"{time_text(result.reopen_seconds)} after a clean close"),
        ("apply, child", rate(result.child)),
        ("apply, parent", rate(result.parent)),
        ("flush, child", flushes(result.child)),
        ("flush, parent", flushes(result.parent)),
        ("get", f"{time_text(result.get_seconds)}, median over all keys"),
    ]


def rate(work: Work) -> str:
    if not work.apply_seconds:
        return "nothing left to apply"
    speed = size_text(work.command_bytes / work.apply_seconds)
    return f"{work.entries / work.apply_seconds:,.0f} entries/s, {speed}/s"


def flushes(work: Work) -> str:
    if not work.flushes:
        return "none"
    return f"{work.flushes:,} in {time_text(work.flush_seconds)}"

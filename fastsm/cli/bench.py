"""``fastsm bench``: draws what ``fastsm.tools.benchmark`` measures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fastsm.cli.app import TRY, app, fail, told_in_one_line
from fastsm.tools import benchmark


@app.command(rich_help_panel=TRY)
def bench(
    as_json: Annotated[bool, typer.Option("--json", help="Print every round's numbers as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw a chart: PNG, SVG or PDF. Needs matplotlib.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to keep files during the run; use a real disk.")
    ] = None,
) -> None:
    """Measure fastsm on this machine, compared with a dict, SQLite and (if installed) LMDB, in a minute or two.

    Example: `fastsm bench --json > numbers.json`
    """
    console = Console(stderr=True)
    with told_in_one_line():
        scratch = tempfile.TemporaryDirectory(prefix="fastsm-bench-", dir=directory or Path.cwd())
        with scratch as name, console.status("measuring") as status:
            found = benchmark.run(Path(name), lambda text: status.update(f"measuring: {text}"))
        if as_json:
            typer.echo(benchmark.as_json(found))
        else:
            draw(found)
        if plot is not None:
            try:
                benchmark.plot(found, plot)
            except ImportError:
                fail("--plot needs matplotlib: pip install matplotlib")
            typer.echo(f"drawn: {plot}", err=True)


def draw(found: list[benchmark.Measured]) -> None:
    about = benchmark.machine()
    rows = benchmark.table(found)
    drawn = Table(title=f"{benchmark.KEYS:,} keys of 16 bytes, values of 100; lower is better", title_justify="left")
    for i, name in enumerate(next(rows)):
        drawn.add_column(name, justify="right" if i else "left", style="bold" if name == "fastsm" else "")
    for row in rows:
        drawn.add_row(*row)
    console = Console()
    console.print(drawn)
    console.print(
        f"Medians of {benchmark.ROUNDS} interleaved rounds; in brackets the ratio to the dict, which is not durable. "
        f"{about['system']}, {about['processor']}, {about['cores']} cores, Python {about['python']}, "
        f"load {about['load']:.1f}.", style="dim", highlight=False)

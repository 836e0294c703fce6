"""Tables and pictures of what a run left: `docs/benchmarks.md` and `docs/img`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.harness import Result, read_results
from bench.pictures import draw
from bench.targets import ROWS, verdict

INTRODUCTION = """# Benchmarks

`python -m bench report` makes this page from what `pytest bench` and `python -m bench scale` measured; do not edit it.

Each ratio is to a base timed in the same process, in interleaved rounds of alternating order: the median of the
rounds' ratios, and their spread. Below 1 is faster than the base. Keys have 16 random bytes, values 100, chunks 1,000
entries, unless stated otherwise. *Fresh* keys are equal keys as new objects, in shuffled order: no hash is cached in
them. *dict* is a plain `dict` doing the same from a Python loop, with no durability at all. Commands are made before
the timing starts.
"""


def spread(result: Result) -> str:
    return f"{min(result.values):.3g} to {max(result.values):.3g}"


def about_table(about: dict[str, Any]) -> list[str]:
    names = ("commit", "time", "cpu", "cores", "memory_gib", "kernel", "file_system", "python", "load_at_start")
    lines = ["## The machine", "", "| | |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {about.get(name, '')} |" for name in names]
    lines += [f"| {name.replace('_', ' ')} | {value:,.3g} |" for name, value in about.get("limits", {}).items()]
    if about.get("load_at_start", 0) > 1:
        lines += ["", "**The machine was busy with other work**: absolute numbers say little, spreads are wide."]
    return [*lines, ""]


def target_table(results: dict[tuple[str, str], Result]) -> list[str]:
    lines = [
        "## fastsm", "", "Measured by `pytest bench -q` (with `--peers`: the others as well).", "",
        "| work | base | measured | spread | target | |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, row in ROWS.items():
        result = results.get((name, "fastsm"))
        if result is None:
            continue
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        target = "" if row.target is None else f"≤ {row.target:g}{unit}"
        missed = "missed" if verdict(result).endswith("MISSED") else ""
        measured = f"{result.median:.3g}{unit} | {spread(result)}"
        lines.append(f"| {row.work} | {row.base} | {measured} | {target} | {missed} |")
    return [*lines, ""]


def peer_table(results: dict[tuple[str, str], Result]) -> list[str]:
    """The same ratios of the peers, the best of each row in bold."""
    peers = sorted({who for _, who in results if who != "fastsm"})
    if not peers:
        return []
    columns = ["fastsm", *peers]
    lines = ["## Peers", "", "The same ratios to the same base, timed in turns with it.", ""]
    lines += ["| work | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, row in ROWS.items():
        found = {who: results[name, who].median for who in columns if (name, who) in results}
        if len(found) > 1:
            best = min(found, key=lambda who: found[who])
            cells = [f"{found[who]:.3g}" if who in found else "" for who in columns]
            cells = [f"**{cell}**" if who == best else cell for who, cell in zip(columns, cells, strict=True)]
            lines.append(f"| {row.work} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def scale_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Scale", "", "Keys of 8 bytes, values of 32: `python -m bench scale --largest 50000000`.", "",
        "| keys | apply, ns an entry | longest apply, ms | get, ns | get_many, ns a key | private bytes a key | "
        "disk bytes a key | snapshot, s | open, ms | open full, s |",
        "| ---: |" + " ---: |" * 9,
    ]  # fmt: skip
    for row in rows:
        keys = row["keys"]
        cells = [
            f"{row['apply_ns']:.0f}", f"{row['longest_ms']:.2g}", f"{row['get_ns']:.0f}", f"{row['get_many_ns']:.0f}",
            f"{row['private_bytes'] / keys:.1f}", f"{row['disk_bytes'] / keys:.0f}", f"{row['snapshot_s']:.3g}",
            f"{row['open_background_s'] * 1e3:.3g}", f"{row['open_full_s']:.3g}",
        ]  # fmt: skip
        lines.append(f"| {keys:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_report(paths: list[Path], docs: Path) -> int:
    """Takes results of one or more files; later ones win, row by row."""
    about: dict[str, Any] = {}
    results: dict[tuple[str, str], Result] = {}
    for path in paths:
        found_about, found = read_results(path)
        about = about or found_about
        results.update({(result.row, result.who): result for result in found})
    scale = sorted(
        (result.extra for (row, _), result in results.items() if row.startswith("scale.")), key=lambda row: row["keys"])
    (docs / "img").mkdir(parents=True, exist_ok=True)
    pictures = draw(results, scale, docs / "img")
    lines = [INTRODUCTION, *about_table(about), *target_table(results), *peer_table(results), *scale_table(scale)]
    lines += [Path(__file__).with_name("notes.md").read_text()]
    if pictures:
        lines += ["## Pictures", ""]
        lines += [line for title, name in pictures for line in (f"![{title}](img/{name})", "")]
    (docs / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"{docs / 'benchmarks.md'}: {len(results)} results, {len(pictures)} pictures")
    return 0



"""Tables and pictures of a run's results, written to `docs/benchmarks.md` and `docs/img`."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

from bench.harness import Result, read_results
from bench.pictures import draw
from bench.targets import ROWS, verdict

INTRODUCTION = """# Benchmarks

![Time that a dict, LMDB, SQLite and rocksdict take for common work, compared with fastsm](img/peers.svg)
"""

READING = """
One million keys of 16 random bytes, values of 100 bytes; shorter is better. Each time is the median of
interleaved rounds on one machine, described below; in brackets is the ratio to fastsm: above 1, fastsm is faster.
"dict" keeps everything in memory and nothing on a disk; with † it has a log that it appends to, and pickles itself for
a snapshot.
"""

SUMMARY = {  # by row: the work, and what one time covers
    "get.1m.fresh": ("read one key", "a key"),
    "apply.100": ("apply entries, 100 at a time: half overwrites, a tenth deletes", "an entry"),
    "flush.100": ("apply 100 entries and make them durable", "100 entries"),
    "load": ("load a million keys", "all"),
    "snapshot": ("write a snapshot of a million keys", "all"),
    "open.background": ("open a million keys after a clean close", "all"),
}
COLUMNS = {"fastsm": "fastsm", "dict": "dict", "lmdb": "LMDB", "sqlite": "SQLite", "rocksdict": "rocksdict"}

ALL_ROWS = """
Each ratio is to a base timed in the same process, in interleaved rounds of alternating order: the median of the
rounds' ratios, and their spread. Below 1 is faster than the base. Keys have 16 random bytes, values 100, chunks 1,000
entries, unless stated otherwise. *Fresh* keys are equal keys as new objects, in shuffled order: no hash is cached in
them. *dict* is a plain `dict` doing the same from a Python loop, with no durability at all. Commands are made before
the timing starts. `pytest bench -q --peers` and `python -m bench scale` measured this, and `python -m bench report`
makes this page; do not edit it.
"""


def seconds_of(results: dict[tuple[str, str], Result], row: str, who: str) -> tuple[float | None, str]:
    """Return the median time of one piece of work, in seconds or None if it was not measured, and a footnote mark."""
    if who == "dict":
        own = results.get((row, "fastsm"))
        if own is not None and own.base and ROWS[row].base.startswith("dict"):
            return statistics.median(own.base) / per(own, row), ""
        return seconds_of(results, row, "dict_log")[0], "†"
    result = results.get((row, who))
    if result is None:
        return None, ""
    if result.subject:
        return statistics.median(result.subject) / per(result, row), ""
    return result.median * {"ms": 1e-3, "us": 1e-6, "ns": 1e-9}[result.unit], ""


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 99 else f"{ratio:,.0f}"


def per(result: Result, row: str) -> int:
    return 1 if SUMMARY[row][1] == "all" else result.items


def stores_of(results: dict[tuple[str, str], Result], row: str) -> dict[str, float]:
    """Return the seconds of each store that was measured."""
    found = {name: seconds_of(results, row, who)[0] for who, name in COLUMNS.items()}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def time_text(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def summary_table(results: dict[tuple[str, str], Result]) -> list[str]:
    lines = [
        "| work | time of | " + " | ".join(COLUMNS.values()) + " |",
        "| --- | --- |" + " ---: |" * len(COLUMNS),
    ]
    for row, (work, of) in SUMMARY.items():
        own, _ = seconds_of(results, row, "fastsm")
        if own is None:
            continue
        cells = []
        for who in COLUMNS:
            found, mark = seconds_of(results, row, who)
            if found is None:
                cells.append("")
            else:
                cells.append(time_text(found) + mark + ("" if who == "fastsm" else f" ({ratio_text(found / own)})"))
        lines.append(f"| {work} | {of} | " + " | ".join(cells) + " |")
    return [*lines, ""]


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
        "## All rows, with the project's own targets", ALL_ROWS,
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
    """Return the table of the other stores' ratios to the same bases, the best of each row in bold."""
    peers = sorted({who for _, who in results if who != "fastsm"})
    if not peers:
        return []
    columns = ["fastsm", *peers]
    lines = ["### The other stores", "", "The same ratios to the same base, timed in turns with it.", ""]
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
        "### Scale", "", "Keys of 8 bytes, values of 32: `python -m bench scale --largest 50000000`.", "",
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
    return [*lines, "", *order_table([row for row in rows if "scan_us" in row])]


def order_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "The same keys in order: the first ordered read builds the order, which is then saved with the table.", "",
        "| keys | building, s | scan(limit=100), us | count of a tenth, ms | a new key, and a scan, us | bytes a key | "
        "close, s | open and scan, ms |",
        "| ---: |" + " ---: |" * 7,
    ]  # fmt: skip
    for row in rows:
        cells = [
            f"{row['order_build_s']:.3g}", f"{row['scan_us']:.1f}", f"{row['count_ms']:.3g}",
            f"{row['insert_scan_us']:.1f}", f"{row['order_bytes'] / row['keys']:.1f}", f"{row['close_ordered_s']:.3g}",
            f"{row['open_ordered_s'] * 1e3:.3g}",
        ]  # fmt: skip
        lines.append(f"| {row['keys']:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_report(paths: list[Path], docs: Path) -> int:
    """Write the report of one or more files of results; where files have the same row, the last one counts."""
    about: dict[str, Any] = {}
    results: dict[tuple[str, str], Result] = {}
    for path in paths:
        found_about, found = read_results(path)
        about = about or found_about
        results.update({(result.row, result.who): result for result in found})
    scale = sorted(
        (result.extra for (row, _), result in results.items() if row.startswith("scale.")), key=lambda row: row["keys"])
    (docs / "img").mkdir(parents=True, exist_ok=True)
    times = {work: stores_of(results, row) for row, (work, _) in SUMMARY.items() if (row, "fastsm") in results}
    pictures = draw(results, scale, times, docs / "img")
    costs, rest = Path(__file__).with_name("notes.md").read_text().split("<!-- pictures and rows -->\n")
    lines = [INTRODUCTION, READING.strip(), "", *summary_table(results), costs]
    for picture in pictures:
        lines += ["", f"![{picture.title}](img/{picture.name})", "", textwrap.fill(picture.caption, 120)]
    lines += ["", *about_table(about), *target_table(results), *peer_table(results), *scale_table(scale), rest]
    (docs / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"{docs / 'benchmarks.md'}: {len(results)} results, {len(pictures)} pictures")
    return 0

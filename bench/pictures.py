"""The pictures of a report, drawn with matplotlib; each answers one question.

Colors are Okabe and Ito's, which color-blind readers can tell apart. The background is transparent and the text gray,
so that each picture is readable on a light and on a dark page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.harness import Result

Results = dict[tuple[str, str], Result]
Scale = list[dict[str, Any]]
ORANGE, BLUE, GREEN, YELLOW, PURPLE = "#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7"
TEXT, GRID = "#808080", "#80808040"
STORES = {"fastsm": ORANGE, "dict": PURPLE, "LMDB": BLUE, "SQLite": GREEN, "rocksdict": YELLOW}
MARKS = "osD^v"
Times = dict[str, dict[str, float]]  # seconds, by work and store


class Picture(NamedTuple):
    """One picture in docs/img."""

    name: str
    title: str
    caption: str


def axes(x: str, y: str, *, height: float = 4) -> Axes:
    figure, made = plt.subplots(figsize=(7.5, height), layout="constrained")
    figure.patch.set_alpha(0)
    made.patch.set_alpha(0)
    made.set_xlabel(x, color=TEXT)
    made.set_ylabel(y, color=TEXT)
    made.tick_params(colors=TEXT)
    made.spines[["top", "right"]].set_visible(False)
    made.spines[["left", "bottom"]].set_color(TEXT)
    made.grid(visible=True, color=GRID, linewidth=0.8)
    made.set_axisbelow(True)
    return made


def legend(made: Axes, columns: int = 1) -> None:
    """Put the legend above the picture, where it hides nothing."""
    made.legend(frameon=False, labelcolor=TEXT, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def save(made: Axes, path: Path) -> None:
    # No date, so that equal data make an equal file.
    made.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)  # type: ignore[union-attr]
    plt.close(made.figure)  # type: ignore[arg-type]


def line(made: Axes, scale: Scale, value: Callable[[dict[str, Any]], float], label: str, color: str) -> None:
    keys = [row["keys"] for row in scale]
    made.plot(keys, [value(row) for row in scale], marker="o", color=color, label=label, linewidth=2)


def rate(results: Results, scale: Scale) -> Axes | None:
    if not scale:
        return None
    made = axes("keys", "million a second")
    line(made, scale, lambda row: 1e3 / row["get_many_ns"], "get_many, 1,000 at a time", BLUE)
    line(made, scale, lambda row: 1e3 / row["get_ns"], "get", ORANGE)
    line(made, scale, lambda row: 1e3 / row["apply_ns"], "apply of new keys, chunks of 1,000", GREEN)
    made.set_xscale("log")
    made.set_ylim(0)
    legend(made)
    return made


def reopening(results: Results, scale: Scale) -> Axes | None:
    if not scale:
        return None
    made = axes("keys", "seconds")
    line(made, scale, lambda row: row["open_background_s"], "opening; bytes are checked in the background", BLUE)
    line(made, scale, lambda row: row["open_full_s"], "opening, every byte checked before it returns", ORANGE)
    line(made, scale, lambda row: row["snapshot_s"], "a snapshot, with checksum and fsync", GREEN)
    made.set_xscale("log")
    made.set_yscale("log")
    legend(made)
    return made


def memory(results: Results, scale: Scale) -> Axes | None:
    worst = results.get(("memory.private.worst", "fastsm"))
    if worst is None or "dict" not in worst.extra:
        return None
    sizes = [found for found in worst.extra["sizes"] if found[0] >= 100_000]
    keys = [size for size, _, _ in sizes]
    made = axes("keys", "bytes a key")
    made.plot(*zip(*worst.extra["dict"], strict=True), marker="s", color=PURPLE, linewidth=2, label="dict, all of it")
    made.plot(keys, [private + mapped for _, private, mapped in sizes], marker="o", color=BLUE, linewidth=2,
              label="fastsm with its mapped files, which the system may drop and read again")
    made.plot(keys, [private for _, private, _ in sizes], marker="o", color=ORANGE, linewidth=2,
              label="fastsm, memory of the process's own")
    made.set_xscale("log")
    made.set_ylim(0)
    legend(made)
    return made


def latency(results: Results, scale: Scale) -> Axes | None:
    reader = results.get(("snapshot.reader.p9999", "fastsm"))
    if reader is None:
        return None
    made = axes("of a hundred reads, so many take at most this time", "microseconds")
    names = [f"{mark:g}" for mark in reader.extra["percentiles"]] + ["longest"]
    lines = (
        ("without", "nobody else works", GREEN), ("next to C", "a thread in C hashes and writes as many bytes", BLUE),
        ("with", "a snapshot is being written", ORANGE),
    )  # fmt: skip
    for which, label, color in lines:
        times = [time / 1e3 for time in [*reader.extra[which], reader.extra[f"{which}_longest"]]]
        made.plot(names, times, marker="o", label=label, color=color, linewidth=2)
    made.set_yscale("log")
    legend(made)
    return made


def stores(times: Times) -> Axes | None:
    """Draw each store's time as a multiple of fastsm's, with one row of marks for each kind of work."""
    if not times:
        return None
    names = [name for name in STORES if any(name in found for found in times.values())]
    made = axes("time compared with fastsm, logarithmic: to the right of 1, fastsm is faster", "",
                height=1.3 + 0.55 * len(times))
    for name, mark in zip(names, MARKS, strict=False):
        rows = [(found[name] / found["fastsm"], row) for row, found in enumerate(times.values()) if name in found]
        ratios, places = zip(*rows, strict=True)
        made.scatter(ratios, places, s=70, marker=mark, label=name, color=STORES[name], zorder=3)
    made.margins(0.08)
    made.set_yticks(range(len(times)), [textwrap.fill(work, 34) for work in times], fontsize=9)
    made.invert_yaxis()
    made.set_xscale("log")
    made.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    made.axvline(1, color=ORANGE, linewidth=1)
    made.figure.legend(frameon=False, labelcolor=TEXT, loc="outside upper left", ncols=len(names))
    return made


PICTURES: dict[Picture, Callable[[Results, Scale], Axes | None]] = {
    Picture("latency.svg", "Reads while a snapshot is written",
            "How long a read takes while a snapshot of a million keys is written. The writer works without the "
            "interpreter's lock, so reader and writer compete only for the processor's caches and the disk."): latency,
    Picture("memory.svg", "Memory per key",
            "Memory per key, with 16-byte keys and 100-byte values. The records are in the mapped log, which the "
            "system may drop and read again; only table and terms are the process's own."): memory,
    Picture("rate.svg", "Rates over the size of the table", "Rates over the number of keys."): rate,
    Picture("reopening.svg", "Opening and snapshots over the size of the table",
            "Opening after a clean close, and snapshots, over the number of keys."): reopening,
}  # fmt: skip


def draw(results: Results, scale: Scale, times: Times, directory: Path) -> list[Picture]:
    """Draw the pictures that there are results for; return them, except the one of the stores."""
    mpl.rcParams["svg.hashsalt"] = "fastsm"
    drawn = []
    for picture, made_of in PICTURES.items():
        made = made_of(results, scale)
        if made is not None:
            save(made, directory / picture.name)
            drawn.append(picture)
    made = stores(times)
    if made is not None:
        save(made, directory / "peers.svg")
    return drawn

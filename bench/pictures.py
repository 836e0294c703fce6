"""The pictures of a report, drawn with matplotlib: one question each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.harness import Result
from bench.targets import ROWS

Results = dict[tuple[str, str], Result]
Scale = list[dict[str, Any]]
BLUE, ORANGE, GRAY = "#2a6f97", "#d1602b", "#8a8a8a"


def axes(title: str, x: str, y: str, *, height: float = 4) -> Axes:
    figure, made = plt.subplots(figsize=(7.5, height), layout="constrained")
    figure.patch.set_facecolor("white")
    made.set_title(title, loc="left", fontsize=12)
    made.set_xlabel(x)
    made.set_ylabel(y)
    made.spines[["top", "right"]].set_visible(False)
    made.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    made.set_axisbelow(True)
    return made


def save(made: Axes, path: Path) -> None:
    # Without a date, equal data make an equal file.
    made.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)  # type: ignore[union-attr]
    plt.close(made.figure)  # type: ignore[arg-type]


def line(made: Axes, scale: Scale, value: Callable[[dict[str, Any]], float], label: str, color: str) -> None:
    keys = [row["keys"] for row in scale]
    numbers = [value(row) for row in scale]
    made.plot(keys, numbers, marker="o", color=color, label=label, linewidth=2)
    made.annotate(f" {numbers[-1]:.3g}", (keys[-1], numbers[-1]), color=color, va="bottom", fontsize=9)


def rate(results: Results, scale: Scale) -> Axes | None:
    if not scale:
        return None
    made = axes("Rate over table size (8-byte keys, 32-byte values)", "keys", "million a second")
    line(made, scale, lambda row: 1e3 / row["get_many_ns"], "get_many, 1,000 at a time", BLUE)
    line(made, scale, lambda row: 1e3 / row["get_ns"], "get", ORANGE)
    line(made, scale, lambda row: 1e3 / row["apply_ns"], "apply of new keys, chunks of 1,000", GRAY)
    made.set_xscale("log")
    made.set_ylim(0)
    made.legend(frameon=False)
    return made


def reopening(results: Results, scale: Scale) -> Axes | None:
    if not scale:
        return None
    made = axes("Opening and snapshots over table size", "keys", "seconds")
    line(made, scale, lambda row: row["open_background_s"], 'open, "background"', BLUE)
    line(made, scale, lambda row: row["open_full_s"], 'open, "full": every byte checked', ORANGE)
    line(made, scale, lambda row: row["snapshot_s"], "snapshot, BLAKE3 and fsync included", GRAY)
    made.set_xscale("log")
    made.set_yscale("log")
    made.legend(frameon=False)
    return made


def memory(results: Results, scale: Scale) -> Axes | None:
    worst = results.get(("memory.private.worst", "fastsm"))
    if worst is None:
        return None
    sizes = [(size, private) for size, private, _ in worst.extra["sizes"] if size >= 100_000]
    made = axes("Private memory a key", "keys", "bytes a key")
    made.plot(*zip(*sizes, strict=True), marker="o", color=BLUE, linewidth=2)
    made.axhline(24, color=GRAY, linestyle="--", linewidth=1)
    made.annotate("target for the worst size", (sizes[-1][0], 24), ha="right", va="bottom", color=GRAY, fontsize=9)
    made.set_xscale("log")
    made.set_ylim(0)
    return made


def latency(results: Results, scale: Scale) -> Axes | None:
    reader = results.get(("snapshot.reader.p9999", "fastsm"))
    if reader is None:
        return None
    made = axes("A reader's get while a snapshot of a million keys is written", "percentile", "microseconds")
    names = [f"{mark:g}" for mark in reader.extra["percentiles"]] + ["longest"]
    lines = (
        ("without", "without", GRAY), ("next to C", "while C hashes and writes as much", BLUE),
        ("with", "while it is written", ORANGE),
    )  # fmt: skip
    for which, label, color in lines:
        times = [time / 1e3 for time in [*reader.extra[which], reader.extra[f"{which}_longest"]]]
        made.plot(names, times, marker="o", label=label, color=color, linewidth=2)
    made.set_yscale("log")
    made.legend(frameon=False)
    return made


def peers(results: Results, scale: Scale) -> Axes | None:
    wanted = ["get.1m.fresh", "apply.1", "apply.100", "flush.100", "load", "snapshot"]
    names = sorted({who for _, who in results if who != "fastsm"})
    if not names:
        return None
    columns = ["fastsm", *names]
    made = axes("Time as a ratio to each row's base (base = 1, left is faster)", "ratio, logarithmic", "", height=5.5)
    marks = "osD^vP*X"
    for i, who in enumerate(columns):
        rows = [(results[row, who].median, wanted.index(row)) for row in wanted if (row, who) in results]
        if rows:
            ratios, heights = zip(*rows, strict=True)
            made.scatter(
                ratios, heights, s=90 if who == "fastsm" else 45, marker=marks[i % len(marks)], label=who,
                color=ORANGE if who == "fastsm" else plt.get_cmap("Blues")(0.35 + 0.6 * i / len(columns)), zorder=3)
    made.axvline(1, color=GRAY, linewidth=1)
    made.set_yticks(range(len(wanted)), [ROWS[row].work for row in wanted], fontsize=8)
    made.invert_yaxis()
    made.set_xscale("log")
    made.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


PICTURES: dict[str, tuple[str, Callable[[Results, Scale], Axes | None]]] = {
    "rate.svg": ("Rate over table size", rate),
    "latency.svg": ("Latency while a snapshot is written", latency),
    "reopening.svg": ("Opening over table size", reopening),
    "memory.svg": ("Memory a key", memory),
    "peers.svg": ("fastsm and its peers", peers),
}


def draw(results: Results, scale: Scale, directory: Path) -> list[tuple[str, str]]:
    """Draws what there are results for; titles and file names."""
    mpl.rcParams["svg.hashsalt"] = "fastsm"
    drawn = []
    for name, (title, picture) in PICTURES.items():
        made = picture(results, scale)
        if made is not None:
            save(made, directory / name)
            drawn.append((title, name))
    return drawn

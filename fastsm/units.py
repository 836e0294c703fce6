"""Numbers for people: sizes, times, counts."""

from __future__ import annotations


def size_text(size: float) -> str:
    """Formats bytes in decimal units, as ``"1.5 MB"``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def time_text(seconds: float) -> str:
    """Formats seconds, as ``"1.5 ms"``."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.{1 if seconds * factor < 100 else 0}f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def count_text(count: int, one: str, many: str = "") -> str:
    """Formats a count, as ``"1 key"`` or ``"1,200 keys"``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"

"""The machine that a run uses: its description, and its own limits."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3

from fastsm.disk.hashing import siphash

CHECKOUT = Path(__file__).resolve().parent.parent


def describe(directory: Path) -> dict[str, Any]:
    """Return everything that a result depends on and that the system reports."""
    return {
        "commit": commit(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "cpu": cpu(), "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": f"{platform.system()} {platform.release()}", "file_system": file_system(directory),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_at_start": os.getloadavg()[0],
    }  # fmt: skip


def commit() -> str:
    git = ["git", "-C", str(CHECKOUT)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.stdout.strip() else "")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def file_system(directory: Path) -> str:
    """Return the type of the file system that holds a directory."""
    best = ("", "unknown")
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            inside = str(directory.resolve()).startswith(mount.rstrip("/") + "/")
            if inside and len(mount) > len(best[0]):
                best = (mount, kind)
    except OSError:
        pass
    return best[1]


def limits(directory: Path) -> dict[str, float]:
    """Measure what no store on this machine can beat; takes about two seconds, in the same run as the rest."""
    block = bytearray(os.urandom(64 << 20))
    target = bytearray(len(block))

    def copy() -> None:
        target[:] = block

    mib = bytes(block[: 1 << 20])
    return {
        "empty_c_call_ns": per_call(bytes(1).isalpha, 1_000_000),
        "compiled_call_ns": per_call(lambda: None, 1_000_000),
        "siphash_call_16_bytes_ns": per_call(lambda: siphash(b"0123456789abcdef"), 300_000),
        "memcpy_gb_per_s": len(block) / median_of(copy) / 1e9,
        "blake3_gb_per_s": len(block) / median_of(lambda: blake3.blake3(block).digest()) / 1e9,
        "write_1_mib_us": 1e6 * written(directory, mib, 64, sync=False),
        "write_fdatasync_16_kib_us": 1e6 * written(directory, mib[: 16 << 10], 64, sync=True),
        "write_fsync_128_mib_ms": 1e3 * written(directory, bytes(block) * 2, 1, sync=True),
    }


def per_call(function: Callable[[], object], count: int) -> float:
    """Return the nanoseconds of a call from a Python loop, the loop included."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count * 1e9


def median_of(function: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def written(directory: Path, piece: bytes, count: int, *, sync: bool) -> float:
    """Return the median seconds of appending a piece to a file, with `fdatasync` or without."""
    path = directory / "bare-write"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            write_all(descriptor, piece)
            if sync:
                sync_data(descriptor)
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    finally:
        os.close(descriptor)
        path.unlink()


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of the data, in several calls if necessary: one system call takes at most 2 GiB."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


sync_data: Callable[[int], object] = os.fsync if sys.platform == "darwin" else os.fdatasync

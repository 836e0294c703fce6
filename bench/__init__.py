"""Benchmarks: how fast fastsm is, compared with its base, its peers and the bare machine.

    data        sizes, short ones with `--smoke`; seeded keys, values and changes
    harness     timing in interleaved rounds, and the JSON that a run writes
    machine     the machine that a run uses: its description, and its own limits as measured
    targets     the rows of docs/benchmarks.md and the numbers to reach
    peers       other stores that do the same work
    bench_*     the suites, by workload: `pytest bench`
    report      tables and pictures of the JSON: `python -m bench report`
    guard       one short suite that runs on any commit
    compare     two commits compared: `python -m bench compare BASE HEAD`
    counts      instructions and system calls, without a clock: `python -m bench counts`
    scale       sizes up to 50 million keys: `python -m bench scale`
"""

import importlib.machinery as _machinery
import sys as _sys
from pathlib import Path as _Path

CHECKOUT = _Path(__file__).resolve().parent.parent


def is_built(package: _Path) -> bool:
    """Return whether the folder holds modules compiled for this interpreter."""
    return any((package / "core" / f"engine{suffix}").exists() for suffix in _machinery.EXTENSION_SUFFIXES)


def prefer_the_installed_package() -> None:
    """Search an unbuilt checkout last: `python -m` puts it before the installed package, which it would hide."""
    if is_built(CHECKOUT / "fastsm"):
        return
    _sys.path.sort(key=lambda entry: _Path(entry or ".").resolve() == CHECKOUT)


prefer_the_installed_package()

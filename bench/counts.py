"""The guard without a clock: instructions, page faults, bytes written and system calls per operation.

`python -m bench counts` compares them with `counts.json`'s numbers for this compiler, architecture and Python, and
fails if one is above its limit; `python -m bench counts --record` records the current numbers. Counting instructions
needs valgrind; without it only page faults, bytes written and system calls are counted, which hardly depend on the
compiler.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("counts.json")
INSTRUCTIONS_LIMIT = 1.02
SYSTEM_LIMIT = 1.10  # of bytes, faults and calls: preallocation moves them a little
COUNT = 2000  # operations
Counts = dict[str, dict[str, float]]  # by operation, by kind

WORK = Path(__file__).with_name("counted.py")

# By operation, the compiled function whose instructions are counted, including those of all that it calls.
COUNTED = {
    "get": "__pyx_pw_*State_*get",
    "get_many": "__pyx_pw_*State_*get_many",
    "scan": "__pyx_pw_*Ordered_*scan",
    "apply.1": "__pyx_pw_*Engine_*apply",
    "apply.100": "__pyx_pw_*Engine_*apply",
    "deadline.100": "__pyx_pw_*Engine_*apply",
    "batch.100": "__pyx_pw_*Engine_*apply",
    "swap.100": "__pyx_pw_*Engine_*apply",
    "add.100": "__pyx_pw_*Engine_*apply",
    "transaction.100": "__pyx_pw_*Engine_*apply",
    "once.100": "__pyx_pw_*Engine_*apply",
    "flush": "__pyx_pw_*FrameFile_*sync",
    "refresh": "__pyx_pw_*Follower_*refresh",
}


def platform_name() -> str:
    """Name what instruction counts depend on: system, architecture, C library, compiler and Python."""
    compiler = subprocess.run(
        [*(sysconfig.get_config_var("CC") or "cc").split()[:1], "-dumpfullversion"],
        capture_output=True, text=True, check=False)  # fmt: skip
    cc = f"{(sysconfig.get_config_var('CC') or 'cc').split()[0]}-{compiler.stdout.strip() or 'unknown'}"
    python = f"{platform.python_implementation()}-{platform.python_version()}"
    return f"{platform.system()}-{platform.machine()}-{'-'.join(platform.libc_ver())}-{cc}-{python}"


def child_command(name: str, directory: str, python: str = sys.executable) -> list[str]:
    return [python, str(WORK), name, directory, str(COUNT)]


def instructions(name: str, python: str) -> float:
    """Return the instructions per operation, counted by callgrind."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", f"--toggle-collect={COUNTED[name]}",
            f"--callgrind-out-file={directory}/out", *child_command(name, f"{directory}/state", python),
        ]  # fmt: skip
        done = run(command, directory)
        collected = re.search(r"Collected : (\d+)", done.stderr)
        if collected is None or int(collected[1]) == 0:
            raise RuntimeError(f"callgrind counted nothing of {name}:\n{done.stderr[-2000:]}")
        return int(collected[1]) / COUNT


def system_counts(name: str, python: str) -> dict[str, float]:
    """Return page faults, bytes written, and reads and writes of files per operation."""
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as directory:
        done = run(child_command(name, f"{directory}/state", python), directory)
        numbers = [int(number) for number in done.stdout.split()]
    names = ("faults", "written_bytes", "calls")
    return {what: number / COUNT for what, number in zip(names, numbers, strict=True)}


def run(command: list[str], directory: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory of its own, so that no checkout hides the installed package."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=directory)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
    return done


def can_count() -> bool:
    return Path("/proc/self/io").exists()


def measure(python: str = sys.executable) -> Counts:
    """Return both kinds of counts, by operation, of the fastsm that this Python imports."""
    found: Counts = {}
    for name in COUNTED:
        found[name] = system_counts(name, python)
        if shutil.which("valgrind"):
            found[name]["instructions"] = instructions(name, python)
    return found


def judge(found: Counts, recorded: Counts) -> list[str]:
    """Return a sentence for each count that is above its limit."""
    losses = []
    for name, counts in found.items():
        for what, number in counts.items():
            before = recorded.get(name, {}).get(what)
            if before is None:
                continue
            # Counts below one per operation vary by chance, so a tenth of one is added.
            limit = before * INSTRUCTIONS_LIMIT if what == "instructions" else before * SYSTEM_LIMIT + 0.1
            if number > limit:
                losses.append(f"{name}: {number:.2f} {what} an operation, before {before:.2f}, limit {limit:.2f}")
    return losses


def main(record: bool) -> int:
    """Print the counts, then compare or record them; return the exit status."""
    if not can_count():
        print("counts: skipped, they need Linux's /proc")
        return 0
    known: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    found, here = measure(), platform_name()
    if not shutil.which("valgrind"):
        print("counts: no valgrind, so no instructions; faults, bytes and calls alone")
    for name, counts in found.items():
        print(f"{name:<16} " + "  ".join(f"{number:10.2f} {what}" for what, number in counts.items()))
    if record:
        known[here] = found
        RECORDED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(f"recorded for {here}")
        return 0
    recorded = known.get(here)
    if recorded is None:
        # With another compiler or Python, instructions cannot be compared, but the system's counts can.
        print(f"counts: no instructions are recorded for {here}; record them with `python -m bench counts --record`")
        recorded = {
            name: {what: number for what, number in counts.items() if what != "instructions"}
            for name, counts in next(iter(known.values()), {}).items()
        }
    losses = judge(found, recorded)
    print("\n".join(losses) or "counts: all within their limits")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main(record="--record" in sys.argv))

"""Runs the tests of files on each file system: ``python -m tests.file_systems [ext4] [xfs] [btrfs] [tmpfs]``.

Needs root: each file system is made in an image and mounted from it, and pytest keeps its files there. Arguments after
``--`` go to pytest, in place of the folders of tests that work with files. The status is 1 if a test failed, or if a
file system is not available.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAKERS = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "tmpfs": [],
}
SIZE = 4 << 30  # sparse
TESTS = [
    "tests/disk", "tests/generation", "tests/snapshot", "tests/core", "tests/journal", "tests/machine", "tests/faults",
    "tests/raft_log", "tests/tools",
]


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """Mount a file system of this kind for the block."""
    mount = folder / "mount"
    mount.mkdir()
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", mount], check=True)
    else:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run([*MAKERS[kind], image], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def tried(kind: str, arguments: list[str]) -> str:
    """Run the tests on a file system; return how they ended."""
    with tempfile.TemporaryDirectory(prefix=f"fastsm-{kind}-") as name:
        try:
            with mounted(kind, Path(name)) as mount:
                command = [sys.executable, "-m", "pytest", "-q", f"--basetemp={mount / 'tests'}", *arguments]
                print(f"== {kind}: {' '.join(command)}", flush=True)
                status = subprocess.run(command, check=False).returncode
        except (OSError, subprocess.CalledProcessError) as error:
            return f"not to be had: {error}"
    return "passed" if status == 0 else f"failed, status {status}"


def main(arguments: list[str]) -> int:
    kinds, rest = arguments, TESTS
    if "--" in arguments:
        at = arguments.index("--")
        kinds, rest = arguments[:at], arguments[at + 1 :]
    unknown = set(kinds) - set(MAKERS)
    if unknown:
        sys.exit(f"expected some of {', '.join(MAKERS)}, found {', '.join(sorted(unknown))}")
    outcomes = {kind: tried(kind, rest) for kind in kinds or MAKERS}
    for kind, outcome in outcomes.items():
        print(f"{kind:6} {outcome}")
    return int(any(outcome != "passed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

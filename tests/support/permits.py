"""Things that a test needs from the machine; if one is missing, the test is skipped with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest


def cannot(reason: str) -> NoReturn:
    """Skip the test, or fail it where CI runs as root: there nothing may be missing."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail(f"{reason}, where everything should be there")
    pytest.skip(reason)


def run(*command: str | Path) -> None:
    """Run a system tool; raise ``OSError`` with its error output if it fails."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {ended.stderr.strip()}")


@contextmanager
def mounted(path: Path, *options: str | Path) -> Iterator[Path]:
    """Mount something at a path for the block; skip the test if that is not permitted."""
    path.mkdir(exist_ok=True)
    try:
        run("mount", *options, path)
    except OSError as error:
        cannot(f"nothing can be mounted: {error}")
    try:
        yield path
    finally:
        run("umount", "--lazy", path)  # lazily, because a failed test may have left files open


@contextmanager
def tmpfs(path: Path, size: int) -> Iterator[Path]:
    """Mount a file system in memory, of `size` bytes."""
    if os.geteuid() != 0:
        cannot("only root mounts file systems")
    with mounted(path, "-t", "tmpfs", "-o", f"size={size},mode=0700", "none") as mount:
        yield mount


@contextmanager
def ext4(path: Path, image: Path, size: int | None = None) -> Iterator[Path]:
    """Mount the ext4 file system of an image; with a size, make it first, with its own blocks allocated eagerly."""
    if os.geteuid() != 0:
        cannot("only root mounts file systems")
    if shutil.which("mkfs.ext4") is None:
        cannot("there is no mkfs.ext4")
    if size is not None:
        with image.open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", image)
    with mounted(path, "-o", "loop", image) as mount:
        yield mount

"""What a test needs of the machine: where it is not to be had the test is skipped, and says why."""

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
    """Skips; where CI runs as root nothing may be missing, and it fails instead."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail(f"{reason}, where everything should be there")
    pytest.skip(reason)


def run(*command: str | Path) -> None:
    """Runs a tool of the system; what it says is the error."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {ended.stderr.strip()}")


@contextmanager
def mounted(path: Path, *options: str | Path) -> Iterator[Path]:
    """Something mounted at a path, for the block; where that is not permitted, the test is skipped."""
    path.mkdir(exist_ok=True)
    try:
        run("mount", *options, path)
    except OSError as error:
        cannot(f"nothing can be mounted: {error}")
    try:
        yield path
    finally:
        run("umount", "--lazy", path)  # a test that failed may have left something open


@contextmanager
def tmpfs(path: Path, size: int) -> Iterator[Path]:
    """A file system in memory, of so many bytes."""
    if os.geteuid() != 0:
        cannot("only root mounts file systems")
    with mounted(path, "-t", "tmpfs", "-o", f"size={size},mode=0700", "none") as mount:
        yield mount


@contextmanager
def ext4(path: Path, image: Path, size: int | None = None) -> Iterator[Path]:
    """The ext4 of an image, mounted; with a size, one that is made before, its own blocks allocated at once."""
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

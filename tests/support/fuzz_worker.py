"""A process that fuzzes one target, so that a crash can be traced to one input.

``python -m support.fuzz_worker TARGET SEED FIRST LAST SHARED KEPT`` runs the inputs FIRST to LAST - 1 of a seed.
The file SHARED holds the progress while it runs; the results are printed as JSON at the end.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from support import page_reader
from support.faulty import memory_directory
from support.fuzz_directories import Journals, Tables
from support.fuzz_snapshots import Receivers, Snapshots
from support.fuzz_targets import Commands, Logs, Target

CORPUS = Path(__file__).resolve().parent.parent / "corpus"
TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (Commands, Logs, Snapshots, Receivers, Tables, Journals)}
PROGRESS = struct.Struct("<QQ")  # the number of the current input; how many were decoded past the header
TRACED_EVERY = 20
PLANTED = int(os.environ.get("FASTSM_FUZZ_PLANTED", "-1"))  # the input with a planted finding, for a test


class Lines:
    """The lines of some files that ran, in functions that were called."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = {file: Path(file).name for file in files}
        self.hit: set[tuple[str, int]] = set()
        self.codes: set[CodeType] = set()

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        self.codes.add(frame.f_code)
        if event == "line":
            self.hit.add((self.files[frame.f_code.co_filename], frame.f_lineno))
        return self.trace

    def there_are(self) -> set[tuple[str, int]]:
        """Return all lines of the functions that were called."""
        return {
            (self.files[code.co_filename], line)
            for code in self.codes
            for _, _, line in code.co_lines()
            if line is not None and line != code.co_firstlineno
        }


def corpus_of(name: str) -> dict[str, bytes]:
    """Return the inputs that are kept for a target."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / name).glob("*"))}


class Worker:
    def __init__(self, name: str, seed: int, root: Path, kept: Path | None) -> None:
        self.target = TARGETS[name](root, list(corpus_of(name).values()))
        self.seed = seed
        self.kept = kept
        self.endings: Counter[str] = Counter()
        self.smallest: dict[str, int] = {}
        self.lines = Lines([page_reader.__file__, *self.target.decoders])
        self.deep = 0

    def run(self, number: int) -> None:
        """Run one input."""
        dice = random.Random(self.seed << 40 | number)
        data = self.target.draw(dice)
        traced = number % TRACED_EVERY == 0
        if traced:
            sys.settrace(self.lines.trace)
        try:
            outcome = self.target.run(data, dice)
        finally:
            if traced:
                sys.settrace(None)
        self.deep += outcome.deep
        self.endings[outcome.ending] += 1
        if self.kept is not None and len(data) < self.smallest.get(outcome.ending, 4096):
            self.smallest[outcome.ending] = len(data)
            words = "-".join("".join(c if c.isalnum() else " " for c in outcome.ending or "accepted").split())
            self.kept.mkdir(parents=True, exist_ok=True)
            (self.kept / words[:90]).write_bytes(data)


def plant(name: str) -> None:
    """Simulate a finding: an error, or a crash."""
    if name == "logs":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("planted")


def main() -> int:
    name, seed, first, last, shared, kept = *sys.argv[1:2], *map(int, sys.argv[2:5]), sys.argv[5], sys.argv[6]
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    started = time.monotonic()
    with memory_directory() as root, open(shared, "r+b") as file, mmap.mmap(file.fileno(), PROGRESS.size) as progress:
        worker = Worker(name, seed, root, Path(kept, name) if kept else None)
        number = first
        try:
            for number in range(first, last):
                PROGRESS.pack_into(progress, 0, number, worker.deep)
                if number == PLANTED:
                    plant(name)
                worker.run(number)
        except Exception:
            print(f"input {number}: {traceback.format_exc()}", file=sys.stderr)
            return 1
        worker.target.close()
    print(json.dumps({
        "inputs": last - first, "deep": worker.deep, "endings": worker.endings, "seconds": time.monotonic() - started,
        "hit": sorted(worker.lines.hit), "lines": sorted(worker.lines.there_are()),
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())

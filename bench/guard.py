"""The guard's suite: slices of work, some milliseconds long, which `compare` requests in each commit's environment.

It uses only the public names of fastsm, so that it can measure any commit, and nothing from the rest of `bench`.
`python guard.py DIRECTORY` reads the name of a workload from each line and answers with the seconds of one slice of it,
preparation excluded. With slices this short, the processes take turns faster than the load of a busy machine changes.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import fastsm

KEYS = 100_000
HOT = 1000  # keys that stay in the CPU's cache, where extra instructions show; with all keys, cache misses show
VALUE = bytes(range(100))
Work = tuple[Callable[..., object], tuple[Any, ...]]


class Guard:
    """A state machine of KEYS keys, and slices of work on it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.source = random.Random(17)
        self.keys = [self.source.randbytes(16) for _ in range(KEYS)]
        self.machine = fastsm.FastStateMachine(os.path.join(directory, "state"), auto_compact=False)
        self.machine.apply(self.entries(self.keys))
        self.machine.flush()
        # A second state, for the workload that opens and closes one.
        self.other = os.path.join(directory, "other")
        with fastsm.FastStateMachine(self.other) as machine:
            machine.apply([(i + 1, 1, fastsm.put(key, VALUE)) for i, key in enumerate(self.keys)])

    def entries(self, keys: list[bytes]) -> list[tuple[int, int, bytes]]:
        first = self.machine.last_applied().index + 1
        return [(first + i, 1, fastsm.put(key, VALUE)) for i, key in enumerate(keys)]

    def some(self, count: int, hot: bool = False) -> list[bytes]:
        if hot:
            return self.source.choices(self.keys[:HOT], k=count)
        return [bytes(bytearray(key)) for key in self.source.choices(self.keys, k=count)]

    def chunks(self, size: int, keys: list[bytes]) -> list[Any]:
        entries = self.entries(keys)
        return [entries[i : i + size] for i in range(0, len(entries), size)]

    def prepare(self, workload: str) -> Work:
        """Return the function to time, and its arguments."""
        operation, _, how = workload.partition(".")
        hot = how == "hot"
        if operation == "get":
            return self.get, (self.some(40_000, hot),)
        if operation == "get_many":
            return self.machine.get_many, (self.some(40_000),)
        if operation == "apply":
            return self.apply, (self.chunks(100 if hot else int(how), self.some(10_000, hot)),)
        if operation == "flush":
            return self.apply_and_flush, (self.chunks(100, self.some(2_000)),)
        if operation == "snapshot":
            shutil.rmtree(os.path.join(self.directory, "out"), ignore_errors=True)
            return self.machine.write_snapshot, (os.path.join(self.directory, "out"),)
        return self.open, ()

    def get(self, keys: list[bytes]) -> None:
        get = self.machine.get
        for key in keys:
            get(key)

    def apply(self, chunks: list[Any]) -> None:
        apply = self.machine.apply
        for chunk in chunks:
            apply(chunk)

    def apply_and_flush(self, chunks: list[Any]) -> None:
        for chunk in chunks:
            self.machine.apply(chunk)
            self.machine.flush()

    def open(self) -> None:
        fastsm.FastStateMachine(self.other, verify_on_open="off").close()


def serve(directory: str) -> None:
    guard = Guard(directory)
    gc.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        function, arguments = guard.prepare(line.strip())
        start = time.perf_counter()
        function(*arguments)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])

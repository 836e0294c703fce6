"""The work that `counts` counts: the same keys, the same hash seed, the same work each time.

`python counted.py NAME DIRECTORY COUNT` prepares, does COUNT operations, and prints by how much the page faults, bytes
written, and reads and writes of files of its process grew meanwhile. It uses only fastsm, so it can count any commit.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Callable
from typing import Any

seeds = random.Random(16)
os.urandom = seeds.randbytes  # before fastsm draws its seeds

import fastsm  # noqa: E402

COUNT = int(sys.argv[3])
VALUE = b"v" * 100
SESSION = COUNT + 1  # a session's number is the index of the entry that opened it


def two_puts(key: bytes) -> list[bytes]:
    return [fastsm.put(key, VALUE), fastsm.put(key[::-1], VALUE)]


# What an entry does to a key, by the name of the row.
COMMANDS: dict[str, Callable[[int, bytes], bytes]] = {
    "apply": lambda index, key: fastsm.put(key, VALUE),
    "batch": lambda index, key: fastsm.batch(two_puts(key)),
    "swap": lambda index, key: fastsm.compare_and_swap(key, VALUE, VALUE),
    "add": lambda index, key: fastsm.add(key + b"#", 1),
    "transaction": lambda index, key: fastsm.transaction([fastsm.exists(key)], two_puts(key)),
    "once": lambda index, key: fastsm.once(SESSION, index, fastsm.put(key, VALUE)),
    "deadline": lambda index, key: fastsm.put(key, VALUE, expires=2**50 + index),
}


def entries(command: Callable[[int, bytes], bytes], keys: list[bytes], first: int) -> list[tuple[int, int, bytes]]:
    return [(first + i, 1, command(first + i, key)) for i, key in enumerate(keys)]


def chunked(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def work_of(name: str, directory: str) -> Callable[[], None]:
    """Prepare a row's work, and return it. What prepares runs through functions that are not counted."""
    operation, _, size = name.partition(".")
    keys = [seeds.randbytes(16) for _ in range(COUNT)]
    wanted = seeds.choices(keys, k=COUNT)
    machine = fastsm.FastStateMachine(directory, verify_on_open="off", auto_compact=False)
    fill = machine._apply_in_turn
    for chunk in chunked(entries(COMMANDS["apply"], keys, 1), 1000):
        fill(chunk)
    if operation in COMMANDS:
        first = COUNT + 1
        if operation == "once":
            fill([(SESSION, 1, fastsm.open_session())])
            first += 1
        chunks = chunked(entries(COMMANDS[operation], wanted, first), int(size))

        def work() -> None:
            for chunk in chunks:
                machine.apply(chunk)

    elif operation == "get_many":

        def work() -> None:
            machine.get_many(wanted)

    elif operation == "get":

        def work() -> None:
            for key in wanted:
                machine.get(key)

    elif operation == "scan":
        machine.count()  # builds the order

        def work() -> None:
            for key in wanted[: COUNT // 10]:
                machine.scan(key, limit=100)

    else:
        chunks = chunked(entries(COMMANDS["apply"], wanted, COUNT + 1), 100)
        after_chunk = fastsm.Reader(directory).refresh if operation == "refresh" else machine.flush

        def work() -> None:
            for chunk in chunks:
                fill(chunk)
                after_chunk()

    return work


def state() -> tuple[int, int, int]:
    """Return the page faults, bytes written, and reads and writes of files of this process."""
    written = calls = 0
    with open("/proc/self/io") as file:
        for line in file:
            what, number = line.split(":")
            if what == "wchar":
                written = int(number)
            elif what in ("syscw", "syscr"):
                calls += int(number)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt, written, calls


def main() -> None:
    work = work_of(*sys.argv[1:3])
    # Where the heap has got to is chance, and the path of the package moves it: objects as large as a value leave
    # partly used pools after it, so that no `get` has to open a pool of its own.
    room = [bytes(bytearray(100)) for _ in range(1000)]
    del room[::2]
    before = state()
    work()
    after = state()
    print(*(new - old for old, new in zip(before, after, strict=True)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

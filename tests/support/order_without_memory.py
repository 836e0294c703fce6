"""A program to run under the shim: the n-th allocation of the compiled modules fails in each kind of ordered read."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastsm
from fastsm import FastStateMachine
from support import shim
from support.inside import inside

DICE = random.Random(11)
KEYS = [DICE.randbytes(8) for _ in range(6_000)]
ENOUGH = 2  # reads in a row without a failed allocation, after which a kind is done


def put_all(machine: FastStateMachine, keys: list[bytes]) -> None:
    """Put keys in one entry."""
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.put_many(keys, [b"v"] * len(keys)))])


def delete_all(machine: FastStateMachine, keys: list[bytes]) -> None:
    """Delete keys in one entry."""
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.batch([fastsm.delete(key) for key in keys]))])


class Trial:
    """A machine with the order in some state, and an ordered read."""

    def __init__(self, root: str, name: str) -> None:
        self.machine = FastStateMachine(Path(root) / name, auto_compact=False)
        self.name = name
        self.keys = set(KEYS[:3000])
        put_all(self.machine, KEYS[:3000])

    def prepare(self) -> None:
        """Bring the order into the state in which the read begins."""
        order = inside(self.machine).order()
        if self.name == "build":
            if order is not None:
                order.forget()
            return
        self.machine.count()
        new = [DICE.randbytes(8) for _ in range(1000 if self.name == "many new keys" else 20)]
        if self.name in ("many new keys", "few new keys"):
            self.keys.update(new)
            put_all(self.machine, new)
        if self.name == "deleted keys":
            some = DICE.sample(sorted(self.keys), 30)
            self.keys.difference_update(some)
            delete_all(self.machine, some)

    def read(self) -> None:
        """Read everything in order, and compare."""
        expected = sorted(self.keys)
        if self.name == "iterator":
            pairs = self.machine.ordered()
            first = next(pairs)
            some = DICE.sample(expected, 50)
            for key in some:
                put_all(self.machine, [key])  # apply must not fail if it cannot record what the iterator needs
            assert [first[0], *(key for key, _ in pairs)] == expected, self.name
        elif self.name == "reverse":
            assert [key for key, _ in self.machine.scan(reverse=True).entries] == expected[::-1], self.name
        else:
            assert [key for key, _ in self.machine.scan().entries] == expected, self.name
            assert self.machine.count(expected[10], expected[-10]) == len(expected) - 20, self.name

    def run(self, library: shim.Shim) -> dict[str, int]:
        """Let each allocation fail in turn, and read again without a failure."""
        found = {"MemoryError": 0, "right": 0}
        quiet, n = 0, 1
        while quiet < ENOUGH:
            self.prepare()
            library.arm(shim.FAIL_ALLOCATION, n)
            try:
                self.read()
                found["right"] += 1
            except MemoryError:
                found["MemoryError"] += 1
            struck = library.disarm()
            quiet = 0 if struck else quiet + 1
            inside(self.machine).check()
            self.read()
            n += 1 + n // 10
        self.machine.close()
        return found


def main() -> None:
    library = shim.Shim()
    with tempfile.TemporaryDirectory() as root:
        names = ("build", "many new keys", "few new keys", "deleted keys", "iterator", "reverse")
        print(json.dumps({name: Trial(root, name).run(library) for name in names}))


if __name__ == "__main__":
    main()

"""A cache that stays correct: it follows a state machine through compaction, install, reset and restarts of either.

Run: ``python examples/cache.py``, which does all of that and compares the cache with the state.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import fastsm

RETAINED = 50  # entries that a compaction keeps for late watches


class Cache:
    """The pairs whose keys start with a prefix, in a dict that one thread keeps up to date.

    ``position`` is the place in the log up to which the pairs are current. If it is stored together with them, the
    cache continues from there after a restart, without reading the whole state again.
    """

    def __init__(
        self, prefix: bytes = b"", pairs: dict[bytes, bytes] | None = None, position: fastsm.Position | None = None
    ) -> None:
        self.prefix = prefix
        self.pairs = dict(pairs or {})
        self.position = position
        self.rebuilds = 0

    def follow(self, machine: fastsm.FastStateMachine) -> None:
        """Keep the cache up to date until the machine is closed."""
        while True:
            try:
                if self.position is None:
                    watch = self._rebuild(machine)
                else:
                    watch = machine.watch(self.prefix, start=self.position)
                with watch:
                    while True:
                        self._take(watch.read())
                        self.position = watch.position
            except fastsm.CompactedError:
                self.position = None  # the changes in between are gone: read the whole state instead
            except fastsm.NotRunningError:
                return

    def _rebuild(self, machine: fastsm.FastStateMachine) -> fastsm.Watch:
        """Read the whole state; return a watch that continues right after it."""
        watch = machine.watch(self.prefix)  # before the state is read: a reset in between ends the watch
        entries, revision = machine.scan(prefix=self.prefix)
        self.pairs = dict(entries)
        while watch.position.index < revision:
            self._take([change for change in watch.read(timeout=0) if change.index > revision])
        self.position = watch.position
        self.rebuilds += 1
        return watch

    def _take(self, changes: list[fastsm.Change]) -> None:
        for change in changes:
            if change.value is None:
                self.pairs.pop(change.key, None)
            else:
                self.pairs[change.key] = change.value


def write(machine: fastsm.FastStateMachine, count: int) -> None:
    """Apply entries, some of which remove keys."""
    first = machine.last_applied().index + 1
    for index in range(first, first + count):
        key = b"user/%d" % (index % 40)
        machine.apply([(index, 1, fastsm.delete(key) if index % 7 == 0 else fastsm.put(key, b"%d" % index))])


def main(folder: Path, count: int) -> None:
    directory = folder / "state"
    cache = Cache(b"user/")
    for life in ("first", "second"):  # of the machine, and of the cache
        machine = fastsm.FastStateMachine(directory, retain_entries=RETAINED)
        if life == "second":
            write(machine, 10)  # while the cache is not running; fewer entries than are retained
        cache = Cache(cache.prefix, cache.pairs, cache.position)  # as if they were read from a file
        follower = threading.Thread(target=cache.follow, args=(machine,))
        follower.start()
        write(machine, count)
        machine.compact()
        if life == "first":
            machine.write_snapshot(folder / "snapshot")
            write(machine, count)
            machine.clear()
            write(machine, 3)
            machine.install_snapshot(None, folder / "snapshot", allow_older=True)
        write(machine, count)
        expected = dict(machine.scan(prefix=b"user/").entries)
        last = machine.last_applied().index
        while cache.position is None or cache.position.index < last or cache.pairs != expected:
            follower.join(0.001)  # until the cache has caught up
        machine.close()
        follower.join()
        print(f"{life} life: {len(cache.pairs)} pairs as of entry {last}; those of the state:", cache.pairs == expected)
    print("after the restart it went on where it was:", cache.rebuilds == 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
